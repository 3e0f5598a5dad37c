"""Experiment trackers: a run sends every step and evaluation, and closes the tracker however it ends."""

import sys
import types

import pytest

from grpo.record.tracker import Tracker
from tasks.rewards.functions import REWARDS
from tests.helpers.malformed import train

pytestmark = pytest.mark.usefixtures("quick_runs")


def install(name, monkeypatch):
    """Install a fake tracker; return the list to which it adds its calls."""
    calls = []
    fake = types.ModuleType(name)
    fake.init = lambda **more: calls.append(("init", more))
    fake.log = lambda numbers, step: calls.append(("log", step, numbers))
    fake.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, fake)
    return calls


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_every_step_and_evaluation_and_is_closed(name, model, tmp_path, monkeypatch):
    calls = install(name, monkeypatch)
    result = train(model, tmp_path / "run", num_iterations=2, track=name)
    assert result.exit_code == 0, result.output
    assert calls[0][1]["name"] == "run"
    assert calls[0][1]["config"]["num_iterations"] == 2
    assert calls[-1] == ("finish",)
    logged = [(step, set(numbers)) for kind, step, numbers in calls[1:-1]]
    assert [step for step, names in logged if "reward_mean" in names] == [1, 2]
    assert [step for step, names in logged if "validation/accuracy" in names] == [0, 2]
    assert [step for step, names in logged if "test/accuracy" in names] == [0, 2]
    assert [step for step, _ in logged] == sorted(step for step, _ in logged), (
        "a tracker may drop a step that goes back"
    )
    assert all(isinstance(value, int | float) for call in calls[1:-1] for value in call[2].values())


def test_a_tracker_is_closed_after_an_error_and_not_opened_by_a_run_that_is_finished(model, tmp_path, monkeypatch):
    calls = install("wandb", monkeypatch)

    def opened_and_closed():
        return [call[0] for call in calls if call[0] != "log"]

    with monkeypatch.context() as patch:
        good = iter([0.0] * 12)  # The reward function is tried before the run; it fails later.
        patch.setitem(REWARDS, "close", lambda attempt: next(good, float("nan")))
        assert train(model, tmp_path / "run", num_iterations=1, track="wandb").exit_code == 1
    assert opened_and_closed() == ["init", "finish"]
    for _ in range(2):
        assert train(model, tmp_path / "run", num_iterations=1, track="wandb").exit_code == 0
    assert opened_and_closed() == ["init", "finish"] * 2, "the second launch only says that the run is finished"


def test_no_tracker_does_nothing_and_a_missing_one_is_named(tmp_path, monkeypatch):
    tracker = Tracker("none")
    with tracker.tracking(tmp_path, {}):
        tracker.log(1, {"step": 1, "kl": 0.5})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        Tracker("wandb")
