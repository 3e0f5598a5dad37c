"""What a run writes down besides its metrics: samples, where the time went, trackers, the table in the terminal."""

import json
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import train_grpo
from grpo import console, report
from grpo.files import SAMPLES
from grpo.memory import peak_memory
from grpo.samples import EVERY, GROUPS, Samples
from grpo.timing import seconds_by_phase, tokens_per_second
from grpo.track import Tracker
from tasks.base import Problem, Reward
from tasks.rewards import REWARDS
from tests.runs import a_tiny_model, options

ODD = "a\ud800\x1b[2J</script>\u2028\n"


def a_rollout(groups=3, per_group=2, completion=ODD):
    """As much of a rollout as a reader of completions looks at."""
    rows = groups * per_group
    reward = Reward(0.4, {"format": 0.2, "close": 0.2, "mine": None}, correct=False, well_formed=True)
    return SimpleNamespace(
        problems=[Problem(f"What is {i}?", "1") for i in range(groups)],
        completions=[completion] * rows,
        rewards=[reward] * rows,
        advantages=torch.arange(rows) / 2,
    )


def test_samples_are_whole_lines_of_some_groups_every_few_steps(tmp_path):
    samples = Samples(tmp_path)
    for step in range(1, 2 * EVERY + 1):
        samples.add(step, a_rollout())
    lines = [json.loads(line) for line in (tmp_path / SAMPLES).read_text(encoding="utf-8").split("\n")[:-1]]
    assert [line["step"] for line in lines] == [step for step in (1, EVERY, 2 * EVERY) for _ in range(GROUPS * 2)]
    assert lines[3] == {
        "step": 1,
        "prompt": "What is 1?",
        "completion": ODD,
        "rewards": {"format": 0.2, "close": 0.2, "mine": None},
        "reward": 0.4,
        "advantage": 1.5,
        "correct": False,
    }


def test_samples_are_cut_back_to_a_step_and_half_a_line_is_forgotten(tmp_path):
    samples, path = Samples(tmp_path), tmp_path / SAMPLES
    samples.cut(3)  # nothing there: nothing to do
    samples.add(1, a_rollout())
    first = path.read_bytes()
    samples.add(EVERY, a_rollout())
    path.write_bytes(path.read_bytes() + b'not json\n[1]\n{"step": 1, "prom')
    samples.cut(EVERY)
    assert len(path.read_bytes().splitlines()) == 2 * GROUPS * 2
    samples.cut(EVERY - 1)
    assert path.read_bytes() == first


def test_the_time_of_a_run_by_hand():
    record = {
        "steps": [
            {
                "time/sample": 1.0,
                "time/reward": 9.0,
                "time/reward/mine": 2.0,
                "time/reference": 0.5,
                "time/update": 3.0,
            }
            | {"time/total": 8.0, "tokens": 100},
            {"time/sample": 1.5, "time/update": 3.0, "time/save": 0.25, "time/total": 2.0, "tokens": 300},
        ],
        "evals": [{"time/evaluate": 4.0}, {}],
    }
    phases = {"sampling": 2.5, "reference": 0.5, "update": 6.0, "reward mine": 2.0, "evaluation": 4.0, "saving": 0.25}
    assert seconds_by_phase(record) == phases
    assert tokens_per_second(record) == pytest.approx(40)


def test_peak_memory_is_that_of_this_process():
    assert 50 * 2**20 < peak_memory(torch.device("cpu")) < 2**40


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_every_step_and_evaluation_and_is_closed(name, tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType(name)
    fake.init = lambda **more: calls.append(("init", more))
    fake.log = lambda numbers, step: calls.append(("log", step, numbers))
    fake.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, fake)
    a_tiny_model(tmp_path / "model")
    args = options(model=tmp_path / "model", output_dir=tmp_path / "run", num_iterations=2, track=name)
    result = CliRunner().invoke(train_grpo.main, args)
    assert result.exit_code == 0, result.output
    assert calls[0][1]["name"] == "run"
    assert calls[0][1]["config"]["num_iterations"] == 2
    assert calls[-1] == ("finish",)
    logged = [(step, set(numbers)) for kind, step, numbers in calls[1:-1]]
    assert [step for step, names in logged if "reward_mean" in names] == [1, 2]
    assert [step for step, names in logged if "validation/accuracy" in names] == [0, 2]
    assert [step for step, names in logged if "test/accuracy" in names] == [0, 2]
    assert [step for step, _ in logged] == sorted(step for step, _ in logged), "a tracker may drop what goes back"
    assert all(isinstance(value, int | float) for call in calls[1:-1] for value in call[2].values())


def test_a_tracker_is_closed_after_an_error_and_not_opened_by_a_run_that_is_finished(tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType("wandb")
    fake.init, fake.log = (lambda **more: calls.append("init")), (lambda numbers, step: None)
    fake.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    a_tiny_model(tmp_path / "model")
    args = options(model=tmp_path / "model", output_dir=tmp_path / "run", num_iterations=1, track="wandb")
    with monkeypatch.context() as patch:
        patch.setitem(REWARDS, "close", lambda attempt: float("nan"))
        assert CliRunner().invoke(train_grpo.main, args).exit_code == 1
    assert calls == ["init", "finish"]
    for _ in range(2):
        assert CliRunner().invoke(train_grpo.main, args).exit_code == 0
    assert calls == ["init", "finish"] * 2, "the second launch only says that the run is finished"


def test_no_tracker_does_nothing_and_a_missing_one_is_named(tmp_path, monkeypatch):
    tracker = Tracker("none")
    with tracker.tracking(tmp_path, {}):
        tracker.log(1, {"step": 1, "kl": 0.5})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        Tracker("wandb")


@pytest.mark.parametrize("columns", [40, 60, 100, 200])
def test_the_table_of_completions_fits_the_terminal_and_moves_no_cursor(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    report.show_completions(7, a_rollout(completion="x" * 300 + ODD))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
    assert all(len(line) <= columns for line in lines)


def test_colours_are_for_terminals_only_and_never_with_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert console.paint("right", "green") == "right"
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    assert console.paint("right", "green") == "\x1b[32mright\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.paint("right", "green") == "right"


def test_no_minus_stands_before_a_zero():
    assert [report.nats(value) for value in (-0.0004, 0.0, 0.0096, -0.0021)] == ["0.000", "0.000", "0.010", "-0.002"]
