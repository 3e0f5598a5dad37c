"""Experiment trackers: a run sends every step and evaluation, and closes the tracker however it ends."""

import json
import sys
import types

import pytest
from click.testing import CliRunner

import train_grpo
from grpo.record.tracker import Tracker
from tasks.rewards.functions import REWARDS
from tests.helpers.malformed import train
from tests.helpers.runs import options


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


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning_and_training_goes_on(failing, model, tmp_path, monkeypatch):
    def fail(*_, **__):
        calls.append(("failed",))
        raise ConnectionError("the tracker\nis gone")

    calls = install("wandb", monkeypatch)
    monkeypatch.setattr(sys.modules["wandb"], failing, fail)
    result = train(model, tmp_path / "run", num_iterations=3, track="wandb")
    assert result.exit_code == 0, result.output
    warning = "Warning: wandb failed (ConnectionError: the tracker); training goes on without it"
    assert result.stderr.count("Warning") == result.stderr.count(warning) == 1
    assert calls.count(("failed",)) == 1


def inits(calls):
    return [more for kind, *rest in calls if kind == "init" for more in rest]


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_run_that_continues_is_the_same_run_in_the_tracker_and_a_fresh_one_is_not(
    name, model, tmp_path, monkeypatch
):
    calls = install(name, monkeypatch)
    same = "id" if name == "wandb" else "name"
    for iterations in (1, 2):
        assert train(model, tmp_path / "run", num_iterations=iterations, track=name).exit_code == 0
    first, second = inits(calls)
    assert first[same] == second[same]
    assert (first["resume"], second["resume"]) == ("allow" if name == "wandb" else "never", "allow")
    arguments = options(model=model, output_dir=tmp_path / "run", num_iterations=1, track=name)
    assert CliRunner().invoke(train_grpo.main, [*arguments, "--fresh"]).exit_code == 0
    third = inits(calls)[2]
    assert third["resume"] == first["resume"]
    assert name == "trackio" or third["id"] != first["id"]


def test_a_name_that_trackio_changed_is_kept(tmp_path, monkeypatch):
    calls = install("trackio", monkeypatch)
    named, init = types.SimpleNamespace(name="calm-river-3"), sys.modules["trackio"].init
    monkeypatch.setattr(sys.modules["trackio"], "init", lambda **more: init(**more) or named)
    for last_step in (None, 4, None):
        with Tracker("trackio").tracking(tmp_path, {}, last_step):
            pass
    assert [more["name"] for more in inits(calls)] == [tmp_path.name, "calm-river-3", tmp_path.name]


def test_tensorboard_gets_every_number_at_its_step(model, tmp_path, monkeypatch):
    class Writer:
        def __init__(self, folder, purge_step):
            written.append(("open", folder, purge_step))

        def add_text(self, tag, text):
            assert json.loads(text)["track"] == "tensorboard"

        def add_scalar(self, tag, value, step):
            written.append((tag, value, step))

        def close(self):
            written.append(("close",))

    written = []
    package = types.ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    for iterations in (1, 2):
        result = train(model, tmp_path / "run", num_iterations=iterations, track="tensorboard")
        assert result.exit_code == 0, result.output
    place = str(tmp_path / "run/tensorboard")
    assert [row for row in written if len(row) == 1 or row[0] == "open"] == [
        ("open", place, 0),
        ("close",),
        ("open", place, 2),
        ("close",),
    ]
    assert [row[2] for row in written if row[0] == "reward_mean"] == [1, 2]


def test_no_tracker_does_nothing_and_a_missing_one_is_named(tmp_path, monkeypatch):
    tracker = Tracker("none")
    with tracker.tracking(tmp_path, {}):
        tracker.log(1, {"step": 1, "kl": 0.5})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        Tracker("wandb")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        Tracker("tensorboard")
