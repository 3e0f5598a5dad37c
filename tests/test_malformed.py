"""Files of a run and of a model that are not as this program writes them: one line that names the file, no traceback.

A checkpoint here has the right SHA-256 sums whatever is in it: what they find is test_checkpoint.py's matter.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import inference
import plot_metrics
import train_grpo
from grpo import checkpoint as module
from grpo.checkpoint import MANIFEST, PAYLOAD
from grpo.config import CARD
from grpo.metrics import FILE_NAME, without_times
from tests.runs import a_tiny_model, options

POLICY, OPTIMIZER, METRICS, STATE = PAYLOAD
NEWEST = "checkpoints/step-00000002"
DEEP = "[" * 100_000
HUGE = "1" * 10_000  # more digits than Python reads

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return a_tiny_model(tmp_path_factory.mktemp("malformed") / "model")


@pytest.fixture(scope="module")
def half(model):
    """A run of two steps, which no test changes."""
    folder = model.parent / "half"
    result = train(model, folder, num_iterations=2)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def run(half, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(half, tmp_path / "run"))


def train(model, folder, **settings):
    return CliRunner().invoke(train_grpo.main, options(model=model, output_dir=folder, **settings))


def refusal(result, *names):
    """The one line that answers a file, after checking that there is no other and that it names the file."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2), result.output
    errors = [line for line in result.stderr.splitlines() if not line.startswith(("Usage: ", "Try ", "Model: "))]
    errors = [line for line in errors if line]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("Error: ")
    assert len(errors[0]) < 600
    assert any(name in errors[0] for name in names), errors[0]
    return errors[0]


def snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".grpo.")
    }


# --- checkpoints ---


def json_file(name, change):
    """Change the content of a JSON file of a checkpoint: by a function, or all of it."""

    def damage(path):
        content = change(json.loads((path / name).read_bytes())) if callable(change) else change
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    return damage


def without(key):
    return lambda content: {name: value for name, value in content.items() if name != key}


def having(**more):
    return lambda content: {**content, **more}


def tensors(name, change):
    """Change the tensors of a checkpoint: a function of them, in place."""

    def damage(path):
        content = load_file(path / name)
        change(content)
        save_file(content, path / name)

    return damage


def first(content):
    """The name of a matrix."""
    return next(name for name in sorted(content) if content[name].dim() == 2)


def replaced(by):
    """Put something else in the place of a matrix."""
    return lambda content: content.update({first(content): by(content[first(content)]).contiguous()})


CHECKPOINTS = {
    **{f"state without {key}": json_file(STATE, without(key)) for key in ("step", "format", "config", "threads")},
    **{f"state without {key}": json_file(STATE, without(key)) for key in ("before", "best", "skipped_in_a_row")},
    "state of another step": json_file(STATE, having(step=1)),
    "state of a step that is a text": json_file(STATE, having(step="2")),
    "state of a step that is true": json_file(STATE, having(step=True)),
    "state of another version": json_file(STATE, having(format=2)),
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
    "state with a huge number": json_file(STATE, '{"format": 1, "step": ' + HUGE + "}"),
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
def test_a_checkpoint_that_is_not_ours_is_refused_or_set_aside_by_name(damage, model, run):
    damage(run / NEWEST)
    (run / NEWEST / MANIFEST).write_bytes(module._manifest(run / NEWEST))
    before = snapshot(run)
    result = train(model, run, num_iterations=3)
    if result.exit_code:
        assert "--fresh" in refusal(result, "step-00000002")
        assert snapshot(run) == before, "the run is as it was"
    else:  # the one before it is used
        assert result.exception is None
        warnings = [line for line in result.stdout.splitlines() if line.startswith("Warning: ")]
        assert len(warnings) == 1
        assert "step-00000002" in warnings[0]
        after = snapshot(run)
        for name in [name for name in before if name.startswith(NEWEST)]:
            assert after[name.replace(NEWEST, f"{NEWEST}.damaged-1")] == before[name], "nothing is lost"


def outside(run):
    (run / "elsewhere").write_text("{}")
    manifest = json.loads((run / NEWEST / MANIFEST).read_bytes())
    manifest["../../elsewhere"] = {"bytes": 2, "sha256": module._sha256(run / "elsewhere")}
    (run / NEWEST / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def a_folder_for(name):
    def damage(run):
        (run / NEWEST / name).unlink()
        (run / NEWEST / name).mkdir()

    return damage


def loop(name):
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
    def damage(run):
        shutil.rmtree(run / name)
        (run / name).write_text("of the user")

    return damage


@pytest.mark.parametrize("damage", [a_file("checkpoints"), loop("checkpoints")], ids=["a file", "a link to itself"])
@pytest.mark.parametrize("alone", [True, False])
def test_checkpoints_that_are_no_folder_are_refused_by_name(damage, alone, model, run):
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


# --- the metrics of a run that goes on ---

AT_A_CONTINUATION = {
    "empty": b"",
    "cut short": b'{"schema_version":1,"config":{},"steps":[{"st',
    "binary": bytes(range(256)),
    "nested": DEEP.encode(),
    "a list": b"[]",
    "finished nowhere": b'{"schema_version":1,"config":{},"steps":[],"evals":[],"finished":5}',
    "finished in a list": b'{"schema_version":1,"config":{},"steps":[],"evals":[],"finished":[1]}',
    "finished without a reason": b'{"schema_version":1,"config":{},"steps":[],"evals":[],"finished":{"step":2}}',
    "finished without a test": b'{"schema_version":1,"config":{},"steps":[],"evals":[],'
    b'"finished":{"step":2,"reason":"x"}}',
}


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("content", AT_A_CONTINUATION.values(), ids=AT_A_CONTINUATION)
def test_damaged_metrics_are_written_anew_from_the_checkpoint(content, more, model, run):
    whole = json.loads((run / FILE_NAME).read_bytes())
    (run / FILE_NAME).write_bytes(content)
    result = train(model, run, num_iterations=2 + more)
    if result.exit_code:
        refusal(result, FILE_NAME)
        return
    record = json.loads((run / FILE_NAME).read_bytes())
    assert list(map(without_times, record["steps"][:2])) == list(map(without_times, whole["steps"]))
    assert record["finished"]["step"] == 2 + more


def test_metrics_that_are_a_folder_are_named(model, run):
    (run / FILE_NAME).unlink()
    (run / FILE_NAME).mkdir()
    refusal(train(model, run, num_iterations=3), FILE_NAME)


@pytest.mark.parametrize("command", ["plot", "train"])
def test_metrics_that_are_a_link_to_itself_are_named(command, model, run):
    (run / FILE_NAME).unlink()
    (run / FILE_NAME).symlink_to(run / FILE_NAME)
    if command == "plot":
        refusal(CliRunner().invoke(plot_metrics.main, [str(run)]), FILE_NAME)
    else:
        result = train(model, run, num_iterations=3)
        assert result.exit_code == 0 or refusal(result, FILE_NAME)


@pytest.mark.parametrize(
    "content",
    [
        '{"schema_version": 1, "config": {}, "steps": [{"step": 1, "kl": NaN}], "evals": []}',
        '{"schema_version": 1, "config": {}, "steps": [{"step": 1, "kl": -Infinity}], "evals": []}',
        '{"schema_version": 1, "config": {}, "steps": [{"step": ' + HUGE + "}]}",
        '{"schema_version": 1, "config": {"model": ' + DEEP + "}}",
        '{"schema_version": 1, "config": {}, "steps": [], "evals": [], "findings": [1]}',
        '{"schema_version": 1, "config": {}, "steps": [], "evals": []}\n{}',
        "\ufeff{}",
    ],
    ids=["NaN", "infinity", "a huge number", "nested", "findings", "two records", "a byte order mark"],
)
def test_metrics_that_json_may_hold_and_ours_do_not_are_named(content, tmp_path):
    (tmp_path / FILE_NAME).write_text(content, encoding="utf-8")
    refusal(CliRunner().invoke(plot_metrics.main, [str(tmp_path)]), FILE_NAME)


@pytest.mark.parametrize(
    "config", [{"model": 5, "seed": [1], "beta": {}}, {"model": "a$b_{", "seed": None}, {"model": "\x00\n" * 50}]
)
def test_a_config_of_any_kind_is_drawn_or_named(config, tmp_path):
    rows = [{"step": 1, "reward_mean": 0.5, "kl": 0.1}]
    record = {"schema_version": 1, "config": config, "steps": rows, "evals": []}
    (tmp_path / FILE_NAME).write_text(json.dumps(record), encoding="utf-8")
    result = CliRunner().invoke(plot_metrics.main, [str(tmp_path)])
    if result.exit_code:
        refusal(result, FILE_NAME)


# --- the card of a model ---

CARDS = {
    "settings of wrong types": {"settings": {"batch_size": "2"}},
    "settings that are fractions": {"settings": {"num_iterations": 2.5}},
    "settings that are lists": {"settings": {"beta": [0.1]}},
    "settings that are true": {"settings": {"num_generations": True}},
    "settings of the run itself": {"settings": {"output_dir": "/"}},
    "a seed": {"settings": {"seed": 1}},
    "NaN": '{"settings": {"beta": NaN}}',
    "infinity": '{"settings": {"learning_rate": Infinity}}',
    "a huge number": '{"settings": {"beta": ' + HUGE + "}}",
    "nested": '{"settings": ' + '{"a":' * 100_000,
    "two": "{}{}",
    "a byte order mark": "\ufeff{}",
    "tokens that are true": {"max_new_tokens": True},
    "tokens without number": {"max_new_tokens": 10**12},
    "tokens beyond 64 bits": {"max_new_tokens": 10**30},
    "tokens that are a fraction": {"max_new_tokens": 2.5},
    "skills that are numbers": {"skills": [1]},
    "a prompt style that is a list": {"prompt_style": ["answer"]},
    "a base model that is null": {"base_model": None},
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_card_that_cannot_be_is_named_by_training(card, model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    (copy / CARD).write_text(card if isinstance(card, str) else json.dumps(card), encoding="utf-8")
    # a setting that is given comes before the card's: what the card may have is left out
    left_out = dict.fromkeys(("batch_size", "num_generations", "learning_rate", "num_inner_updates"))
    if "num_iterations" in str(card):
        left_out["num_iterations"] = None
    refusal(train(copy, tmp_path / "out", **left_out), CARD)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("[!.]*"))


@pytest.mark.parametrize("kind", ["a folder", "a link to itself"])
def test_a_card_that_is_no_file_is_as_none_or_named(kind, model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    (copy / CARD).unlink()
    (copy / CARD).mkdir() if kind == "a folder" else (copy / CARD).symlink_to(copy / CARD)
    result = CliRunner().invoke(inference.main, ["--model", str(copy), "--max-new-tokens", "3", "What is 1 + 1?"])
    assert result.exit_code == 0 or refusal(result, CARD)
