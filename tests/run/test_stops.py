"""Signals at any moment: the run stops soon, says how to continue, and ends with the bits of an undisturbed run."""

import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from click.testing import CliRunner

import train_grpo
from grpo import interrupts, resume, trainer
from grpo.algorithm.grpo import GRPO
from grpo.algorithm.update import Updater
from grpo.evaluation.evaluator import Evaluation, Evaluator
from grpo.interrupts import Interrupted, InterruptHandler
from grpo.record.metrics import load_metrics
from tasks.base import Problem
from tasks.common import watch
from tasks.common.user_file import Judge
from tests.helpers.runs import ENVIRONMENT, ROOT, fingerprint, options


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Run undisturbed; return the folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert launch(model, folder).exit_code == 0
    return folder


def launch(model, folder, **settings):
    """Start or continue the tiny run in this process; return click's result."""
    return CliRunner().invoke(train_grpo.main, options(**{"model": model, "output_dir": folder, **settings}))


def kill_at(monkeypatch, owner, name, number, after=False):
    """Send SIGTERM to this process in the n-th call of a method, before or after what it does."""
    true, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGTERM)
        result = true(*args, **kwargs)
        if calls == number and after:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(owner, name, counted)


# the method, the number of its call, and how many steps are done at that call
SLOW = pytest.mark.slow
MOMENTS = [
    pytest.param(Updater, "__call__", 1, 0, marks=SLOW),
    (Updater, "__call__", 6, 2),  # in the second of two updates of step 3; the checkpoint is of step 2
    (Updater, "__call__", 8, 3),  # in step 4; there is no checkpoint of step 3
    pytest.param(GRPO, "step", 4, 3, marks=SLOW),
    pytest.param(Evaluator, "validate", 1, 0, marks=SLOW),
    pytest.param(Evaluator, "validate", 2, 2, marks=SLOW),
    (Evaluator, "validate", 3, 4),  # the whole run knows this to be the best so far
    (Evaluator, "validate", 4, 6),
    pytest.param(Evaluator, "test", 1, 0, marks=SLOW),
    (Evaluator, "test", 2, 6),
]


@pytest.mark.parametrize(("owner", "name", "number", "done"), MOMENTS)
@pytest.mark.parametrize("after", [pytest.param(False, marks=SLOW), True], ids=["before", "after"])
def test_a_signal_at_any_moment_stops_the_run_and_the_same_command_ends_with_the_same_bits(
    owner, name, number, done, after, model, whole, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "QUICK_STEP_SECONDS", 0.0)  # every step is long
        kill_at(patch, owner, name, number, after)
        result = launch(model, folder)
    assert result.exit_code == 143, result.output
    assert "Traceback" not in result.output
    assert f"Stopped after step {done}" in result.stdout
    assert len(load_metrics(folder)["steps"]) == done
    result = launch(model, folder)
    assert result.exit_code == 0, result.output
    assert fingerprint(folder) == fingerprint(whole)
    assert "finished" in launch(model, folder).stdout


def test_a_quick_step_is_finished_and_saved(model, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "QUICK_STEP_SECONDS", 60.0)
        kill_at(patch, Updater, "__call__", 6)
        assert launch(model, tmp_path / "run").exit_code == 143
    assert (tmp_path / "run/checkpoints/step-00000003").is_dir()
    assert launch(model, tmp_path / "run").exit_code == 0
    assert fingerprint(tmp_path / "run") == fingerprint(whole)


def test_a_long_run_saves_for_the_time_that_has_passed(model, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SAVE_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(resume, "MAX_SAVING_SHARE", 1e9)
    launch(model, tmp_path / "run", num_iterations=3, save_every=1000, eval_every=1000)
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert saved == ["step-00000002", "step-00000003"]


def sleep_through(interruptions):
    """Sleep, and ignore this many interruptions."""
    for _ in range(interruptions):
        with suppress(BaseException):
            time.sleep(5)
    time.sleep(5)


def test_what_swallows_an_interruption_is_interrupted_again():
    with InterruptHandler("", 0.0) as interrupts:
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        start = time.monotonic()
        with pytest.raises(Interrupted), interrupts.abandonable():
            sleep_through(2)
        assert interrupts.exit_status == 143
    assert time.monotonic() - start < 3


def test_a_signal_stops_work_where_the_system_offers_what_windows_does(monkeypatch):
    def select_sockets(*lists):
        assert all(isinstance(item, socket.socket) for items in lists[:3] for item in items)
        return true_select(*lists)

    def sleep_in_python():  # swallows the first interruption
        with suppress(BaseException):
            for _ in range(500):
                time.sleep(0.01)
        for _ in range(500):
            time.sleep(0.01)

    true_select = select.select
    monkeypatch.setattr(select, "select", select_sockets)
    monkeypatch.delattr(signal, "pthread_kill")
    monkeypatch.delattr(os, "set_blocking")
    with InterruptHandler("", 0.0) as interrupts:
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        start = time.monotonic()
        with pytest.raises(Interrupted), interrupts.abandonable():
            sleep_in_python()
        assert interrupts.exit_status == 143
    assert time.monotonic() - start < 3


def test_a_signal_where_nothing_may_be_abandoned_is_remembered():
    with InterruptHandler("", 0.0) as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        assert interrupts.reason(0.0) == "Ctrl-C"
        with pytest.raises(Interrupted), interrupts.abandonable():
            pytest.fail("not reached")


def test_a_reward_that_waits_is_left_at_once_and_may_not_catch_that(model, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time, os, signal, threading\n"
        "calls = 0\n"
        "def f(prompts, **c):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 3:\n"
        "        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()\n"
        "        time.sleep(60)\n"
        "    return [1.0] * len(prompts)\n",
        encoding="utf-8",
    )
    start = time.monotonic()
    result = launch(model, tmp_path / "run", reward=f"{tmp_path / 'mine.py'}:f=1")
    assert result.exit_code == 143, result.output
    assert time.monotonic() - start < 30


HANGS = """
import asyncio, re, time
calls = 0

def hangs_now():
    global calls
    calls += 1
    return calls >= AT

def sleeps(completions, **columns):
    if hangs_now():
        try:
            time.sleep(60)
        except:
            time.sleep(60)
    return [float(len(c[0]["content"])) for c in completions]

def matches(completions, **columns):  # holds Python's global lock
    if hangs_now():
        re.match("(a*)*b", "a" * 60)
    return [float(len(c[0]["content"])) for c in completions]

async def waits(completions, **columns):
    if hangs_now():
        await asyncio.sleep(60)
    return [float(len(c[0]["content"])) for c in completions]

def judge(given, answer, **columns):
    if hangs_now():
        time.sleep(60)
    return given == int(answer)
"""


@pytest.fixture
def hangs(tmp_path, monkeypatch):
    """Write functions that do not return; return a function that makes the file, given the call that hangs."""
    monkeypatch.setattr(watch, "FIRST_LINE_SECONDS", 0.3)
    monkeypatch.setattr(watch, "CHECK_SECONDS", 0.1)

    def write(at):
        (tmp_path / "mine.py").write_text(HANGS.replace("AT", str(at)), encoding="utf-8")
        return tmp_path / "mine.py"

    return write


@pytest.fixture(scope="module")
def by_length(model, tmp_path_factory):
    """Run undisturbed with the reward that the functions of HANGS give; return the folder."""
    folder = tmp_path_factory.mktemp("by length")
    (folder / "mine.py").write_text(HANGS.replace("AT", str(10**9)), encoding="utf-8")
    assert launch(model, folder / "run", reward=f"{folder / 'mine.py'}:sleeps=1").exit_code == 0
    return folder / "run"


@pytest.mark.parametrize("name", ["sleeps", "matches", "waits"])
def test_a_reward_that_does_not_return_is_named_and_ended_by_the_time_limit(name, hangs, model, by_length, tmp_path):
    run, start = tmp_path / "run", time.monotonic()
    reward = f"{hangs(5)}:{name}=1"
    result = launch(model, run, reward=reward, time_limit="3s", save_every=1000)
    assert time.monotonic() - start < 15
    assert result.exit_code == 0, result.output
    named = f"Waiting for reward function '{name}' of '{tmp_path / 'mine.py'}'"
    assert f"{named}: it has not returned for 0 s" in result.stderr
    record = load_metrics(run)
    assert record["finished"]["reason"] == "the time limit"
    done = record["finished"]["step"]
    assert 1 <= done == len(record["steps"]) < 6
    assert (run / f"checkpoints/step-{done:08}").is_dir()
    # Nothing is lost: once the function returns, the same command goes on to the weights of an undisturbed run.
    hangs(10**9)
    assert launch(model, run, reward=reward, accept_changed_files=True).exit_code == 0
    weights = "checkpoints/step-00000006/policy.safetensors"
    assert (run / weights).read_bytes() == (by_length / weights).read_bytes()


def test_the_time_limit_ends_the_trial_of_a_reward_that_does_not_return(hangs, model, tmp_path):
    start = time.monotonic()
    result = launch(model, tmp_path / "run", reward=f"{hangs(1)}:matches=1", time_limit="2s")
    assert time.monotonic() - start < 9
    assert result.exit_code == 1
    assert "Waiting for reward function 'matches'" in result.stderr
    assert "it had not returned when the time limit was reached" in " ".join(result.stderr.split())


def test_a_judge_that_does_not_return_is_named_and_ended_by_the_time_limit(hangs, capsys):
    judge = Judge.load(f"{hangs(1)}:judge")
    with InterruptHandler("1s", time.monotonic()) as interrupts:
        with pytest.raises(Interrupted), interrupts.abandonable():
            judge(Problem("What is 1 + 2?", "3"), 3)
        assert interrupts.name == "the time limit"
    assert "Waiting for --correct 'judge' of '" in capsys.readouterr().err


def test_a_launch_says_something_and_is_quiet_when_it_is_stopped_at_once(tmp_path):
    command = [sys.executable, str(ROOT / "train_grpo.py"), "--output-dir", str(tmp_path / "run")]
    start = time.monotonic()
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, earlier)
    line = process.stderr.readline()
    assert line == "Loading starter\n"
    assert time.monotonic() - start < 2  # half a second on a machine with nothing else to do
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (out, err) == ("", "")
    assert process.returncode in (130, -signal.SIGINT)


def last_is_best(monkeypatch, seconds=0.0):
    """Make each validation better than the one before it, and take a while."""
    true, accuracy = Evaluation.to_dict, iter(range(1, 10**6))

    def to_dict(self):
        time.sleep(seconds)
        return {**true(self), "accuracy": next(accuracy) / 10**6}

    monkeypatch.setattr(Evaluation, "to_dict", to_dict)


def test_a_run_that_ends_by_its_time_measures_what_it_has_trained_since_its_last_evaluation(
    model, tmp_path, monkeypatch
):
    last_is_best(monkeypatch)
    true = InterruptHandler.reason
    monkeypatch.setattr(
        InterruptHandler,
        "reason",
        lambda self, needed: "the time limit" if len(steps) == 3 else true(self, needed),
    )
    steps, step = [], GRPO.step
    monkeypatch.setattr(GRPO, "step", lambda self, number: (steps.append(number), step(self, number))[1])
    assert launch(model, tmp_path / "run", eval_every=1000).exit_code == 0
    record = load_metrics(tmp_path / "run")
    assert [e["step"] for e in record["evals"] if e["split"] == "validation"] == [0, 3]
    assert record["evals"][-1] == {
        **record["evals"][-1],
        "split": "test",
        "step": 3,
    }  # of the saved policy
    card = json.loads((tmp_path / "run/saved_model/grpo.json").read_text(encoding="utf-8"))
    assert card["step"] == 3


def test_time_for_a_last_validation_and_a_last_test_is_kept(model, tmp_path, monkeypatch):
    left = []
    last_is_best(monkeypatch, seconds=0.3)
    monkeypatch.setattr(InterruptHandler, "reason", lambda self, needed: left.append(needed))
    launch(model, tmp_path / "run", num_iterations=2)
    assert all(needed > 1.5 * (0.3 + 0.3) for needed in left)
    assert left


def test_a_reward_that_is_mended_before_the_first_update_goes_on_and_later_it_is_refused(
    model, tmp_path, monkeypatch
):
    mine, folder = tmp_path / "mine.py", tmp_path / "run"
    body = "def f(prompts, **c):\n    return [float(len(x[0]['content']) % 2) for x in c['completions']]\n"
    mine.write_text("def f(prompts, **c):\n    return [1.0] * len(prompts)\n", encoding="utf-8")

    def stop(*_):
        raise ValueError("stopped by the test")

    with monkeypatch.context() as patch:
        patch.setattr("grpo.algorithm.grpo.GRPO.step", stop)
        stopped = launch(model, folder, reward=f"{mine}:f=1")
    assert stopped.exit_code == 1
    assert "stopped by the test" in stopped.stderr
    mine.write_text(body, encoding="utf-8")
    mended = launch(model, folder, reward=f"{mine}:f=1")
    assert mended.exit_code == 0, mended.output
    assert "mine.py changed before the first update" in mended.stdout
    assert launch(model, tmp_path / "other", reward=f"{mine}:f=1").exit_code == 0
    assert fingerprint(folder) == fingerprint(tmp_path / "other")
    mine.write_text(body + "\n", encoding="utf-8")
    refused = launch(model, folder, reward=f"{mine}:f=1", num_iterations=8)
    assert refused.exit_code == 1
    assert "mine.py changed since the run" in refused.stderr


# --- folders and disks ---


@pytest.mark.parametrize(("name", "at"), [("run", 3), ("run/saved_model", 6)])
def test_a_folder_that_is_deleted_during_a_run_is_said_in_words(name, at, model, tmp_path, monkeypatch):
    true = GRPO.step

    def step(self, number):
        if number == at:
            shutil.rmtree(tmp_path / name)
        return true(self, number)

    monkeypatch.setattr(GRPO, "step", step)
    result = launch(model, tmp_path / "run")
    assert result.exit_code == 1
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert f"{tmp_path / name} was deleted or moved during the run" in line
    assert "Traceback" not in result.output


def test_a_signal_while_a_finished_run_is_drawn_again_has_its_exit_status(model, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    kill_at(monkeypatch, trainer.Trainer, "_draw", 1)
    # The thread that prints this line may only run after the run has ended.
    monkeypatch.setattr(interrupts, "for_terminal", lambda text: time.sleep(0.5) or text)
    result = launch(model, tmp_path / "run")
    assert "SIGTERM: stopping" in result.stderr
    assert result.exit_code == 143


def test_a_disk_without_room_for_the_run_is_said_before_the_first_step(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    result = launch(model, tmp_path / "run")
    assert result.exit_code == 1
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "two checkpoints and the model" in line
    assert "MB are free" in line


def test_a_disk_that_fills_up_keeps_the_newest_checkpoint_and_says_what_is_lost(model, tmp_path, monkeypatch):
    true = shutil.disk_usage
    steps, step = [0], GRPO.step
    monkeypatch.setattr(GRPO, "step", lambda self, number: (steps.append(number), step(self, number))[1])
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: true(path) if steps[-1] < 5 else shutil._ntuple_diskusage(10**9, 10**9, 1000),
    )
    result = launch(model, tmp_path / "run")
    assert result.exit_code == 1
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "the checkpoint of step 4 is kept" in line
    assert "up to step 6" in line
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000004"]
    monkeypatch.undo()
    assert launch(model, tmp_path / "run").exit_code == 0


# --- a hundred signals ---

LONG = {"num_iterations": 4, "batch_size": 4, "num_inner_updates": 50, "eval_every": 1, "eval_problems": 500}
LONG |= {"max_new_tokens": 22, "min_operand": 0, "max_operand": 10, "save_every": 2}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(4))
def test_a_hundred_signals_stop_soon_and_lose_nothing(seed, tmp_path):
    def started(folder):
        command = [sys.executable, str(ROOT / "train_grpo.py"), *options(output_dir=folder, model="starter", **LONG)]
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    start = time.monotonic()
    started(tmp_path / "whole").communicate()
    whole_seconds, reference = time.monotonic() - start, fingerprint(tmp_path / "whole")
    steps = json.loads((tmp_path / "whole/grpo_metrics.json").read_text(encoding="utf-8"))["steps"]
    passes = [max(row["time/sample"], row["time/update"] / LONG["num_inner_updates"]) for row in steps]
    rng, seconds, number = random.Random(seed), [], 0
    while len(seconds) < 25:
        folder = tmp_path / f"run-{number}"
        number += 1
        for _ in range(5):
            process = started(folder)
            try:
                process.communicate(timeout=rng.uniform(5, whole_seconds))
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                start = time.monotonic()
                _, err = process.communicate(timeout=60)
                seconds.append(time.monotonic() - start)
                assert process.returncode in (143, -15), err
                assert "Traceback" not in err
        else:
            process = started(folder)
            _, err = process.communicate()
        assert process.returncode == 0, err
        assert fingerprint(folder) == reference
        shutil.rmtree(folder)
    seconds.sort()
    print(f"longest pass {max(passes):.2f} s, until it stopped:", *(f"{passed:.2f}" for passed in seconds))
    assert seconds[-1] < max(passes) + 2
