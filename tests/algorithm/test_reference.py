"""The reference: a copy that is never trained."""

import torch

from grpo.algorithm.reference import frozen_copy
from grpo.model.loading import load


def test_the_reference_is_frozen_and_does_not_follow():
    model = load("starter", torch.device("cpu")).model
    reference = frozen_copy(model)
    assert not any(p.requires_grad for p in reference.parameters())
    pairs = zip(reference.parameters(), model.parameters(), strict=True)
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)
