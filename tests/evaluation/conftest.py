"""Fixtures of this folder."""

import pytest
import torch

from grpo.model.loading import load


@pytest.fixture(scope="module")
def starter():
    """Return the bundled model, on the CPU."""
    return load("starter", torch.device("cpu"))
