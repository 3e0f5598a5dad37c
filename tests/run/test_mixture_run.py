"""A run on several tasks: what it measures and saves, a task of one's own, a kill, other weights, inference."""

import json
import os
import signal

import pytest
from click.testing import CliRunner

import inference
import train_grpo
from grpo.plots.html_report import page
from grpo.record.metrics import load_metrics
from grpo.record.schema import is_entry
from tests.helpers.runs import Fork, a_tiny_model, fingerprint, options, trained, wait_for
from tests.helpers.scripts import snapshot

DIGITS = """
from dataclasses import dataclass
from tasks.base import Problem
from tasks.common.drawn_task import DrawnTask

@dataclass(frozen=True, kw_only=True)
class Digits(DrawnTask):
    name: str = "digits"

    def draw(self, rng):
        a = rng.randint(1, 9999)
        return Problem(f"What is the last digit of {a}?", str(a % 10), working="look", category="odd" * (a % 2))
"""
STEPS = {"num_iterations": 6, "batch_size": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a tiny model and a file with a task."""
    folder = tmp_path_factory.mktemp("mixture")
    a_tiny_model(folder / "model")
    (folder / "mine.py").write_text(DIGITS, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tasks(place):
    """Return the options of the mixture."""
    return ("--task", "arithmetic=0.5", "--task", f"{place / 'mine.py'}:Digits=0.5")


@pytest.fixture(scope="module")
def whole(place, tasks):
    """Return the folder, record and output of a run to its end, after supervised steps."""
    folder = place / "whole"
    return folder, *trained(place / "model", folder, *tasks, sft_steps=2, sft_batch_size=4, **STEPS)


def test_accuracy_is_that_of_all_and_of_each_task(whole):
    folder, record, out = whole
    for row in record["steps"]:
        assert is_entry(row)
    for entry in record["evals"]:
        by_task = entry["categories"]
        assert list(by_task) == ["Digits", "arithmetic"]
        assert sum(one["n"] for one in by_task.values()) == entry["n"]
        right = sum(one["accuracy"] * one["n"] for one in by_task.values())
        assert right / entry["n"] == pytest.approx(entry["accuracy"])
    assert "\n           Digits " in out  # during training
    assert "by category, after " in out  # at the end
    readme = (folder / "saved_model/README.md").read_text(encoding="utf-8")
    [row] = [line for line in readme.splitlines() if line.startswith("| category `Digits` |")]
    assert f"{100 * record['evals'][-1]['categories']['Digits']['accuracy']:.1f}%" in row
    assert "validation, Digits" in page(record, {}, {})


def test_a_killed_run_on_a_mixture_continues_to_the_same_bits(place, tasks, whole):
    folder = place / "killed"
    fine_tuned = {"sft_steps": 2, "sft_batch_size": 4, **STEPS}
    arguments = [*options(model=place / "model", output_dir=folder, **fine_tuned), *tasks]
    process = Fork(train_grpo.main, arguments)
    wait_for((folder / "checkpoints" / "step-00000004").exists)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait()[0] == -signal.SIGKILL
    _, out = trained(place / "model", folder, *tasks, **fine_tuned)
    assert "Continuing from the checkpoint" in out
    assert fingerprint(folder) == fingerprint(whole[0])
    before = snapshot(folder)
    other = [text.replace("arithmetic=0.5", "arithmetic=0.6") for text in arguments]
    refused = CliRunner().invoke(train_grpo.main, other)
    assert refused.exit_code == 1
    assert "task arithmetic=0.5" in refused.stderr
    assert "(now arithmetic=0.6" in refused.stderr
    assert snapshot(folder) == before


def test_the_saved_model_is_measured_on_all_its_tasks_and_asks_as_one(place, tasks, whole, tmp_path):
    folder, record, _ = whole
    card = json.loads((folder / "saved_model/grpo.json").read_text(encoding="utf-8"))
    assert (card["task"], list(card["tasks"])) == ("arithmetic and Digits", ["arithmetic", "Digits"])
    model = ("--model", str(folder / "saved_model"), "--device", "cpu")
    missing = CliRunner().invoke(inference.main, [*model, "--evaluate"])
    assert "a task in a file" in missing.stderr
    found = CliRunner().invoke(inference.main, [*model, "--evaluate", *tasks[:4]])
    assert found.exit_code == 0, found.output
    after = record["evals"][-1]
    rows = {line.split()[0]: line for line in found.stdout.splitlines()[2:]}
    for name, figures in (("test", after), *after["categories"].items()):
        assert f"{100 * figures['accuracy']:.1f}%" in rows[name]
        assert f"n = {figures['n']}" in rows[name]
    alone = CliRunner().invoke(inference.main, [*model, "What is (1 + 0) - 1?"])
    assert "prompt of arithmetic; for another, use --task Digits" in alone.stderr
    as_digits = CliRunner().invoke(inference.main, [*model, "--task", "Digits", "What is the last digit of 12?"])
    assert (as_digits.exit_code, "for another" in as_digits.stderr) == (0, False)
    wrong = CliRunner().invoke(inference.main, [*model, "--task", "chess", "Why?"])
    assert (wrong.exit_code, wrong.stderr.count("Traceback")) == (2, 0)
    assert "arithmetic, Digits" in wrong.stderr


def test_a_model_of_a_mixture_starts_another_run_on_it(place, tmp_path):
    tasks = ("--task", "arithmetic=1", "--task", "reverse=3")
    first = tmp_path / "first"
    trained(place / "model", first, *tasks, num_iterations=1)
    record, _ = trained(first / "saved_model", tmp_path / "second", num_iterations=1)
    assert record["config"]["task"] == ["arithmetic=1", "reverse=3"]
    assert load_metrics(first)["config"]["task"] == ["arithmetic=1", "reverse=3"]
