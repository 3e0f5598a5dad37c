"""Fixtures of this folder."""

import pytest
import torch

from grpo.model.language_model import LanguageModel
from grpo.model.loading import load


@pytest.fixture(scope="module")
def starter() -> LanguageModel:
    """Load the bundled model, which no test changes."""
    return load("starter", torch.device("cpu"))
