"""A run that is killed, stopped or damaged continues to the same result as the run that was not.

Most runs are forks of the test, which have the libraries loaded. A new interpreter, which takes seconds to load them,
is started where it could behave otherwise: for the first Ctrl-C, and for a launch that must be refused before the
libraries are loaded.
"""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

import train_grpo
from grpo import trainer
from grpo.evaluation.evaluator import Evaluation, Evaluator
from grpo.interrupts import InterruptHandler
from grpo.measurer import Measurer
from grpo.model_card import read_card
from grpo.record.samples import EVERY, GROUPS
from tests.helpers.runs import ENVIRONMENT, ROOT, Fork, fingerprint, kill_and_continue, options, wait_for

TINY = options(num_iterations=12, num_generations=2, eval_every=4)


@pytest.fixture(scope="module", autouse=True)
def _tiny_model(model):
    """Train the tiny model in all runs."""
    TINY.extend(["--model", str(model)])
    yield
    del TINY[-2:]


def launch(folder, *more):
    """Start or continue the tiny run in a folder, in a fork of this process."""
    return Fork(train_grpo.main, [*TINY, "--output-dir", folder, *more])


def launch_as_a_user(folder, *more):
    """Start or continue the tiny run in a folder, in a new interpreter."""
    command = [sys.executable, str(ROOT / "train_grpo.py"), *TINY, "--output-dir", str(folder), *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(folder, *more):
    """Run the tiny run to its end; return its standard output."""
    process = launch(folder, *more)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def in_process(folder, *more, **how):
    """Run the tiny run in this process, which has already loaded torch; return click's result."""
    return CliRunner().invoke(train_grpo.main, [*TINY, "--output-dir", str(folder), *more], **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder and the seconds of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start = time.monotonic()
    finish(folder)
    return folder, time.monotonic() - start


def test_samples_of_some_groups_are_recorded_every_few_steps(whole):
    lines = (whole[0] / "grpo_samples.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [step for step in range(1, 13) if step == 1 or step % EVERY == 0]
    assert [json.loads(line)["step"] for line in lines] == [step for step in steps for _ in range(2 * GROUPS)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_kill_9_at_random_moments(whole, tmp_path, seed):
    kill_and_continue(launch, whole, tmp_path / "run", seed, launches=1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kill_9_two_hundred_times(whole, tmp_path):
    kills, seed = 0, 100
    while kills < 200:
        kills += kill_and_continue(launch, whole, tmp_path / str(seed), seed, launches=4)
        shutil.rmtree(tmp_path / str(seed))
        seed += 1


@pytest.mark.parametrize(
    ("start", "number", "status"),
    [(launch_as_a_user, signal.SIGINT, 130), (launch, signal.SIGTERM, 143)],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_signal_finishes_the_step_and_saves_and_the_same_command_continues(tmp_path, start, number, status):
    folder = tmp_path / "run"
    process = start(folder, "--num-iterations", "100000")
    wait_for((folder / "checkpoints" / "step-00000002").exists, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    record = json.loads((folder / "grpo_metrics.json").read_text(encoding="utf-8"))
    done = record["steps"][-1]["step"]
    assert (folder / "checkpoints" / f"step-{done:08d}").is_dir(), "the checkpoint is of the last step"
    assert f"after step {done}" in out
    assert (folder / "saved_model" / "model.safetensors").is_file()
    assert (folder / "grpo_training_curve.png").is_file() == (number == signal.SIGINT)
    assert f"checkpoint of step {done}" in finish(folder, "--num-iterations", str(done + 1))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_quits_at_once(tmp_path, number, status):
    folder = tmp_path / "run"
    process = launch(folder, "--num-iterations", "100000", "--batch-size", "64", "--num-generations", "256")
    wait_for((folder / "grpo_metrics.json").exists, process)
    time.sleep(0.3)
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)
    second_signal_at = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode in (status, -number)  # the run ends itself, or the system ends it
    assert time.monotonic() - second_signal_at < 4  # a step takes far longer, and another test may use the core


def test_a_second_run_in_the_folder_is_refused_at_once_and_the_first_continues(tmp_path):
    folder = tmp_path / "run"
    first = launch(folder)
    wait_for((folder / ".grpo.pid").exists, first)
    first.send_signal(signal.SIGSTOP)  # or both would share one core, and the time would measure the first run too
    start = time.monotonic()
    second = launch_as_a_user(folder)
    _, err = second.communicate(timeout=30)
    seconds = time.monotonic() - start
    first.send_signal(signal.SIGCONT)
    assert seconds < 1
    assert second.returncode == 1
    assert err.count("\n") == 1
    assert f"process {first.pid}" in err
    first.communicate(timeout=120)
    assert first.returncode == 0


def test_a_finished_run_says_so_and_a_larger_number_of_steps_continues_it(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    (folder / "grpo_training_curve.png").unlink()
    before = fingerprint(folder)
    out = in_process(folder).stdout
    assert "finished" in out
    assert "--num-iterations" in out
    assert "--fresh" in out
    assert (folder / "grpo_training_curve.png").is_file()
    assert fingerprint(folder) == before
    monkeypatch.setattr(trainer, "draw_all", lambda *_: [])
    assert in_process(folder, "--num-iterations", "14").exit_code == 0
    record = json.loads((folder / "grpo_metrics.json").read_text(encoding="utf-8"))
    assert [row["step"] for row in record["steps"]] == list(range(1, 15))


def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_is_used(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    weights = newest / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    out = finish(folder)
    assert newest.name in out
    assert "set aside" in out
    assert newest.with_name(f"{newest.name}.damaged-1").is_dir()
    assert fingerprint_without_damaged(folder) == fingerprint(whole[0])


def fingerprint_without_damaged(folder):
    for path in (folder / "checkpoints").glob("*.damaged-*"):
        path.rename(folder / path.name)
    return fingerprint(folder)


CHANGES = [
    *(["--learning-rate", "1e-4"], ["--batch-size", "3"], ["--seed", "1"], ["--beta", "0"], ["--max-operand", "2"]),
    *(["--num-generations", "3"], ["--prompt-style", "think"], ["--eval-every", "3"], ["--temperature", "0.9"]),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change[0])
def test_a_setting_that_may_not_change_is_named_and_refused(whole, change):
    folder, _ = whole
    before = fingerprint(folder)
    result = in_process(folder, *change)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert f"{change[0]} " in result.stderr
    assert fingerprint(folder) == before


def test_a_time_limit_ends_in_time_with_everything_saved(tmp_path):
    folder = tmp_path / "run"
    start = time.monotonic()
    out = finish(folder, "--num-iterations", "100000", "--time-limit", "2s")
    assert time.monotonic() - start < 7  # the limit does not count the start of Python
    assert "the time limit" in out
    assert (folder / "saved_model" / "README.md").is_file()


def test_patience_and_target_accuracy_stop_and_say_why(tmp_path):
    out = in_process(tmp_path / "a", "--num-iterations", "1000", "--target-accuracy", "0.01").stdout
    assert "validation accuracy reached" in out
    out = in_process(tmp_path / "b", "--num-iterations", "1000", "--learning-rate", "0", "--patience", "2").stdout
    assert "no better than" in out


def test_a_kill_in_the_very_first_save_does_no_harm(tmp_path):
    (tmp_path / "run" / "checkpoints" / ".step-00000000.new").mkdir(parents=True)
    result = in_process(tmp_path / "run", "--num-iterations", "1")
    assert result.exit_code == 0, result.output


def test_a_run_with_no_sound_checkpoint_is_refused_every_time_and_nothing_is_overwritten(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        (checkpoint / "state.json").unlink()
    weights = (folder / "saved_model/model.safetensors").read_bytes()
    for _ in range(2):
        result = in_process(folder)
        assert result.exit_code == 1
        assert "--fresh" in result.stderr
    assert (folder / "saved_model/model.safetensors").read_bytes() == weights


class Killed(BaseException):
    """Stand in for SIGKILL: nothing catches this exception."""


def test_the_saved_model_is_never_ahead_of_the_checkpoint_and_is_written_after_a_kill_between_the_two(
    whole, tmp_path, monkeypatch
):
    # step 4 is the best, and the kill comes while it is being saved; step 5, the last, is no better
    true_save, true_to_dict = Measurer.save, Evaluation.to_dict
    accuracies = iter([0.0, 0.1, 0.5, 0.2, 0.5])

    def to_dict(self):
        return {**true_to_dict(self), "accuracy": next(accuracies)}

    def save(self, lm):
        if self.progress.step == 4:
            raise Killed
        true_save(self, lm)

    monkeypatch.setattr(Evaluation, "to_dict", to_dict)
    with monkeypatch.context() as patch:
        patch.setattr(Measurer, "save", save)
        with pytest.raises(Killed):
            in_process(tmp_path / "run", catch_exceptions=False)
    assert read_card(str(tmp_path / "run" / "saved_model"))["step"] == 0
    result = in_process(tmp_path / "run", "--num-iterations", "5")
    assert result.exit_code == 0, result.output
    card = read_card(str(tmp_path / "run" / "saved_model"))
    evals = json.loads((tmp_path / "run" / "grpo_metrics.json").read_text(encoding="utf-8"))["evals"]
    assert [e["step"] for e in evals if e["split"] == "validation"] == [0, 4, 5]
    assert card["step"] == evals[-1]["step"] == 4


def test_a_launch_that_continues_leaves_time_for_the_last_test_too(tmp_path, monkeypatch):
    left, test = [], Evaluator.test
    monkeypatch.setattr(InterruptHandler, "reason", lambda self, seconds: left.append(seconds))
    monkeypatch.setattr(Evaluator, "test", lambda self, lm: time.sleep(0.5) or test(self, lm))
    for steps in ("2", "4"):
        in_process(tmp_path / "run", "--num-iterations", steps)
    assert len(left) == 2
    assert all(seconds > 1.5 * 0.5 for seconds in left)
