"""Provide small offline runs of the scripts, and a finished run."""

import shutil
from pathlib import Path

import pytest

from grpo.evaluation import evaluator
from tests.helpers.scripts import train


@pytest.fixture(scope="module", autouse=True)
def _small_and_offline():
    """Measure on a few test problems instead of 1000, and keep off the Hub, whatever was imported first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "TEST_PROBLEMS", 8)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train; return the folder of the run, which no test changes, and what the run printed."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder=folder)


@pytest.fixture
def copy_of_run(run, tmp_path):
    """Copy the folder of the finished run, for a test to change."""
    return Path(shutil.copytree(run[0], tmp_path / "copy"))
