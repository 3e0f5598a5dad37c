"""Checkpoints that are not as a run writes them: set aside by name, or refused in one line.

Their SHA-256 sums are right whatever is in them: what sums find is tested in test_checkpoint.py.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo.record import checkpoint
from grpo.record.checkpoint import FORMAT, MANIFEST, PAYLOAD
from tests.helpers.malformed import DEEP, HUGE, refusal, train
from tests.helpers.scripts import snapshot

POLICY, OPTIMIZER, METRICS, STATE = PAYLOAD
NEWEST = "checkpoints/step-00000002"

pytestmark = pytest.mark.usefixtures("no_plots")


def json_file(name, change):
    """Return a damage that changes the content of a JSON file: by a function, or all of it."""

    def damage(path):
        content = change(json.loads((path / name).read_bytes())) if callable(change) else change
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    return damage


def without(key):
    return lambda content: {name: value for name, value in content.items() if name != key}


def having(**more):
    return lambda content: {**content, **more}


def tensors(name, change):
    """Return a damage that changes the tensors of a file by a function, in place."""

    def damage(path):
        content = load_file(path / name)
        change(content)
        save_file(content, path / name)

    return damage


def first(content):
    """Return the name of a matrix."""
    return next(name for name in sorted(content) if content[name].dim() == 2)


def replaced(by):
    """Return a change that replaces a matrix."""
    return lambda content: content.update({first(content): by(content[first(content)]).contiguous()})


CHECKPOINTS = {
    **{f"state without {key}": json_file(STATE, without(key)) for key in ("step", "format", "config", "threads")},
    **{f"state without {key}": json_file(STATE, without(key)) for key in ("before", "best", "skipped_in_a_row")},
    "state of another step": json_file(STATE, having(step=1)),
    "state of a step that is a text": json_file(STATE, having(step="2")),
    "state of a step that is true": json_file(STATE, having(step=True)),
    "state of another version": json_file(STATE, having(format=FORMAT + 1)),
    "state with a config that is a list": json_file(STATE, having(config=[])),
    "state with a best that is a text": json_file(STATE, having(best="good")),
    "state with a best without accuracy": json_file(STATE, having(best={"step": 2})),
    "state with a best that is NaN": json_file(STATE, having(best={"step": 2, "accuracy": float("nan")})),
    "state with a before that is a number": json_file(STATE, having(before=3)),
    "state with a before without accuracy": json_file(STATE, having(before={"step": 0})),
    "state with skipped steps that are a text": json_file(STATE, having(skipped_in_a_row="0")),
    "state with limits that are a list": json_file(STATE, having(limits=[1])),
    "state with limits that are texts": json_file(STATE, having(limits={"update": "4"})),
    "state with half the limits": json_file(STATE, having(limits={"update": 4})),
    "state with a limit that is a text": json_file(STATE, having(evaluate_limit="4")),
    "state with a beta that is a text": json_file(STATE, having(beta="small")),
    "state with a beta that is NaN": json_file(STATE, having(beta=float("nan"))),
    "state that is a list": json_file(STATE, []),
    "state that is null": json_file(STATE, "null"),
    "state that is empty": json_file(STATE, ""),
    "state nested without end": json_file(STATE, DEEP),
    "state with a huge number": json_file(STATE, f'{{"format": {FORMAT}, "step": ' + HUGE + "}"),
    "metrics that are a list": json_file(METRICS, [1, 2]),
    "metrics without steps": json_file(METRICS, without("steps")),
    "metrics without evals": json_file(METRICS, without("evals")),
    "metrics without findings": json_file(METRICS, without("findings")),
    "metrics with findings that are numbers": json_file(METRICS, having(findings=[1])),
    "metrics with a finding without text": json_file(METRICS, having(findings=[{"name": "too_easy", "step": 1}])),
    "metrics with steps that are numbers": json_file(METRICS, having(steps=[1, 2])),
    "metrics with NaN": json_file(METRICS, having(steps=[{"step": 1, "kl": float("nan")}, {"step": 2}])),
    "metrics of fewer steps": json_file(METRICS, having(steps=[{"step": 1}])),
    "metrics with an evaluation without split": json_file(METRICS, having(evals=[{"step": 0, "accuracy": 0.5}])),
    "metrics nested without end": json_file(METRICS, DEEP),
    "policy without a tensor": tensors(POLICY, lambda content: content.pop(first(content))),
    "policy with a tensor too many": tensors(POLICY, lambda content: content.update(more=torch.zeros(2))),
    "policy of another shape": tensors(POLICY, replaced(lambda tensor: tensor[:, :-1])),
    "policy of a shape that would be repeated": tensors(POLICY, replaced(lambda tensor: tensor[:, :1])),
    "policy turned around": tensors(POLICY, replaced(lambda tensor: tensor.T)),
    "policy of another type": tensors(POLICY, replaced(lambda tensor: tensor.to(torch.bfloat16))),
    "policy that is not safetensors": lambda path: (path / POLICY).write_bytes(b"PK\x03\x04" * 100),
    "policy that is empty": lambda path: (path / POLICY).write_bytes(b""),
    "optimizer with half an entry": tensors(OPTIMIZER, lambda content: content.pop("0.exp_avg")),
    "optimizer without a step": tensors(OPTIMIZER, lambda content: content.pop("0.step")),
    "optimizer with an index too large": tensors(
        OPTIMIZER, lambda content: content.update({f"999.{n}": torch.zeros(()) for n in ("step", "exp_avg")})
    ),
    "optimizer with an index below zero": tensors(
        OPTIMIZER, lambda content: content.update({"-1.step": torch.zeros(())})
    ),
    "optimizer with a name without index": tensors(OPTIMIZER, lambda content: content.update(step=torch.zeros(()))),
    "optimizer with an entry too many": tensors(
        OPTIMIZER, lambda content: content.update({"0.more": torch.zeros(2)})
    ),
    "optimizer of another shape": tensors(OPTIMIZER, lambda content: content.update({"0.exp_avg": torch.zeros(1)})),
    "optimizer that is not safetensors": lambda path: (path / OPTIMIZER).write_bytes(b"\xff" * 1000),
}


@pytest.mark.parametrize("damage", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_of_other_content_is_refused_or_set_aside_by_name(damage, model, run):
    damage(run / NEWEST)
    (run / NEWEST / MANIFEST).write_bytes(checkpoint._manifest(run / NEWEST))
    before = snapshot(run)
    result = train(model, run, num_iterations=3)
    if result.exit_code:
        assert "--fresh" in refusal(result, "step-00000002")
        assert snapshot(run) == before, "the run is as it was"
    else:  # the earlier checkpoint is used
        assert result.exception is None
        warnings = [line for line in result.stdout.splitlines() if line.startswith("Warning: ")]
        assert len(warnings) == 1
        assert "step-00000002" in warnings[0]
        after = snapshot(run)
        for name in [name for name in before if name.startswith(NEWEST)]:
            assert after[name.replace(NEWEST, f"{NEWEST}.damaged-1")] == before[name], "nothing is lost"


def outside(run):
    """List a file outside the checkpoint in its manifest."""
    (run / "elsewhere").write_text("{}")
    manifest = json.loads((run / NEWEST / MANIFEST).read_bytes())
    manifest["../../elsewhere"] = {"bytes": 2, "sha256": checkpoint._sha256(run / "elsewhere")}
    (run / NEWEST / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def a_folder_for(name):
    """Return a damage that makes a file of the checkpoint a folder."""

    def damage(run):
        (run / NEWEST / name).unlink()
        (run / NEWEST / name).mkdir()

    return damage


def loop(name):
    """Return a damage that makes a file or folder a link to itself."""

    def damage(run):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(path)

    return damage


PLACES = {
    "a manifest that lists a file outside": outside,
    "a manifest that is a list": lambda run: (run / NEWEST / MANIFEST).write_text("[]"),
    "a manifest nested without end": lambda run: (run / NEWEST / MANIFEST).write_text(DEEP),
    "a manifest that is a folder": a_folder_for(MANIFEST),
    "a policy that is a folder": a_folder_for(POLICY),
    "a policy that is a link to itself": loop(f"{NEWEST}/{POLICY}"),
}


@pytest.mark.parametrize("damage", PLACES.values(), ids=PLACES)
def test_a_checkpoint_whose_files_are_not_what_they_should_be_is_set_aside(damage, model, run):
    damage(run)
    result = train(model, run, num_iterations=3)
    assert result.exit_code == 0, result.output
    warnings = [line for line in result.stdout.splitlines() if line.startswith("Warning: ")]
    assert len(warnings) == 1
    assert "step-00000002" in warnings[0]
    assert (run / f"{NEWEST}.damaged-1").is_dir()


def a_file(name):
    """Return a damage that makes a folder of the run a file."""

    def damage(run):
        shutil.rmtree(run / name)
        (run / name).write_text("of the user")

    return damage


@pytest.mark.parametrize("damage", [a_file("checkpoints"), loop("checkpoints")], ids=["a file", "a link to itself"])
@pytest.mark.parametrize("alone", [True, False])
def test_checkpoints_that_are_not_a_folder_are_refused_by_name(damage, alone, model, run):
    damage(run)
    if alone:
        for path in run.iterdir():
            if path.name != "checkpoints":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = snapshot(run)
    refusal(train(model, run, num_iterations=3), "checkpoint")
    assert snapshot(run) == before


@pytest.mark.parametrize("name", ["step-00000002", "step-0000000x", "step-99999999"])
def test_a_file_or_a_stray_folder_among_the_checkpoints_is_no_obstacle(name, model, run):
    path = run / "checkpoints" / name
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("of the user")
    result = train(model, run, num_iterations=3)
    if result.exit_code:
        refusal(result, name)
    assert path.read_text() == "of the user" or (run / f"checkpoints/{name}.damaged-1").read_text() == "of the user"
