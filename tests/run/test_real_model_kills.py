"""A run of the real instruct model, killed at random moments, continues to the bits of an undisturbed one."""

import shutil
import subprocess
import sys
import time

import pytest

from tests.helpers.runs import ENVIRONMENT, ROOT, kill_and_continue
from tests.helpers.smollm2 import needs_model

SMALL = ["--model", "smollm2", "--shots", "2", "--batch-size", "2", "--num-generations", "4", "--num-iterations", "4"]
SMALL += ["--max-operand", "2", "--save-every", "1", "--eval-every", "2", "--eval-problems", "4", "--show-every", "0"]


def launch(folder):
    """Start or continue the small run in a folder, in a process of its own."""
    command = [sys.executable, str(ROOT / "train_grpo.py"), *SMALL, "--output-dir", str(folder)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@needs_model
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kill_9_of_a_run_of_the_real_model_twenty_times(tmp_path):
    start, whole = time.monotonic(), tmp_path / "whole"
    _, err = launch(whole).communicate()
    assert (whole / "saved_model").is_dir(), err
    seconds, kills, seed = time.monotonic() - start, 0, 0
    while kills < 20:
        kills += kill_and_continue(launch, (whole, seconds), tmp_path / str(seed), seed, launches=3)
        shutil.rmtree(tmp_path / str(seed))
        seed += 1
    print(f"\n{kills} kills, a whole run takes {seconds:.0f} s")
