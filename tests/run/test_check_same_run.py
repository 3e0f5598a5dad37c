"""What a run may continue with: every setting, changed alone, and checkpoints that earlier versions wrote."""

import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import train_grpo
from grpo.config import CHANGEABLE_ON_RESUME, TrainConfig
from grpo.model_card import resolve
from grpo.record.checkpoint import FORMAT, newest_checkpoint, write_checkpoint
from grpo.record.metrics import load_metrics, same_rows, without_times
from grpo.record.tracker import Tracker
from grpo.setting import as_typed
from tasks.common.prompts import FIRST_WORDING
from tests.fixtures.make import HERE, NAME
from tests.helpers.runs import SETTINGS, a_tiny_model, forked, options
from tests.helpers.scripts import snapshot

# These settings change the order in which numbers are summed, so only the last digits of a result.
BITS = {"device", "micro_batch_size", "deterministic", "gradient_checkpointing"}


@pytest.fixture(scope="module", autouse=True)
def _contained():
    """Keep trackers out, and undo what a run sets for the whole process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "__init__", lambda self, *_: setattr(self, "package", None))
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Run two steps; the model is beside the run."""
    folder = tmp_path_factory.mktemp("half")
    a_tiny_model(folder / "model")
    train(folder, num_iterations=2)
    return folder


@pytest.fixture(scope="module")
def whole(half, tmp_path_factory):
    """Continue a copy of the run of two steps with a third step."""
    folder = Path(shutil.copytree(half, tmp_path_factory.mktemp("whole") / "copy"))
    assert train(folder, model=half / "model", num_iterations=3).exit_code == 0
    return folder / "run"


def train(folder, **settings):
    """Run in a folder with its model, or continue the run in it."""
    return CliRunner().invoke(
        train_grpo.main, options(**{"model": folder / "model", "output_dir": folder / "run", **settings})
    )


def another(field, folder):
    """Return a valid value of a setting that differs from the value in the run."""
    now = SETTINGS.get(field.name, field.default)
    special = {"time_limit": "1h", "device": "auto", "model": folder / "other", "output_dir": folder / "elsewhere"}
    special |= {"group_schedule": "8:4", "num_iterations": 4, "target_accuracy": 1.0, "patience": 9}
    special |= {"lora_targets": "q_proj", "task": "reverse", "system_prompt": "Answer.", "reward": "exact=1"}
    special |= {"task_arg": "largest=3", "chat_template_arg": "message=1"}
    special |= {"data": folder / "unused.jsonl", "correct": folder / "unused.py:judge", "columns": "question=problem"}
    special |= {"validation_data": folder / "unused.csv", "test_data": folder / "unused.csv"}
    if field.name in special:
        return special[field.name]
    if field.metadata["choices"]:
        return next(value for value in field.metadata["choices"] if value != now)
    if field.type is bool:
        return not now
    assert field.type in (int, float), f"{field.name} is new: give it another value here"
    return now + 1 if field.type is int else now / 2 + 0.125


@pytest.mark.parametrize("field", fields(TrainConfig), ids=lambda field: field.name)
def test_a_run_continues_with_a_changed_setting_or_names_and_refuses_it(field, half, whole, tmp_path):
    folder = Path(shutil.copytree(half, tmp_path / "copy"))
    value = another(field, folder)
    if field.name == "model":
        shutil.copytree(folder / "model", value)
    if field.name == "output_dir":
        (folder / "run").rename(value)
    before = snapshot(folder)
    of_another_task = ("data", "validation_data", "test_data", "columns", "correct")
    if field.name in of_another_task:  # refused before anything else
        refused = train(folder, **{"model": half / "model", field.name: value})
        assert refused.exit_code == 1
        assert as_typed(field.name) in refused.stderr
        assert snapshot(folder) == before
        return
    result = train(folder, **{"model": half / "model", "num_iterations": 3, field.name: value})
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    if field.name == "task_arg":  # only a task in a file takes it
        assert result.exit_code == 2
        assert "--task-arg needs one --task" in result.stderr
        return
    if field.name == "load_in_4bit":  # needs an adapter, so it cannot be changed alone
        assert result.exit_code == 2
        assert "--lora-rank" in result.stderr
        return
    if field.name == "shard":  # needs several processes: tested in tests/runtime
        assert result.exit_code == 1
        assert "torchrun" in result.stderr
        return
    if field.name not in CHANGEABLE_ON_RESUME:
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        assert f"{as_typed(field.name)} {before_as_text(field, half)} (now {value})" in result.stderr
        named = set(re.findall(r"--([\w-]+) [^,:]* \(now ", result.stderr))
        only = as_typed(field.name)[2:]
        assert named - {"num-iterations"} == {only}, "no other, except the length where it decides something"
        assert "--fresh" in result.stderr
        assert snapshot(folder) == before
        return
    assert result.exit_code == 0, result.output
    run = value if field.name == "output_dir" else folder / "run"
    record = load_metrics(run)
    last = value if field.name == "num_iterations" else 3
    assert [row["step"] for row in record["steps"]] == list(range(1, last + 1))
    assert record["finished"]["step"] == last
    assert newest_checkpoint(run)[0].step == last
    if field.name not in BITS:
        for mine, theirs in zip(record["steps"], load_metrics(whole)["steps"], strict=False):
            assert without_times(mine) == without_times(theirs)


def before_as_text(field, half):
    value = {**SETTINGS, "model": half / "model"}.get(field.name, field.default)
    return "none" if value in ("", ()) else " ".join(value) if isinstance(value, tuple) else str(value)


def test_the_settings_that_may_change_are_settings():
    assert set(CHANGEABLE_ON_RESUME) <= {field.name for field in fields(TrainConfig)}


# --- checkpoints of earlier versions ---


def of_an_older_version(half, folder, **entries):
    """Return a copy of a run whose checkpoint has the `state` and `config` of an older version's curriculum."""
    folder = Path(shutil.copytree(half, folder))
    checkpoint, _ = newest_checkpoint(folder / "run")
    shutil.rmtree(folder / "run/checkpoints")
    state = {**checkpoint.state, "curriculum": entries["state"]}
    state["config"] = {**state["config"], "curriculum": entries["config"]}
    write_checkpoint(folder / "run", replace(checkpoint, state=state))
    return folder


def test_a_run_of_a_version_with_a_curriculum_continues_where_it_was_off(half, whole, tmp_path):
    folder = of_an_older_version(half, tmp_path / "copy", state=None, config=False)
    result = train(folder, model=half / "model", num_iterations=3)
    assert result.exit_code == 0, result.output
    for mine, theirs in zip(load_metrics(folder / "run")["steps"], load_metrics(whole)["steps"], strict=True):
        assert without_times(mine) == without_times(theirs)


def test_a_run_with_a_curriculum_is_refused_in_one_line(half, tmp_path):
    folder = of_an_older_version(half, tmp_path / "copy", state={"+- to 3": [2.5, 1]}, config=True)
    before = snapshot(folder)
    refused = train(folder, model=half / "model", num_iterations=3)
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    assert "holds a run with --curriculum, which this version no longer has; --fresh" in refused.stderr
    assert snapshot(folder) == before


@pytest.mark.parametrize("value", [False, True])
def test_a_model_saved_by_a_version_with_a_curriculum_is_trained_further(value, half, tmp_path):
    model = Path(shutil.copytree(half / "run/saved_model", tmp_path / "model"))
    card = json.loads((model / "grpo.json").read_text(encoding="utf-8"))
    card["settings"]["curriculum"] = value
    (model / "grpo.json").write_text(json.dumps(card), encoding="utf-8")
    assert resolve({"model": str(model)}).num_generations == card["settings"]["num_generations"]


@pytest.mark.parametrize("version", range(1, FORMAT + 1))
def test_a_kept_checkpoint_is_continued_or_refused_with_a_reason(version, tmp_path):
    kept = HERE / NAME.format(version)
    assert kept.is_dir(), "python -m tests.fixtures.make, once for each format"
    assert sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) < 300_000
    folder = Path(shutil.copytree(kept, tmp_path / "copy"))
    state = json.loads((folder / "run/checkpoints/step-00000002/state.json").read_text(encoding="utf-8"))
    names = {field.name for field in fields(TrainConfig)}
    settings = {name: value for name, value in state["config"].items() if name in names and value not in ("", [])}
    settings |= {"num_iterations": 3, "prompt_wording": state["config"].get("prompt_wording", FIRST_WORDING)}
    result = forked(train_grpo.main, options(**settings), folder=folder)
    if version != FORMAT and result[0]:
        assert f"format {version}" in result[2] + result[1]
        return
    assert result[0] == 0, result
    assert "Warning" not in result[1]
    assert "checkpoint of step 2" in result[1]
    before, after = load_metrics(kept / "run"), load_metrics(folder / "run")
    assert same_rows(after["steps"][:2], before["steps"])
    assert [row["step"] for row in after["steps"]] == [1, 2, 3]
    checkpoint, problems = newest_checkpoint(folder / "run")
    assert problems == []
    assert checkpoint.step == 3
