"""The task in a JSON Lines file: its splits, the kind of its answers, its prompt and its columns."""

import pytest

from tasks import jsonl
from tasks.common.prompts import STYLES, ideal_completion, system_prompt
from tasks.common.rows import normal
from tasks.rewards.scoring import parse_rewards
from tests.helpers.data import refusal, town_rows, write


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_a_file_with_too_few_rows_is_refused(rows, tmp_path):
    path = write(tmp_path / "few.jsonl", town_rows(rows))
    text = refusal(jsonl.load, path)
    assert f"too few problems ({rows})" in text
    assert "few.jsonl" in text


def test_a_hash_of_the_question_decides_the_split_whatever_its_spelling(tmp_path):
    rows = town_rows(200)
    shouted = [{**row, "question": f"  {row['question'].upper()}\n "} for row in rows]
    task = jsonl.load(write(tmp_path / "d.jsonl", [*rows, *shouted]))
    of_split = {split: {normal(problem.question) for problem in found} for split, found in task.problems.items()}
    assert sum(map(len, of_split.values())) == 200  # no question is in two splits, in whatever spelling
    assert len(of_split["train"]) > 140
    for split in ("validation", "test"):
        assert 5 < len(of_split[split]) < 40
        held_out = task.held_out(split, 10**6)
        assert len(held_out) == len({normal(problem.question) for problem in held_out}) == len(of_split[split])
        assert task.held_out(split, 3) == jsonl.load(str(tmp_path / "d.jsonl")).held_out(split, 3)
        assert len(task.held_out(split, 3)) == 3
    sampled = [task.training_problem(0, step, row) for step in range(300) for row in range(4)]
    assert {normal(problem.question) for problem in sampled} == of_split["train"]
    assert task.training_problem(1, 2, 3) == task.training_problem(1, 2, 3)
    assert sampled[0].columns["level"] in (0, 1, 2)


def test_the_kind_is_integer_or_number_where_all_answers_are_and_each_answers_own_otherwise(tmp_path):
    numbers = [{"question": f"How many are {i}?", "answer": f"{i},000"} for i in range(1, 60)]
    task = jsonl.load(write(tmp_path / "n.jsonl", numbers))
    assert (task.kind, task.default_rewards.get("integer")) == ("integer", None)
    assert task.system_prompt == system_prompt("answer", "integer")
    decimals = [*numbers, {"question": "How much?", "answer": "1.5"}]
    assert jsonl.load(write(tmp_path / "x.jsonl", decimals)).kind == "number"
    assert jsonl.load(str(tmp_path / "n.jsonl"), "reasoning").default_rewards["integer"] == 0.5
    problem = task.training_problem(0, 1, 0)
    for answer in (problem.answer, problem.answer.replace(",", ""), f"{problem.answer}.0"):
        assert task.grade(problem, f"<answer>{answer}</answer>").correct
    mixed = jsonl.load(write(tmp_path / "m.jsonl", [*numbers, *town_rows()]))
    assert mixed.kind == "text"
    assert "integer" not in jsonl.load(str(tmp_path / "m.jsonl"), "reasoning").default_rewards
    assert mixed.grade(problem, f"<answer>{problem.answer.replace(',', '')}</answer>").correct
    for found in mixed.problems.values():
        for problem in found:
            for style in STYLES:
                task = jsonl.load(str(tmp_path / "m.jsonl"), style) if style != "answer" else mixed
                assert task.grade(problem, ideal_completion(problem.answer, style)).correct
            break


def test_a_system_prompt_replaces_that_of_the_style(tmp_path):
    task = jsonl.load(write(tmp_path / "d.jsonl", town_rows()), system_prompt="Be brief.")
    assert task.messages("q") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q"},
    ]


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    first = jsonl.load(write(tmp_path / "d.jsonl", town_rows())).files
    assert first == jsonl.load(str(tmp_path / "d.jsonl")).files
    assert first != jsonl.load(write(tmp_path / "d.jsonl", town_rows(201))).files


def test_the_columns_of_a_row_reach_a_users_reward(tmp_path):
    task = jsonl.load(write(tmp_path / "d.jsonl", town_rows()))
    (tmp_path / "mine.py").write_text("def f(level, **c):\n    return [float(x) for x in level]", encoding="utf-8")
    [reward] = parse_rewards([f"{tmp_path / 'mine.py'}:f=1"], {})
    problems = [task.training_problem(0, 1, row) for row in range(4)]
    attempts = [task.grade(problem, "") for problem in problems]
    assert reward.function(attempts, {}) == [problem.columns["level"] for problem in problems]
