"""Fixtures: a tiny model and a short run of it that tests may damage."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.malformed import train


@pytest.fixture(scope="module")
def two_steps(model):
    """Return the folder of a run of two steps; no test may change it."""
    folder = model.parent / "two steps"
    result = train(model, folder, num_iterations=2)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def run(two_steps, tmp_path):
    """Return the folder of a copy of the run of two steps."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))
