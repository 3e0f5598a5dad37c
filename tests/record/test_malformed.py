"""Files that this program did not write like this: refused in one line that names the file, or set aside.

The files are a model's card (grpo.json), the metrics of a run, and both JSON files and both tensor files of a
checkpoint. The tests correct the SHA-256 sums of a checkpoint after a change; test_checkpoint.py tests wrong sums.
"""

import io
import json
import math
import shutil
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import inference
import plot_metrics
from grpo.model.saving import SAVED_MODEL
from grpo.model_card import CARD, resolve
from grpo.record import checkpoint
from grpo.record.checkpoint import FOLDER, FORMAT, MANIFEST, PAYLOAD
from grpo.record.metrics import FILE_NAME, load_metrics, same_rows
from grpo.record.samples import Samples
from grpo.trainer import Trainer
from tasks.registry import make_task
from tests.helpers.malformed import refusal, train
from tests.helpers.metrics import EVALUATION
from tests.helpers.runs import SETTINGS
from tests.helpers.scripts import snapshot

POLICY, OPTIMIZER, METRICS, STATE = PAYLOAD
STEP = "step-00000002"
NEWEST = f"{FOLDER}/{STEP}"
FILES = {
    "card": f"{SAVED_MODEL}/{CARD}",
    "metrics": FILE_NAME,
    "checkpoint's state": f"{NEWEST}/{STATE}",
    "checkpoint's metrics": f"{NEWEST}/{METRICS}",
}
MISSING = ...  # stands for an entry that is removed
NAN = math.nan
DEEP = "[" * 100_000
HUGE = "1" * 10_000  # Python refuses to read a number with this many digits.


@pytest.fixture(scope="module")
def trainer(model, tmp_path_factory):
    """Return a trainer with the settings of the run of two steps, which reads the checkpoints."""
    folder = tmp_path_factory.mktemp("trainer")
    config = resolve({**SETTINGS, "model": str(model), "num_iterations": 2, "output_dir": str(folder)})
    return Trainer(config, make_task(config), {})


def answer(path, run, trainer):
    """Read a file of a run as the scripts do; return the one line that refuses it, or "" if it is accepted.

    Check that a refused checkpoint leaves the run unchanged, and that setting one aside warns and loses nothing.
    """
    if path.name == CARD:
        return refused(resolve, {"model": str(path.parent)})
    if path.name == FILE_NAME:
        return refused(load_metrics, run)
    (run / NEWEST / MANIFEST).write_bytes(checkpoint._manifest(run / NEWEST))
    before = snapshot(run)
    with redirect_stdout(io.StringIO()) as output:
        line = refused(trainer.state.restore, run, Samples(run))
    warnings = [line for line in output.getvalue().splitlines() if line.startswith("Warning: ")]
    if line:
        assert not warnings
        assert "--fresh" in line
        assert snapshot(run) == before, "the run is as it was"
    elif warnings:
        assert trainer.progress.step == 0, "the earlier checkpoint is used"
        [line] = warnings
        after = snapshot(run)
        for name in [name for name in before if name.startswith(NEWEST)]:
            assert after[name.replace(NEWEST, f"{NEWEST}.damaged-1")] == before[name], "nothing is lost"
    return line


def refused(read, *arguments):
    """Return the line of the ValueError that a reader raises, or "". Other exceptions are not caught."""
    try:
        read(*arguments)
    except ValueError as error:
        line = str(error)
    else:
        line = ""
    assert "\n" not in line
    return line


def name_of(file):
    """Return the name that a refusal must hold: the checkpoint for its files, the file itself otherwise."""
    return STEP if STEP in FILES[file] else Path(FILES[file]).name


# --- any value in any place ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**18, 10**400) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def places(content, place=()):
    """Yield the path of keys and indices of every value in a JSON value, beginning with the path () of itself."""
    yield place
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places(value, (*place, key))
    if isinstance(content, list):
        for index, value in enumerate(content):
            yield from places(value, (*place, index))


def changed(content, place, value):
    """Return a copy of a JSON value in which `value` stands in a place, or in which MISSING has removed the entry."""
    if not place:
        return value
    key, *rest = place
    content = content.copy()
    if rest or value is not MISSING:
        content[key] = changed(content[key] if rest else None, rest, value)
    else:
        del content[key]
    return content


@pytest.mark.parametrize("file", FILES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_in_any_place_of_a_file_is_accepted_or_refused_in_one_line_that_names_it(
    file, data, two_steps, trainer
):
    content = json.loads((two_steps / FILES[file]).read_bytes())
    place = data.draw(st.sampled_from(list(places(content))))
    value = data.draw(JSON | st.just(MISSING) if place else JSON)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(two_steps, Path(folder) / "run"))
        path = run / FILES[file]
        path.write_text(json.dumps(changed(content, place, value)), encoding="utf-8")
        line = answer(path, run, trainer)
        other_run = f"{run.resolve()} holds a run with other settings"
    assert not line or name_of(file) in line or (file == "checkpoint's state" and line.startswith(other_run)), line


# --- values and texts that must be refused ---

COUNTED = {"step": 0, **EVALUATION}
VALUES = {
    "card": {
        "settings": (
            *([], {"no_such_setting": 1}, {"batch_size": 0}, {"batch_size": "2"}, {"num_iterations": 2.5}),
            *({"beta": [0.1]}, {"beta": NAN}, {"learning_rate": math.inf}, {"num_generations": True}),
            *({"output_dir": "/"}, {"seed": 1}),
        ),
        "max_new_tokens": ("x", -1, True, 10**12, 10**30, 2.5),
        "system_prompt": (5,),
        "skills": (5, [1]),
        "prompt_style": (5, ["answer"]),
        "kind": ([],),
        "base_model": (None,),
        "examples": (
            *("2 + 2 = 4", [{"role": "user"}], [{"role": "user", "content": 4}]),
            [{"role": ["user"], "content": "x"}],
        ),
    },
    "metrics": {
        "steps": (
            *(MISSING, None, 3, "abc", {"1": {"step": 1}}, [1, 2], [None], [{"step": 1}, 5, {"step": 3}]),
            *([{"kl": 0.1}], *([{"step": step}] for step in ("1", None, True, 1.5, -1, 10**400))),
            *([{"step": 1, "kl": value}] for value in ("x", {}, [1, 2], 10**400, NAN, -math.inf)),
        ),
        "evals": (
            *(MISSING, {}, ["a"], [EVALUATION], [{"step": 0, "split": "validation"}]),
            *([{**COUNTED, "accuracy": None, "ci_low": None}], [{**COUNTED, "accuracy": "high"}]),
        ),
        "config": (MISSING, None, []),
        "findings": ([1],),
        "finished": (5, [1], {"step": 2}),
    },
    "checkpoint's state": {
        "step": (MISSING, 1, "2", True),
        "format": (MISSING, FORMAT + 1),
        "config": (MISSING, []),
        "threads": (MISSING,),
        "best": (MISSING, "good", {"step": 2}, {"step": 2, "accuracy": NAN}),
        "before": (MISSING, 3, {"step": 0}),
        "skipped_in_a_row": (MISSING, "0"),
        "limits": ([1], {"update": "4"}, {"update": 4}),
        "evaluate_limit": ("4",),
        "beta": ("small", NAN),
    },
    "checkpoint's metrics": {
        "steps": (MISSING, [1, 2], [{"step": 1, "kl": NAN}, {"step": 2}], [{"step": 1}]),
        "evals": (MISSING, [{"step": 0, "accuracy": 0.5}]),
        "findings": (MISSING, [1], [{"name": "too_easy", "step": 1}]),
    },
}


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, values in VALUES.items() for key in values])
def test_a_wrong_value_is_refused_in_one_line_that_names_the_file(file, key, two_steps, trainer, tmp_path):
    content = json.loads((two_steps / FILES[file]).read_bytes())
    for number, value in enumerate(VALUES[file][key]):
        run = Path(shutil.copytree(two_steps, tmp_path / str(number)))
        path = run / FILES[file]
        path.write_text(json.dumps(changed(content, (key,), value)), encoding="utf-8")
        line = answer(path, run, trainer)
        assert name_of(file) in line, value
        assert len(line) < 600
        assert file != "metrics" or "damaged" in line


TEXTS = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "cut short": b'{"schema_version":1,"config":{},"steps":[{"st',
    "two": b"{}{}",
    "nested": DEEP.encode(),
    "nested in an entry": b'{"settings": ' + b'{"a":' * 100_000,
    "a huge number": b'{"step": ' + HUGE.encode() + b"}",
    "a byte order mark": "\ufeff{}".encode(),
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_that_no_run_writes_is_refused_in_one_line_that_names_the_file(text, file, run, trainer):
    path = run / FILES[file]
    path.write_bytes(text)
    assert name_of(file) in answer(path, run, trainer)


# --- tensors of a checkpoint ---


def first(content):
    """Return the name of the first matrix."""
    return next(name for name in sorted(content) if content[name].dim() == 2)


def replaced(by):
    """Return a change that applies `by` to the first matrix."""
    return lambda content: content.update({first(content): by(content[first(content)]).contiguous()})


def more(**tensors):
    """Return a change that adds or replaces tensors."""
    return lambda content: content.update(tensors)


NUMBER = torch.zeros(())
TENSORS = {
    "policy without a tensor": (POLICY, lambda content: content.pop(first(content))),
    "policy with a tensor too many": (POLICY, more(more=torch.zeros(2))),
    "policy of another shape": (POLICY, replaced(lambda tensor: tensor[:, :-1])),
    "policy of a shape that would be repeated": (POLICY, replaced(lambda tensor: tensor[:, :1])),
    "policy turned around": (POLICY, replaced(lambda tensor: tensor.T)),
    "policy of another type": (POLICY, replaced(lambda tensor: tensor.to(torch.bfloat16))),
    "policy that is not safetensors": (POLICY, b"PK\x03\x04" * 100),
    "policy that is empty": (POLICY, b""),
    "optimizer with half an entry": (OPTIMIZER, lambda content: content.pop("0.exp_avg")),
    "optimizer without a step": (OPTIMIZER, lambda content: content.pop("0.step")),
    "optimizer with an index too large": (OPTIMIZER, more(**{"999.step": NUMBER, "999.exp_avg": NUMBER.clone()})),
    "optimizer with an index below zero": (OPTIMIZER, more(**{"-1.step": NUMBER})),
    "optimizer with a name without index": (OPTIMIZER, more(step=NUMBER)),
    "optimizer with an entry too many": (OPTIMIZER, more(**{"0.more": torch.zeros(2)})),
    "optimizer of another shape": (OPTIMIZER, more(**{"0.exp_avg": torch.zeros(1)})),
    "optimizer that is not safetensors": (OPTIMIZER, b"\xff" * 1000),
}


@pytest.mark.parametrize(("name", "change"), TENSORS.values(), ids=TENSORS)
def test_tensors_of_another_model_are_refused_or_set_aside_by_name(name, change, run, trainer):
    path = run / NEWEST / name
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        content = load_file(path)
        change(content)
        save_file(content, path)
    assert STEP in answer(path, run, trainer)


# --- what the scripts print ---


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("card", "{}{}"),
        ("checkpoint's state", json.dumps({"format": FORMAT + 1, "step": 2})),
        ("checkpoint's metrics", "{}"),
    ],
)
def test_training_refuses_a_malformed_file_and_leaves_the_run_as_it_was(file, text, model, run):
    path = run / FILES[file]
    path.write_text(text, encoding="utf-8")
    (run / NEWEST / MANIFEST).write_bytes(checkpoint._manifest(run / NEWEST))
    before = snapshot(run)
    if file == "card":
        out = run / "out"
        refusal(train(path.parent, out, batch_size=None, num_generations=None), CARD)
        assert not out.exists() or not list(out.glob("[!.]*"))
    else:
        assert "--fresh" in refusal(train(model, run, num_iterations=3), STEP)
    assert {name: content for name, content in snapshot(run).items() if not name.startswith("out/")} == before


@pytest.mark.parametrize("text", ["", DEEP, '{"schema_version": 1, "config": {"model": ' + DEEP + "}}"])
def test_plots_refuse_a_malformed_file(text, tmp_path):
    (tmp_path / FILE_NAME).write_text(text, encoding="utf-8")
    refusal(CliRunner().invoke(plot_metrics.main, [str(tmp_path)]), FILE_NAME)


@pytest.mark.parametrize(
    "config", [{"model": 5, "seed": [1], "beta": {}}, {"model": "a$b_{", "seed": None}, {"model": "\x00\n" * 50}]
)
def test_a_config_of_any_kind_is_drawn_or_refused_by_name(config, tmp_path):
    rows = [{"step": 1, "reward_mean": 0.5, "kl": 0.1}]
    record = {"schema_version": 1, "config": config, "steps": rows, "evals": []}
    (tmp_path / FILE_NAME).write_text(json.dumps(record), encoding="utf-8")
    result = CliRunner().invoke(plot_metrics.main, [str(tmp_path)])
    if result.exit_code:
        refusal(result, FILE_NAME)


ENDED = '{"schema_version":1,"config":{},"steps":[],"evals":[],"finished":'
DAMAGED = {"empty": "", "nested": DEEP, "a list": "[]", "ended without a test": ENDED + '{"step":2,"reason":"x"}}'}
DAMAGED |= {f"ended {ending}": ENDED + ending + "}" for ending in ("5", "[1]", '{"step":2}')}


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_damaged_metrics_are_written_anew_from_the_checkpoint(text, more, model, run):
    whole = json.loads((run / FILE_NAME).read_bytes())
    (run / FILE_NAME).write_text(text, encoding="utf-8")
    result = train(model, run, num_iterations=2 + more)
    if result.exit_code:
        refusal(result, FILE_NAME)
        return
    record = json.loads((run / FILE_NAME).read_bytes())
    assert same_rows(record["steps"][:2], whole["steps"])
    assert record["finished"]["step"] == 2 + more


# --- files that are folders or links, folders that are files ---


def folder_instead(path):
    """Replace a file by a folder."""
    path.unlink()
    path.mkdir()


def file_instead(path):
    """Replace a folder by a file."""
    shutil.rmtree(path)
    path.write_text("of the user")


def loop(path):
    """Replace a file or a folder by a link to itself."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(path)


def outside(manifest):
    """Add a file outside the checkpoint to its manifest."""
    path = manifest.parents[2] / "elsewhere"
    path.write_text("{}")
    files = json.loads(manifest.read_bytes())
    files["../../elsewhere"] = {"bytes": 2, "sha256": checkpoint._sha256(path)}
    manifest.write_text(json.dumps(files, indent=2, sort_keys=True) + "\n")


PLACES = {
    "a manifest that lists a file outside": (MANIFEST, outside),
    "a manifest that is a list": (MANIFEST, lambda path: path.write_text("[]")),
    "a manifest nested without end": (MANIFEST, lambda path: path.write_text(DEEP)),
    "a manifest that is a folder": (MANIFEST, folder_instead),
    "a policy that is a folder": (POLICY, folder_instead),
    "a policy that is a link to itself": (POLICY, loop),
}


@pytest.mark.parametrize(("name", "damage"), PLACES.values(), ids=PLACES)
def test_a_checkpoint_whose_files_are_not_what_they_should_be_is_set_aside(name, damage, model, run):
    damage(run / NEWEST / name)
    result = train(model, run, num_iterations=3)
    assert result.exit_code == 0, result.output
    [warning] = [line for line in result.stdout.splitlines() if line.startswith("Warning: ")]
    assert STEP in warning
    assert (run / f"{NEWEST}.damaged-1").is_dir()


@pytest.mark.parametrize("damage", [file_instead, loop], ids=["a file", "a link to itself"])
@pytest.mark.parametrize("alone", [True, False])
def test_checkpoints_that_are_not_a_folder_are_refused_by_name(damage, alone, model, run):
    damage(run / FOLDER)
    if alone:
        for path in run.iterdir():
            if path.name != FOLDER:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = snapshot(run)
    refusal(train(model, run, num_iterations=3), "checkpoint")
    assert snapshot(run) == before


@pytest.mark.parametrize("name", [STEP, "step-0000000x", "step-99999999"])
def test_a_file_or_a_stray_folder_among_the_checkpoints_is_no_obstacle(name, model, run):
    path = run / FOLDER / name
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("of the user")
    result = train(model, run, num_iterations=3)
    if result.exit_code:
        refusal(result, name)
    assert path.read_text() == "of the user" or (run / f"{FOLDER}/{name}.damaged-1").read_text() == "of the user"


@pytest.mark.parametrize("damage", [folder_instead, loop], ids=["a folder", "a link to itself"])
@pytest.mark.parametrize("command", ["plot", "train", "ask"])
def test_a_file_that_is_a_folder_or_a_link_is_ignored_or_refused_by_name(command, damage, model, run):
    name = FILES["card"] if command == "ask" else FILE_NAME
    damage(run / name)
    if command == "train":
        result = train(model, run, num_iterations=3)
    else:
        question = ["--model", str(run / SAVED_MODEL), "--max-new-tokens", "3", "What is 1 + 1?"]
        script, arguments = (inference, question) if command == "ask" else (plot_metrics, [str(run)])
        result = CliRunner().invoke(script.main, arguments)
    must_refuse = (command, damage) in (("plot", folder_instead), ("plot", loop), ("train", folder_instead))
    assert (result.exit_code == 0 and not must_refuse) or refusal(result, Path(name).name)
