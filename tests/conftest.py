"""Fixtures of all tests: offline, one thread, float32, and settings that make a run quick."""

import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("COLUMNS", None)  # pytest imports readline, which sets it to 80 for the processes that it starts

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from grpo.evaluation import evaluator
from grpo.evaluation.evaluator import SKILL_PROBLEMS, TEST_PROBLEMS
from grpo.model import trial
from grpo.plots import figures
from grpo.runtime import device
from tests.helpers.runs import a_tiny_model, run_trial_in_fork

# Modules whose tests look at the content or size of pictures, or at the number of test problems.
FULL_PICTURES = ("plot_metrics",)
FULL_TESTS = ("test_evaluator",)


def noise(record):
    """Draw a picture whose file has more than 100 kB, in a twentieth of the time that a real one takes."""
    figure = plt.figure(figsize=(2, 2))
    figure.figimage(np.random.default_rng(0).random((200, 200)))
    return figure


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny matrices are slower on several threads, and results are the same everywhere on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _float32():
    """Make a tiny run the same on CPUs that multiply bfloat16 and on others, unless a test asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "cpu_multiplies_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="module", autouse=True)
def _quick_trials(request):
    """Try a tokenizer in a fork of this process, which has already imported transformers.

    A new process needs more than a second of CPU time for the import. The tests of the trial itself start it.
    """
    if request.module.__name__.endswith(("test_trial", "test_hostile_files")):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "subprocess", SimpleNamespace(run=run_trial_in_fork, DEVNULL=None, PIPE=None))
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_problems():
    """Test models on a few problems, in the runs of fixtures of a package too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "TEST_PROBLEMS", 4)
        patch.setattr(evaluator, "SKILL_PROBLEMS", 1)
        yield


@pytest.fixture(scope="module", autouse=True)
def _quick_runs(request):
    """Leave pictures of runs empty, except where they are looked at; test on all problems where this matters.

    Where writes fail, the files must be as large as real ones, but nobody looks at the pictures.
    """
    name = request.module.__name__
    picture = noise if name.startswith("tests.run.test_faults") else lambda record: plt.figure(figsize=(1, 1))
    with pytest.MonkeyPatch.context() as patch:
        if not name.startswith("tests.plots.") and not name.endswith(FULL_PICTURES):
            for function in ("training_curve", "kl_divergence", "sft_curve", "overview"):
                patch.setattr(figures, function, picture)
        if name.endswith(FULL_TESTS):
            patch.setattr(evaluator, "TEST_PROBLEMS", TEST_PROBLEMS)
            patch.setattr(evaluator, "SKILL_PROBLEMS", SKILL_PROBLEMS)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model, which no test changes."""
    return a_tiny_model(tmp_path_factory.mktemp("model") / "model")
