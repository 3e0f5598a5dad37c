"""`inference.py --evaluate`: one model or two, side by side, and what it refuses."""

import json

import pytest
from click.testing import CliRunner

import inference
from tests.helpers.runs import a_tiny_model, trained


def evaluated(*arguments):
    """Evaluate models on the CPU; return click's result, after checking that it worked."""
    result = CliRunner().invoke(inference.main, ["--evaluate", "--device", "cpu", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def test_two_models_are_measured_with_the_prompts_of_the_last_and_compared(tmp_path):
    model, saved = a_tiny_model(tmp_path / "model"), tmp_path / "run/saved_model"
    record, _ = trained(model, tmp_path / "run", num_iterations=4)
    tests = [e for e in record["evals"] if e["split"] == "test"]
    result = evaluated("--model", saved, "--compare")
    assert "up to 6 tokens" in result.stdout
    [line] = [line for line in result.stdout.splitlines() if line.startswith("test")]
    for entry in tests:
        assert f"{100 * entry['accuracy']:.1f}% [" in line
    difference = 100 * (tests[1]["accuracy"] - tests[0]["accuracy"])
    assert f"{difference:+.1f} [" in line
    assert f"{tests[1]['drift']:.3f} nats a token" in result.stdout
    figures = json.loads(evaluated("--model", saved, "--compare", "--json", "--answers", tmp_path / "a.jsonl").stdout)
    assert (figures["task"], figures["split"], figures["max_new_tokens"]) == ("arithmetic", "test", 6)
    kept = {"accuracy", "n", "ci_low", "ci_high", "well_formed", "categories", "drift"}
    for found, entry in zip(figures["models"], tests, strict=True):
        assert {name: found[name] for name in kept - {"drift"}} == {name: entry[name] for name in kept - {"drift"}}
    assert figures["models"][1]["drift"] == pytest.approx(tests[1]["drift"])
    assert figures["difference"]["accuracy"] == pytest.approx(difference / 100)
    assert set(figures["difference"]["categories"]) == set(tests[0]["categories"])
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["model"] for row in rows[:: tests[0]["n"]]] == [str(model), str(saved)]
    assert set(rows[0]) == {"model", "task", "question", "gold", "completion", "answer", "right"}
    assert sum(row["right"] for row in rows) == sum(round(entry["accuracy"] * entry["n"]) for entry in tests)
    twice = evaluated("--model", model, "--model", saved)
    assert twice.stdout.splitlines()[2:] == result.stdout.splitlines()[2:]


def test_one_model_on_validation_and_another_range():
    result = evaluated("--model", "starter", "--split", "validation", "--max-operand", "2", "--pass-at-k", "1")
    assert "validation" in result.stdout
    assert "pass@1" in result.stdout
    assert "difference" not in result.stdout


def test_answers_are_those_that_the_accuracies_count(tmp_path):
    file = tmp_path / "a.jsonl"
    shown = json.loads(evaluated("--model", "starter", "--json", "--answers", file).stdout)["models"][0]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    of_task = [row for row in rows if row["task"] == "arithmetic"]
    assert len(of_task) == shown["n"]
    assert sum(row["right"] for row in of_task) == shown["accuracy"] * shown["n"]
    assert all(row["right"] == (row["answer"] == row["gold"]) for row in of_task)
    assert {row["task"] for row in rows} == {"arithmetic", *shown["skills"]}


def test_answers_that_cannot_be_written_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.evaluation.model_comparison.measure", lambda *_: pytest.fail("worked in vain"))
    for place in (tmp_path, tmp_path / "no/such/a.jsonl"):
        result = CliRunner().invoke(inference.main, ["--evaluate", "--model", "starter", "--answers", str(place)])
        assert result.exit_code == 1
        assert "--answers" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--evaluate", "What is 1 + 1?"], 2, "leave out questions"),
        (["--evaluate", "--temperature", "1"], 2, "greedily"),
        (["--evaluate", "--model", "a", "--model", "b", "--compare"], 2, "--compare"),
        (["--evaluate", "--max-operand", "0"], 2, "--max-operand"),
        (["--evaluate", "--task", "jsonl"], 1, "--data"),
        (["--evaluate", "--model", "starter", "--compare"], 1, "trained from"),
        (["--evaluate", "--model", "/no/such/folder"], 1, "no such folder"),
        (["--split", "test", "What is 1 + 1?"], 2, "--split"),
        (["--json", "What is 1 + 1?"], 2, "--json"),
        (["--answers", "a.jsonl", "What is 1 + 1?"], 2, "--answers"),
        (["--model", "a", "--model", "b", "What is 1 + 1?"], 2, "twice"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(arguments, status, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(inference.main, arguments)
    assert result.exit_code == status, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
