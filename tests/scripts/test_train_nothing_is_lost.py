"""A run never overwrites or loses another: --fresh, Ctrl-C, kills, bad rewards."""

import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import inference
import train_grpo
from grpo.algorithm.grpo import GRPO
from grpo.evaluation.evaluator import Evaluator
from grpo.launch.run_folder import EARLIER, WRITTEN
from grpo.model.loading import load
from grpo.model.saving import save
from grpo.record.metrics import load_metrics
from tasks.rewards.functions import REWARDS
from tests.helpers.scripts import (
    EVERYTHING,
    QUESTION,
    TINY,
    ask,
    invoke,
    names_in,
    refusal,
    snapshot,
    train,
    without_times,
)


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - {"checkpoints"}))
def test_a_folder_that_holds_a_part_of_a_run_and_no_checkpoint_is_refused(name, copy_of_run):
    for other in set(WRITTEN) - {name}:
        path = copy_of_run / other
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = snapshot(copy_of_run)
    line = refusal(invoke(train_grpo.main, *TINY, folder=copy_of_run))
    assert name in line
    assert "--fresh" in line
    assert "--output-dir" in line
    assert snapshot(copy_of_run) == before


def test_fresh_moves_the_earlier_runs_aside_untouched(copy_of_run):
    (copy_of_run / "notes.txt").write_text("of the user", encoding="utf-8")
    first = snapshot(copy_of_run)
    train("--fresh", "--seed", 1, folder=copy_of_run)
    second = snapshot(copy_of_run)
    train("--fresh", "--seed", 2, folder=copy_of_run)
    third = snapshot(copy_of_run)
    for name in first:
        if name != "notes.txt":
            assert third[f"{EARLIER}/1/{name}"] == first[name]
            assert third[f"{EARLIER}/2/{name}"] == second[name]
    assert third["notes.txt"] == b"of the user"
    seeds = [load_metrics(folder)["config"]["seed"] for folder in (copy_of_run / EARLIER / "1", copy_of_run)]
    assert seeds == [0, 2]


@pytest.mark.parametrize(
    "args",
    [
        *(["--model", "saved_model"], ["--model", "./saved_model"], ["--model", "no/such-model"]),
        *(["--device", "tpu"], ["--num-generations", 1], ["--max-operand", 0]),
    ],
    ids=str,
)
def test_fresh_with_a_mistake_in_the_call_loses_nothing(args, copy_of_run):
    before = snapshot(copy_of_run)
    refusal(invoke(train_grpo.main, *TINY, "--fresh", *args, folder=copy_of_run))
    after = snapshot(copy_of_run)
    moved = {f"{EARLIER}/1/{name}": content for name, content in before.items()}
    assert after in (before, moved)


def test_fresh_that_cannot_move_anything_aside_leaves_all_in_place(copy_of_run):
    (copy_of_run / EARLIER).write_text("a file of the user", encoding="utf-8")
    before = snapshot(copy_of_run)
    assert EARLIER in refusal(invoke(train_grpo.main, *TINY, "--fresh", folder=copy_of_run))
    assert snapshot(copy_of_run) == before


def test_a_run_killed_while_it_replaced_its_model_loses_neither(copy_of_run, monkeypatch):
    # `save` moves the old folder out of the way and the new one in: two renames, and a kill may fall between them.
    class Killed(BaseException):
        """Stand in for SIGKILL: nothing catches this exception."""

    true_rename = Path.rename

    def rename(self, target):
        if Path(target).name == "saved_model":
            raise Killed
        return true_rename(self, target)

    weights = (copy_of_run / "saved_model/model.safetensors").read_bytes()
    lm = load("starter", torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            save(copy_of_run / "saved_model", lm, {}, "")
    assert any(content == weights for content in snapshot(copy_of_run).values())
    train("--fresh", "--seed", 3, folder=copy_of_run)
    assert any(content == weights for content in snapshot(copy_of_run / EARLIER).values())


def test_ctrl_c_leaves_the_best_policy_whole_metrics_and_plots(tmp_path, monkeypatch):
    true_step = GRPO.step

    def interrupted(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return true_step(self, step)

    monkeypatch.setattr(GRPO, "step", interrupted)
    result = invoke(train_grpo.main, *TINY, "--num-iterations", 9, folder=tmp_path)
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert names_in(tmp_path) == EVERYTHING
    assert [row["step"] for row in load_metrics(tmp_path)["steps"]] == [1, 2]
    assert len(ask(QUESTION, folder=tmp_path)) == 2


def test_ctrl_c_before_the_first_step_is_no_traceback(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluator, "evaluate", interrupted)
    result = invoke(train_grpo.main, *TINY, folder=tmp_path)
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    monkeypatch.setattr(inference, "complete", interrupted)
    result = invoke(inference.main, QUESTION, folder=tmp_path)
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_a_run_that_only_makes_nan_ends_with_an_explanation_and_a_good_model(tmp_path):
    result = invoke(train_grpo.main, *TINY, "--num-iterations", 20, "--learning-rate", 1e30, folder=tmp_path)
    assert result.exit_code == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "learning-rate" in result.stderr
    weights = load_file(tmp_path / "saved_model/model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert load_metrics(tmp_path)["steps"][-1]["skipped_updates"] > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_a_finite_number_ends_the_run_and_names_the_function(bad, tmp_path, monkeypatch):
    good = iter([0.0] * 12)  # the rewards while the function is tried out
    monkeypatch.setitem(REWARDS, "close", lambda attempt: next(good, bad))
    result = invoke(train_grpo.main, *TINY, folder=tmp_path)
    assert result.exit_code == 1
    [error] = [line for line in result.stderr.splitlines() if not line.startswith("step ")]
    assert error.startswith("Error: reward function 'close' gave ")
    assert load_metrics(tmp_path)["steps"] == []


def test_deterministic_changes_nothing_on_the_cpu(run, tmp_path):
    train("--deterministic", folder=tmp_path)
    assert torch.are_deterministic_algorithms_enabled()
    assert without_times(load_metrics(tmp_path)["steps"]) == without_times(load_metrics(run[0])["steps"])
    train(folder=tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()
