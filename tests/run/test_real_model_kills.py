"""A run of the real instruct model, killed at random moments, continues to the bits of an undisturbed one."""

import shutil
import subprocess
import sys
import time

import pytest
import torch

from grpo.model.loading import load
from grpo.model.saving import save
from tests.helpers.runs import ENVIRONMENT, ROOT, kill_and_continue
from tests.helpers.smollm2 import needs_model

SMALL = ["--shots", "2", "--batch-size", "2", "--num-generations", "4", "--num-iterations", "4", "--temperature", "1"]
SMALL += ["--max-operand", "2", "--save-every", "1", "--eval-every", "2", "--eval-problems", "4", "--show-every", "0"]
SMALL += ["--train-anyway", "--max-new-tokens", "24", "--learning-rate", "1e-5"]


@needs_model
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kill_9_of_a_run_of_the_real_model_twenty_times(tmp_path):
    save(tmp_path / "model", load("smollm2", torch.device("cpu")), {}, "")  # a folder is read in a third of the time

    def launch(folder):
        command = [sys.executable, str(ROOT / "train_grpo.py"), "--model", str(tmp_path / "model"), *SMALL]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, "--output-dir", str(folder)], cwd=ROOT, env=ENVIRONMENT, **pipes)

    start, whole = time.monotonic(), tmp_path / "whole"
    _, err = launch(whole).communicate()
    assert (whole / "saved_model").is_dir(), err
    seconds, kills, seed = time.monotonic() - start, 0, 0
    while kills < 20:
        kills += kill_and_continue(launch, (whole, seconds), tmp_path / str(seed), seed, launches=3)
        shutil.rmtree(tmp_path / str(seed))
        seed += 1
    print(f"\n{kills} kills, a whole run takes {seconds:.0f} s")
