"""The evaluator: accuracy as a plain evaluation finds it, accuracy by category, and pass@k from samples."""

import pytest

from grpo.evaluation import evaluator
from grpo.evaluation.evaluator import Evaluation, Evaluator, graded
from grpo.generation.decoding import Decoder
from grpo.generation.greedy import greedy
from grpo.generation.probe import probe
from grpo.model_card import resolve
from grpo.record.schema import is_entry
from tasks.arithmetic import Arithmetic
from tasks.base import Problem

TASK = Arithmetic()
EXPANDING = Decoder(expands_cache=True)
SHARING = Decoder(expands_cache=True, shares_prefix=True)


def test_the_evaluator_finds_what_a_plain_evaluation_finds(starter):
    _, decoder = probe(starter, TASK)
    assert decoder.shares_prefix
    found = Evaluator(resolve({"eval_problems": 40}), TASK, {}, decoder).validate(starter)
    problems = TASK.held_out("validation", 40)
    prompts = starter.prompts([TASK.messages(problem.question) for problem in problems])
    plain = graded(starter, TASK, problems, greedy(starter, prompts, 22).rows(with_end=False)).to_dict()
    assert {name: found[name] for name in plain} == plain


def test_accuracy_by_the_pair_of_operators():
    problems = [Problem(f"{i}", "1", category=c) for i, c in enumerate(["+*", "--", "+*", "--", "+*", ""])]
    texts = ["<answer>1</answer>", "<answer>2</answer>", "<answer>3</answer>", "", "<answer>1</answer>", ""]
    attempts = [TASK.grade(p, text) for p, text in zip(problems, texts, strict=True)]
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
    figures = {"accuracy": 0.5, "n": 2, "ci_low": 0.1, "ci_high": 0.9}
    assert is_entry({"step": 1, "tasks": {"reverse": figures}, "accuracy/reverse": None})  # of an older version


def test_pass_at_k_depends_on_the_seed_and_not_on_the_size_of_a_pass(starter, monkeypatch):
    monkeypatch.setattr(evaluator, "TEST_PROBLEMS", 12)

    def pass_at_k(rows=256, seed=0, decoder=EXPANDING):
        config = resolve({"pass_at_k": 3, "seed": seed, "max_new_tokens": 22})
        measure = Evaluator(config, TASK, {}, decoder)
        measure.microbatch.rows = rows
        return measure.sampled(starter, "test")["pass_at_k"]

    first = pass_at_k()
    assert list(first) == ["1", "2", "3"]
    assert first["1"] <= first["2"] <= first["3"]
    assert pass_at_k(rows=7) == first
    assert pass_at_k(decoder=SHARING) == first
    assert pass_at_k(seed=1) != first
