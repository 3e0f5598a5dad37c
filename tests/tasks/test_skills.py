"""The neighbouring skills: their problems, their splits and what they accept as an answer."""

from itertools import pairwise

import pytest

from tasks.base import Problem
from tasks.skills import SKILLS
from tests.helpers.tasks import MEANING, reward_of


@pytest.mark.parametrize("name", SKILLS)
def test_the_right_completion_of_a_skill_scores_1_and_a_wrong_one_0(name):
    skill = SKILLS[name]
    problems = [skill.training_problem(0, step, 0) for step in range(100)] + skill.held_out("test", 100)
    for problem, other in pairwise(problems):
        right = skill.completion(problem)
        reward = reward_of(skill, problem, right, ["exact=1"])
        assert (reward.total, reward.correct, reward.well_formed) == (1.0, True, True)
        assert reward_of(skill, problem, f"{right}\n").correct
        wrong = [right + "!", right + " .", right[:-1], problem.question, "", "0" + right + "0"]
        if other.answer != problem.answer:
            wrong.append(skill.completion(other))
        for completion in wrong:
            reward = reward_of(skill, problem, completion, ["exact=1"])
            assert (reward.total, reward.correct) == (0.0, False), completion


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("single", "What is 4 - 9?", "-5"),
        ("larger", "Which is larger, 47 or 83?", "83"),
        ("backwards", "Spell stone backwards.", "enots"),
        ("letters", "How many letters are in stone?", "5"),
    ],
)
def test_the_skills_of_the_docstring(name, question, answer):
    assert SKILLS[name].grade(Problem(question, answer), SKILLS[name].completion(Problem(question, answer))).correct


def test_the_gold_answers_of_the_skills_agree_with_an_independent_computation():
    def single(question):
        a, op, b = question.removeprefix("What is ").removesuffix("?").split(" ")
        return MEANING[op](int(a), int(b))

    def larger(question):
        return max(int(word.strip(",?")) for word in question.split(" ") if word.strip(",?").isdigit())

    def backwards(question):
        return "".join(reversed(question.split(" ")[1]))

    def letters(question):
        return len(question.split(" ")[5]) - len("?")

    solvers = {"single": single, "larger": larger, "backwards": backwards, "letters": letters}
    assert set(solvers) == set(SKILLS)
    for name, skill in SKILLS.items():
        for problem in skill.held_out("test", 300):
            assert problem.answer == str(solvers[name](problem.question)), problem


@pytest.mark.parametrize("name", ["single", "larger"])
def test_several_answers_are_no_answer_in_a_tagged_skill_either(name):
    # The task accepts exactly one block. A skill that accepted the last of many would not show that a policy has
    # learned to write many.
    skill = SKILLS[name]
    problem = skill.held_out("test", 1)[0]
    for before in ("<answer>123</answer>", "<answer>", "</answer>", f"<answer>{problem.answer}</answer>"):
        assert not reward_of(skill, problem, before + skill.completion(problem)).correct, before


@pytest.mark.parametrize("name", SKILLS)
def test_a_skill_is_not_trained_on_what_it_is_measured_on(name):
    skill = SKILLS[name]
    held_out = {split: skill.held_out(split, 500) for split in ("validation", "test")}
    questions = {split: {problem.question for problem in problems} for split, problems in held_out.items()}
    for split, problems in held_out.items():
        assert len(problems) >= 300
        assert len(questions[split]) == len(problems)
    assert not questions["validation"] & questions["test"]
    trained = {skill.training_problem(0, step, row).question for step in range(500) for row in range(4)}
    assert not trained & (questions["validation"] | questions["test"])
    if name == "single":  # a + b and b + a are one problem
        spelled_backwards = {f"What is {' '.join(reversed(q[8:-1].split(' ')))}?" for q in trained if " - " not in q}
        assert not spelled_backwards & (questions["validation"] | questions["test"])


@pytest.mark.parametrize("name", SKILLS)
def test_the_problems_of_a_skill_are_always_the_same(name):
    skill = SKILLS[name]
    assert skill.held_out("test", 50) == skill.held_out("test", 50)
    assert len(skill.held_out("test", 50)) == 50
    assert skill.training_problem(1, 2, 3) == skill.training_problem(1, 2, 3)
    assert len({skill.training_problem(1, step, 3).question for step in range(50)}) > 25
