"""Call the scripts in this process, and read their output and their files."""

import json
import shutil
from contextlib import chdir
from dataclasses import fields
from pathlib import Path

from click.testing import CliRunner

import inference
import train_grpo
from grpo.config import TrainConfig
from grpo.model_card import CARD, STARTER
from grpo.plots.figures import CURVE, KL, OVERVIEW
from grpo.record.metrics import FILE_NAME
from grpo.record.samples import FILE_NAME as SAMPLES

ROOT = Path(__file__).parents[2]
TINY = [
    "--train-anyway",
    "--num-iterations",
    "2",
    "--batch-size",
    "2",
    "--num-generations",
    "2",
    "--eval-problems",
    "8",
]
QUESTION = "What is (4 - 9) * 6?"
FIELDS = {f.name: f for f in fields(TrainConfig)}
EVERYTHING = {"saved_model", "checkpoints", FILE_NAME, CURVE, KL, OVERVIEW, SAMPLES}


def invoke(command, *args, folder, **more):
    """Run a script in this process, in a folder; return its result, with standard output and error separate."""
    with chdir(folder):
        return CliRunner().invoke(command, [str(arg) for arg in args], **more)


def train(*args, folder):
    """Train in a tiny run that must succeed; return its result."""
    result = invoke(train_grpo.main, *TINY, *args, folder=folder)
    assert result.exit_code == 0, result.output
    return result


def ask(*args, folder, **more):
    """Ask a model questions, which must succeed; return the lines of standard output."""
    result = invoke(inference.main, *args, folder=folder, **more)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert all(line.isprintable() for line in result.stdout.splitlines())
    return result.stdout.splitlines()


def refusal(result):
    """Return the line that refuses a mistake, after checking that nothing else was printed."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output
    *before, last = result.stderr.splitlines()
    assert last.startswith("Error: "), result.stderr
    assert len(last) > len("Error: ") + 5
    for line in before:  # how to call it, or what was loaded
        assert line == "" or line.startswith(("Usage: ", "Try ", "Model: ")), result.stderr
    assert result.stdout == ""
    return last


def snapshot(folder):
    """Return the content of every file in a folder by name, the lock aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".grpo.")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def names_in(folder):
    """Return the names in a folder that are not hidden."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".grpo.")}


def a_model(folder, **card):
    """Copy the starter model, with some entries of its card changed."""
    shutil.copytree(STARTER, folder)
    content = json.loads((folder / CARD).read_text(encoding="utf-8"))
    (folder / CARD).write_text(json.dumps({**content, **card}), encoding="utf-8")
    return folder


def without_times(value):
    """Return a record without the entries that are seconds or bytes of memory."""
    if isinstance(value, dict):
        return {k: without_times(item) for k, item in value.items() if not k.startswith(("time/", "peak_memory"))}
    return [without_times(item) for item in value] if isinstance(value, list) else value
