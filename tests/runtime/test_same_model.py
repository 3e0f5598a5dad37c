"""Processes compare a sample of their weights, whatever the shapes and the precision of these."""

from unittest.mock import patch

import pytest
import torch
from torch import nn

from grpo.runtime.ranks import COMPARED_WEIGHTS, ConnectedRanks


def hash_of(model: nn.Module) -> str:
    """Return what a process says of its model to the others."""
    with patch.object(ConnectedRanks, "check_alike") as check:
        ConnectedRanks(0, 2, local_rank=0).check_same_model(model)
    return check.call_args.args[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vector_of_which_a_single_number_is_compared_is_hashed(dtype):
    torch.manual_seed(0)
    large = nn.Linear(4, COMPARED_WEIGHTS).to(dtype)  # of the vector, every fourth number or fewer are compared
    model = nn.Sequential(large, nn.LayerNorm(3).to(dtype))
    before = hash_of(model)
    assert hash_of(model) == before
    with torch.no_grad():
        model[1].weight[0] += 1
    assert hash_of(model) != before
