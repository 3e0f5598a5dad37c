"""What a run measures of a model: drift, categories, pass@k, prompts that share their beginning."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import inference
import train_grpo
from grpo import examiner, trainer
from grpo.checkpoint import newest_checkpoint
from grpo.config import resolve
from grpo.evaluate import Evaluation, evaluate, sampled_passes
from grpo.examiner import Examiner
from grpo.forgetting import StartingAnswers, are_answers, logprobs_of
from grpo.greedy import can_begin_together, common_beginning, greedy
from grpo.metrics import is_entry, load_metrics
from grpo.models import load
from grpo.sampling import left_pad, prefill
from tasks.arithmetic import Arithmetic
from tasks.base import Problem
from tasks.unrelated import QUESTIONS
from tests import zoo
from tests.conftest import tiny_model
from tests.runs import a_tiny_model, options

TASK = Arithmetic()


@pytest.fixture(scope="module")
def starter():
    return load("starter", torch.device("cpu"))


@pytest.fixture
def few(monkeypatch):
    """Small exams, and no plots."""
    monkeypatch.setattr(examiner, "TEST_PROBLEMS", 8)
    monkeypatch.setattr(examiner, "SKILL_PROBLEMS", 4)
    monkeypatch.setattr(trainer, "draw_all", lambda *_: [])


def moved(lm, amount=0.01):
    """The same model with other weights."""
    model = copy.deepcopy(lm.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return replace(lm, model=model)


# --- prompts that share their beginning ---


def some_prompts(lengths=(9, 14, 7, 20, 9), beginning=5):
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(3, 50, (beginning,), generator=generator).tolist()
    return [[*start, 3 + i, *torch.randint(3, 50, (n,), generator=generator).tolist()] for i, n in enumerate(lengths)]


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("beginning", [1, 3, 5])
def test_a_shared_beginning_gives_the_same_logits_and_cache(kind, beginning):
    model, prompts = tiny_model(kind), some_prompts()
    ids, mask = left_pad(prompts, 0, torch.device("cpu"))
    with torch.no_grad():
        _, apart = prefill(model, ids, mask)
        cache, together = prefill(model, ids, mask, beginning)
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=1e-4)
    assert cache.get_seq_length() == ids.shape[1]
    assert can_begin_together(model, prompts, 0)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_greedy_tokens_are_the_same_together_apart_and_alone(kind):
    model, prompts = tiny_model(kind), some_prompts()
    apart, together = (greedy(model, prompts, 12, (1,), 0, 3, shared) for shared in (False, True))
    for row, prompt in enumerate(prompts):
        alone = greedy(model, [prompt], 12, (1,), 0, 1, False)
        expected = alone.ids[0, : alone.lengths[0]].tolist()
        for found in (apart, together):
            assert found.ids[row, : found.lengths[row]].tolist() == expected


def test_the_common_beginning_leaves_each_prompt_a_token():
    assert common_beginning([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_beginning([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_beginning([[1, 2], [1, 2, 3]]) == 1
    assert common_beginning([[1], [2]]) == 0


def test_a_model_that_cannot_share_is_asked_prompt_by_prompt():
    class Stateful(torch.nn.Module):
        """Has no cache of keys and values: what it says of the rest depends on the rows before."""

        device = torch.device("cpu")

        def forward(self, input_ids, past_key_values, **_):
            past_key_values.layers = [object()]
            logits = torch.zeros(*input_ids.shape, 50)
            return type("Output", (), {"logits": logits})

    assert not can_begin_together(Stateful(), some_prompts(), 0)


def test_the_examiner_finds_what_plain_evaluation_finds(starter, few):
    found = Examiner(resolve({"eval_problems": 40}), TASK, {}).validate(starter)
    plain = evaluate(starter, TASK, TASK.held_out("validation", 40), 22).to_dict()
    assert {name: found[name] for name in plain} == plain


# --- categories ---


def test_accuracy_by_the_pair_of_operators():
    problems = [Problem(f"{i}", "1", category=c) for i, c in enumerate(["+*", "--", "+*", "--", "+*", ""])]
    texts = ["<answer>1</answer>", "<answer>2</answer>", "<answer>3</answer>", "", "<answer>1</answer>", ""]
    attempts = [TASK.judge(p, text) for p, text in zip(problems, texts, strict=True)]
    table = Evaluation(problems, attempts).to_dict()["categories"]
    assert list(table) == ["+*", "--"]
    assert (table["+*"]["accuracy"], table["+*"]["n"]) == (pytest.approx(2 / 3), 3)
    assert (table["--"]["accuracy"], table["--"]["n"], table["--"]["ci_low"]) == (0.0, 2, pytest.approx(0.0))
    assert TASK.training_problem(0, 1, 0).category in {a + b for a in "+-*" for b in "+-*"}
    assert "categories" not in Evaluation(problems[-1:], attempts[-1:]).to_dict()


@pytest.mark.parametrize(
    "table",
    [3, [], {"+": 3}, {"+": {}}, {"+": {"accuracy": None, "n": 1, "ci_low": 0, "ci_high": 1}}],
)
def test_damaged_categories_are_no_evaluation(table):
    assert not is_entry({"step": 1, "categories": table})
    assert not is_entry({"step": 1, "pass_at_k": {"1": "x"}})
    assert is_entry({"step": 1, "categories": {}, "pass_at_k": {"1": 0.5}, "drift": None})


# --- pass@k ---


def test_pass_at_k_is_a_function_of_the_seed_and_not_of_the_pass(starter):
    problems = TASK.held_out("test", 12)
    first = sampled_passes(starter, TASK, problems, 22, 3, 0)
    assert list(first) == ["1", "2", "3"]
    assert first["1"] <= first["2"] <= first["3"]
    assert sampled_passes(starter, TASK, problems, 22, 3, 0, limit=7) == first
    assert sampled_passes(starter, TASK, problems, 22, 3, 0, together=True) == first
    assert sampled_passes(starter, TASK, problems, 22, 3, 1) != first


# --- drift ---


def test_the_drift_is_0_at_the_start_and_the_mean_difference_after(starter):
    start = StartingAnswers.ask(starter, QUESTIONS[:5], 256)
    assert all(len(answer) <= 24 for answer in start.answers)
    assert start.drift(starter, 256) == 0.0
    other = moved(starter)
    # again, row by row and by another path: one plain forward pass over prompt and answer
    differences = []
    for prompt, answer, before in zip(start.prompts, start.answers, start.logprobs, strict=True):
        with torch.no_grad():
            logits = other.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        now = [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
        differences += [x - y for x, y in zip(before, now, strict=True)]
    assert start.drift(other, 256) == pytest.approx(sum(differences) / len(differences), abs=1e-5)
    assert start.drift(other, 2) == pytest.approx(start.drift(other, 256), abs=1e-5)
    assert start.drift(other, 256) > 0


def test_starting_answers_come_back_from_json_to_the_bit(starter):
    start = StartingAnswers.ask(starter, QUESTIONS, 256)
    text = json.dumps(start.to_dict(), allow_nan=False)
    assert StartingAnswers(**json.loads(text)) == start
    assert are_answers(json.loads(text))
    assert start.logprobs == logprobs_of(starter, start.prompts, start.answers, 256)


def test_a_drift_that_is_not_a_number_is_not_measured(starter):
    start = StartingAnswers.ask(starter, QUESTIONS[:2], 256)
    broken = moved(starter)
    with torch.no_grad():
        next(broken.model.parameters()).fill_(float("nan"))
    assert start.drift(broken, 256) is None


GOOD = {"prompts": [[1, 2]], "answers": [[3]], "logprobs": [[-0.5]]}


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": [["1"]]},
        {"answers": [[3, 4]]},
        {"logprobs": [[None]]},
        {"prompts": []},
        {"answers": [[]]},
        {"x": 1},
    ],
)
def test_starting_answers_that_cannot_be_are_seen(change):
    assert are_answers(GOOD)
    assert not are_answers({**GOOD, **change})


def run(folder, **settings):
    result = CliRunner().invoke(
        train_grpo.main, options(**{"model": folder / "model", "output_dir": folder / "run", **settings})
    )
    assert result.exit_code == 0, result.output
    return load_metrics(folder / "run"), result.stdout


def evals_of(record):
    return [{k: v for k, v in e.items() if "time" not in k} for e in record["evals"]]


def weights_of(folder):
    return newest_checkpoint(folder / "run")[0].policy


def test_a_run_reports_drift_and_goes_on_with_it_exactly(tmp_path, few):
    for name in ("whole", "cut"):
        a_tiny_model(tmp_path / name / "model")
    whole, out = run(tmp_path / "whole", num_iterations=4, pass_at_k=2)
    assert "drift 0." in out
    assert "pass@2" in out
    assert "by category, after" in out
    assert [e["drift"] for e in whole["evals"] if e["step"] == 0] == [0.0] * 2
    assert all(e["drift"] > 0 for e in whole["evals"] if e["step"])
    assert set(whole["evals"][0]["pass_at_k"]) == {"1", "2"}
    assert "drift" in (tmp_path / "whole/run/saved_model/README.md").read_text(encoding="utf-8")
    run(tmp_path / "cut", num_iterations=2, pass_at_k=2)
    again, _ = run(tmp_path / "cut", num_iterations=4, pass_at_k=2)
    by_step = {(e["step"], e["split"]): e for e in evals_of(whole)}
    for entry in evals_of(again):
        assert by_step.get((entry["step"], entry["split"]), entry) == entry


def test_measuring_drift_changes_nothing_that_is_trained(tmp_path, few, monkeypatch):
    for name in ("with", "without"):
        a_tiny_model(tmp_path / name / "model")
    run(tmp_path / "with", num_iterations=3)
    monkeypatch.setattr(Examiner, "remember", lambda *_: None)
    record, _ = run(tmp_path / "without", num_iterations=3)
    assert [e["drift"] for e in record["evals"]] == [None] * len(record["evals"])
    one, two = weights_of(tmp_path / "with"), weights_of(tmp_path / "without")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_that_knows_no_start_goes_on_without_drift(tmp_path, few, monkeypatch):
    a_tiny_model(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(Examiner, "remember", lambda *_: None)  # as earlier versions
        run(tmp_path, num_iterations=2)
    record, _ = run(tmp_path, num_iterations=4)
    assert record["evals"][-1]["drift"] is None


# --- inference.py --evaluate ---


def examine(*arguments):
    return CliRunner().invoke(inference.main, ["--evaluate", "--device", "cpu", *map(str, arguments)])


def test_two_models_are_measured_with_the_prompts_of_the_last_and_compared(tmp_path, few):
    a_tiny_model(tmp_path / "model")
    record, _ = run(tmp_path, num_iterations=4)
    tests = [e for e in record["evals"] if e["split"] == "test"]
    result = examine("--model", tmp_path / "run/saved_model", "--compare")
    assert result.exit_code == 0, result.output
    assert "up to 6 tokens" in result.stdout
    [line] = [line for line in result.stdout.splitlines() if line.startswith("test")]
    for entry in tests:
        assert f"{100 * entry['accuracy']:.1f}% [" in line
    difference = 100 * (tests[1]["accuracy"] - tests[0]["accuracy"])
    assert f"{difference:+.1f} [" in line
    assert f"{tests[1]['drift']:.3f} nats a token" in result.stdout
    twice = examine("--model", tmp_path / "model", "--model", tmp_path / "run/saved_model")
    assert twice.stdout.splitlines()[2:] == result.stdout.splitlines()[2:]


def test_one_model_on_validation_and_another_range(few):
    result = examine("--model", "starter", "--split", "validation", "--max-operand", "2", "--pass-at-k", "1")
    assert result.exit_code == 0, result.output
    assert "validation" in result.stdout
    assert "pass@1" in result.stdout
    assert "difference" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--evaluate", "What is 1 + 1?"], 2, "no questions"),
        (["--evaluate", "--temperature", "1"], 2, "greedily"),
        (["--evaluate", "--model", "a", "--model", "b", "--compare"], 2, "--compare"),
        (["--evaluate", "--max-operand", "0"], 2, "max_operand"),
        (["--evaluate", "--task", "jsonl"], 1, "--data"),
        (["--evaluate", "--model", "starter", "--compare"], 1, "trained from"),
        (["--evaluate", "--model", "/no/such/folder"], 1, "no such folder"),
        (["--split", "test", "What is 1 + 1?"], 2, "--split"),
        (["--model", "a", "--model", "b", "What is 1 + 1?"], 2, "twice"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(arguments, status, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(inference.main, arguments)
    assert result.exit_code == status, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
