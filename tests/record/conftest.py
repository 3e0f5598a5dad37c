"""A tiny model and a short run of it, to be damaged."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.malformed import train


@pytest.fixture(scope="module")
def two_steps(model, no_plots):
    """The folder of a run of two steps, which no test changes."""
    folder = model.parent / "two steps"
    result = train(model, folder, num_iterations=2)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def run(two_steps, tmp_path):
    """A copy of the run of two steps."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))
