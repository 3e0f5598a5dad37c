"""The tasks: gold answers, splits that do not leak, and rewards that pay for nothing but the right answer."""

import json
import operator
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.arithmetic import OPERATORS, Arithmetic, Expression
from tasks.base import SPLITS, Problem, split_of, stream
from tasks.prompts import STYLES, ideal_completion, system_prompt
from tasks.reverse import Reverse
from tasks.rewards import parse_rewards, score
from tasks.skills import SKILLS

ROOT = Path(__file__).parents[1]
TASK = Arithmetic()


def reward_of(task, problem, completion):
    """The reward of one completion, by the task's own weights."""
    rewards = parse_rewards((), task.default_rewards)
    [reward] = score(rewards, [task.judge(problem, completion)], {}, lambda name: nullcontext())
    return reward


EVERYTHING = 10**6  # a limit above the number of problems
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)  # surrogates included
NEAR_MISS = st.lists(
    st.sampled_from(["<answer>", "</answer>", "<think>", "</think>", "-", "5", "9" * 5000, "٤", " ", "\n", "..."]),
    max_size=8,
).map("".join)


# --- an independent reading of a question: one token at a time, no function of the project ---

MEANING = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def tokens_of(question):
    """`What is (a op b) op2 c?` as [a, op, b, op2, c], and nothing else accepted."""
    opening, _, rest = question.removeprefix("What is ").removesuffix("?").partition(")")
    assert opening.startswith("(")
    a, op, b = opening[1:].split(" ")
    nothing, op2, c = rest.split(" ")
    assert nothing == ""
    return [int(a), op, int(b), op2, int(c)]


def value_of(question):
    """What a question asks for."""
    a, op, b, op2, c = tokens_of(question)
    return MEANING[op2](MEANING[op](a, b), c)


def canonical(question):
    """The problem without its spelling: the two operands of an inner sum or product as a set."""
    a, op, b, op2, c = tokens_of(question)
    return (op, op2, c, frozenset((a, b)) if op in "+*" else (a, b))


# --- arithmetic: gold answers ---


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ((4, "-", 9, "*", 6), "-30"),
        ((0, "+", 0, "+", 0), "0"),
        ((0, "-", 10, "-", 10), "-20"),
        ((10, "*", 10, "*", 10), "1000"),
        ((0, "-", 10, "*", 10), "-100"),
        ((3, "-", 7, "+", 4), "0"),
        ((2, "+", 3, "*", 4), "20"),  # the bracket first: 20, not 14
        ((2, "*", 3, "-", 4), "2"),
        ((5, "-", 5, "*", 9), "0"),  # not -0
        ((1, "-", 2, "-", 3), "-4"),  # left to right: not 1 - (2 - 3) = 2
    ],
)
def test_gold_answers_by_hand(question, answer):
    a, op, b, op2, c = question
    assert str(Expression(*question).value) == answer
    assert str(Expression(*question)) == f"({a} {op} {b}) {op2} {c}"


def test_every_gold_answer_agrees_with_an_independent_evaluation():
    assert value_of("What is (4 - 9) * 6?") == -30  # the judge itself
    problems = [TASK.training_problem(0, step, row) for step in range(200) for row in range(5)]
    for split in ("validation", "test"):
        problems += TASK.held_out(split, EVERYTHING)
    for problem in problems:
        assert problem.answer == str(value_of(problem.question)), problem


def test_the_working_is_the_first_step_and_true():
    for index in range(0, TASK.size, 7):
        expression = TASK.expression(index)
        left, equals, right = expression.working.partition(" = ")
        assert equals
        assert f"({left})" in str(expression)
        assert int(right) == MEANING[expression.op](expression.a, expression.b)


# --- arithmetic: splits ---


def test_the_numbering_reaches_every_expression_once():
    # 11 operands in three places, 3 operators in two: 11³ · 3² = 11979.
    assert TASK.size == 11979
    written = {str(TASK.expression(index)) for index in range(TASK.size)}
    assert len(written) == TASK.size
    expected = {
        f"({a} {op} {b}) {op2} {c}"
        for a in range(11)
        for b in range(11)
        for c in range(11)
        for op in OPERATORS
        for op2 in OPERATORS
    }
    assert written == expected


def test_the_splits_share_no_problem_in_any_spelling():
    of_split = {split: set() for split in SPLITS}
    for index in range(TASK.size):
        expression = TASK.expression(index)
        of_split[split_of(expression.key)].add(canonical(f"What is {expression}?"))
    train, validation, test = (of_split[split] for split in SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test
    # Inner pairs: 66 unordered ones for + and for *, 121 ordered ones for -; times 3 outer operators, 11 operands.
    assert len(train) + len(validation) + len(test) == (66 + 66 + 121) * 3 * 11
    for split, share in ((train, 0.8), (validation, 0.1), (test, 0.1)):
        # 8349 draws: the standard deviation of a share of 10% is 0.33%, of one of 80% 0.44%.
        assert len(split) / 8349 == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_is_its_split_each_problem_once(split):
    problems = TASK.held_out(split, EVERYTHING)
    forms = {canonical(problem.question) for problem in problems}
    assert len(forms) == len(problems)  # no two spellings of one
    assert len(problems) >= 500
    expected = {
        canonical(f"What is {expression}?")
        for expression in map(TASK.expression, range(TASK.size))
        if split_of(expression.key) == split
    }
    assert forms == expected


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("limit", [1, 2, 7, 100, 500])
def test_held_out_gives_as_many_as_asked_for_and_always_the_same(split, limit):
    problems = TASK.held_out(split, limit)
    assert len(problems) == limit
    assert problems == Arithmetic().held_out(split, limit)
    assert len({canonical(problem.question) for problem in problems}) == limit


@pytest.mark.parametrize("max_operand", [*range(2, 21), 100, 1000])
def test_a_low_limit_finds_problems_wherever_there_are_some(max_operand):
    # From 2 on a split has at least 10 problems, so one and three can always be had.
    for split in ("validation", "test"):
        for limit in (1, 3):
            assert len(Arithmetic(max_operand).held_out(split, limit)) == limit


def test_training_problems_are_never_held_out_ones():
    held_out = {canonical(p.question) for split in ("validation", "test") for p in TASK.held_out(split, EVERYTHING)}
    drawn = [TASK.training_problem(7, step, row) for step in range(750) for row in range(4)]
    assert not {canonical(problem.question) for problem in drawn} & held_out
    # 3000 uniform draws from 0.8 · 11979 spellings leave about 9583 · (1 − e^(−3000/9583)) = 2580 different ones.
    assert len({problem.question for problem in drawn}) > 2400


def test_training_problems_are_drawn_uniformly():
    drawn = [tokens_of(TASK.training_problem(1, step, 0).question) for step in range(3000)]
    for place in (1, 3):  # operators: 1000 of each, standard deviation 26
        for op in OPERATORS:
            assert sum(tokens[place] == op for tokens in drawn) == pytest.approx(1000, abs=130)
    for place in (0, 2, 4):  # operands: 273 of each, standard deviation 16
        for value in range(11):
            assert sum(tokens[place] == value for tokens in drawn) == pytest.approx(273, abs=90)


def test_a_training_problem_is_a_function_of_seed_step_and_row():
    places = [(seed, step, row) for seed in (0, 1) for step in (1, 2, 11) for row in (0, 1, 12)]
    first = [TASK.training_problem(*place) for place in places]
    again = [Arithmetic().training_problem(*place) for place in reversed(places)]
    assert first == again[::-1]  # order of asking and earlier questions change nothing
    assert len({problem.question for problem in first}) > 15  # 18 places, hardly a coincidence
    names = [(1, 1, 11), (1, 11, 1), (11, 1, 1), (1, 111, ""), (111, "", 1)]
    assert len({stream("x", *name).random() for name in names}) == len(names)  # numbers do not run together


IN_ANOTHER_PROCESS = """
import json
from tasks.arithmetic import Arithmetic
from tasks.skills import SKILLS
tasks = [Arithmetic(), *SKILLS.values()]
print(json.dumps([
    [[p.question, p.answer] for p in [
        *task.held_out("validation", 60),
        *task.held_out("test", 60),
        *(task.training_problem(3, s, 1) for s in range(60)),
    ]]
    for task in tasks
]))
"""


def test_problems_and_splits_are_the_same_in_every_process():
    # Python's own hash of a string is salted by PYTHONHASHSEED: nothing may depend on it.
    texts = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        texts.append(run.stdout)
    assert texts[0] == texts[1]
    first = TASK.held_out("validation", 60)[0]
    assert json.loads(texts[0])[0][0] == [first.question, first.answer]


def test_a_split_is_pinned():
    # If this changes, every published accuracy is on other problems. `printf '(4 - 9) * 6' | sha256sum` and the like,
    # the first 16 digits modulo 10: 0 is validation, 1 is test.
    by_hand = {"(4 - 9) * 6": "validation", "(1 + 2) + 3": "train", "(0 + 0) + 0": "test"}
    assert {key: split_of(key) for key in by_hand} == by_hand


@pytest.mark.parametrize("max_operand", [1, 2, 3])
def test_a_small_range_works_with_the_problems_it_has(max_operand):
    task = Arithmetic(max_operand=max_operand)
    held_out = set()
    for split in ("validation", "test"):
        problems = task.held_out(split, 500)
        assert problems
        held_out |= {canonical(problem.question) for problem in problems}
    drawn = {canonical(task.training_problem(0, step, 0).question) for step in range(300)}
    assert drawn
    assert not drawn & held_out
    for problem in task.held_out("test", 500):
        assert all(0 <= tokens_of(problem.question)[place] <= max_operand for place in (0, 2, 4))


def test_negative_operands_stand_in_brackets_and_mean_what_python_says():
    assert str(Expression(-4, "-", -9, "*", -6)) == "((-4) - (-9)) * (-6)"
    assert Expression(-4, "-", -9, "*", -6).value == -30  # -4 + 9 = 5, times -6
    assert Expression(-4, "-", 9, "*", 6).working == "(-4) - 9 = -13"
    task = Arithmetic(5, -3)
    assert task.size == 9**3 * 9  # nine operands from -3 to 5
    problems = [task.training_problem(0, step, 0) for step in range(300)] + task.held_out("test", 300)
    seen = set()
    for problem in problems:
        text = problem.question.removeprefix("What is ").removesuffix("?")
        # an independent reading: brackets away, and the text has no two signs that meet
        a, op, b, op2, c = re.fullmatch(r"\((\S+) (.) (\S+)\) (.) (\S+)", text).groups()
        values = [int(x.strip("()")) if x.startswith("(-") else int(x) for x in (a, b, c)]
        assert all((x < 0) == t.startswith("(") for x, t in zip(values, (a, b, c), strict=True))
        assert problem.answer == str(MEANING[op2](MEANING[op](values[0], values[1]), values[2]))
        seen |= set(values)
    assert seen == set(range(-3, 6))
    train = {problem.question for problem in problems[:300]}
    assert not train & {problem.question for problem in problems[300:]}


PINNED_TRAIN = ["What is (6 + 8) + 7?", "What is (2 * 5) * 7?", "What is (1 * 5) * 10?"]
PINNED_TEST = ["What is (2 - 8) + 7?", "What is (6 + 8) - 1?", "What is (8 * 3) + 7?"]


def test_the_problems_of_a_seed_are_those_of_earlier_versions():
    # Pinned before negative operands came: a run of an earlier version goes on with the same problems.
    assert [TASK.training_problem(0, step, row).question for step, row in ((1, 0), (1, 1), (2, 0))] == PINNED_TRAIN
    assert [problem.question for problem in TASK.held_out("test", 3)] == PINNED_TEST


@pytest.mark.parametrize("min_operand", [11, 100_000, -100_001, -(10**20)])
def test_a_least_operand_that_cannot_be_is_refused(min_operand):
    with pytest.raises(ValueError, match="min_operand") as caught:
        Arithmetic(10, min_operand)
    assert "\n" not in str(caught.value)


# --- reverse ---


def test_the_words_are_made_up_pronounceable_and_spelled_backwards():
    task = Reverse()
    problems = [task.training_problem(0, step, row) for step in range(200) for row in range(3)]
    problems += task.held_out("validation", 300) + task.held_out("test", 300)
    for problem in problems:
        [word] = re.fullmatch(r"Spell ([a-z]{4,8}) backwards\.", problem.question).groups()
        assert problem.answer == "".join(reversed(word)) != word
        assert all((a in "aeiou") != (b in "aeiou") for a, b in pairwise(word))
    assert {len(problem.answer) for problem in problems} == {4, 5, 6, 7, 8}


def test_a_word_and_its_reverse_are_in_one_split():
    task = Reverse()
    held_out = {split: task.held_out(split, 1000) for split in ("validation", "test")}
    words = {split: {p.answer for p in problems} for split, problems in held_out.items()}
    assert all(len(problems) == len(words[split]) == 1000 for split, problems in held_out.items())
    train = {task.training_problem(0, step, row).answer for step in range(1000) for row in range(4)}
    for some, others in ((train, words["test"]), (train, words["validation"]), (words["test"], words["validation"])):
        assert not some & (others | {word[::-1] for word in others})
    assert task.training_problem(1, 2, 3) == Reverse().training_problem(1, 2, 3)
    assert task.held_out("test", 7) == Reverse().held_out("test", 7)


WORD = Problem("Spell batori backwards.", "irotab")
TEXT_HACKS = [
    *("", " ", "irotab", WORD.question, system_prompt("answer", "text"), system_prompt("think", "text")),
    *("<answer></answer>", "<answer>...</answer>", "<answer> </answer>", "<answer>batori</answer>"),
    *("<answer>irotab", "irotab</answer>", "<answer>irotab</answer>.", "<answer>irotab</answer>\n\nDone"),
    *("<answer>irotab</answer><|im_end|>", "<answer>irotab</answer>" * 2, "<answer>irotab</answer>" * 100),
    *("<answer>a</answer><answer>irotab</answer>", "<answer><answer>irotab</answer></answer>"),
    *("<answer>irotab</answer></answer>", "<answer>irotab or batori</answer>", "<answer>i-r-o-t-a-b</answer>"),
    *("<answer>IROTAB</answer>", "<answer>irotab.</answer>", "<answer>'irotab'</answer>", "<answer>irota</answer>"),
    *("<answer>'batori'[::-1]</answer>", "<answer>\u0456rotab</answer>", "<answer>irotab\x00</answer>"),
    *("<answer>irotab</answer>\ud800", "<answer>" + "irotab" * 5000 + "</answer>", "<ANSWER>irotab</ANSWER>"),
    *("<answer>irotab<|im_end|></answer>", "<think>irotab</think>", "<answer>ｉｒｏｔａｂ</answer>"),
    "<reasoning>\nx\n</reasoning>\n<answer>\nirotab\nbatori\n</answer>\n",
    "<reasoning>\n<answer>\nirotab\n</answer>\n</reasoning>\n<answer>\nirotab\n</answer>\n",
]


@pytest.mark.parametrize("style", STYLES)
def test_a_hack_of_a_task_of_text_is_paid_less_than_the_answer(style):
    task = Reverse(style=style)
    full = reward_of(task, WORD, ideal_completion("irotab", style))
    assert full.total == sum(task.default_rewards.values())
    assert full.correct
    assert len(TEXT_HACKS) >= 30
    for hack in TEXT_HACKS:
        reward = reward_of(task, WORD, hack)
        assert reward.total < full.total, hack
        assert not reward.correct, hack


@pytest.mark.parametrize("max_operand", [0, -1])
def test_a_range_without_problems_is_refused(max_operand):
    with pytest.raises(ValueError, match="max_operand"):
        Arithmetic(max_operand=max_operand)


@pytest.mark.parametrize("max_operand", [10**5, 10**7, 10**20])
def test_a_huge_range_works_or_is_refused_in_one_line(max_operand):
    try:
        task = Arithmetic(max_operand=max_operand)
        problems = [*task.held_out("validation", 3), task.training_problem(0, 1, 0)]
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = None
        assert all(problem.answer == str(value_of(problem.question)) for problem in problems)
    assert refusal is None or ("max_operand" in refusal and "\n" not in refusal)


# --- arithmetic: the reward ---

PROBLEM = Problem("What is (4 - 9) * 6?", "-30")


@pytest.mark.parametrize(
    ("completion", "total"),
    [
        ("", 0.0),
        ("-30", 0.0),
        ("<answer>...</answer>", 0.0),
        ("<answer>7</answer>", 0.2),  # well-formed
        ("<answer>-32</answer>", 0.2),
        ("<answer>30</answer>", 0.2),
        ("<answer>-29</answer>", 0.4),  # and within ±1
        ("<answer>-31</answer>", 0.4),
        ("<answer>-30</answer>", 1.0),  # and right
        ("4 - 9 = -5\n<answer>-30</answer>", 1.0),
        ("4 - 9 = 5\n<answer>-030</answer>", 1.0),
    ],
)
def test_the_reward_by_hand(completion, total):
    reward = reward_of(TASK, PROBLEM, completion)
    assert reward.total == total
    assert reward.total == sum(reward.parts.values())
    assert tuple(reward.parts) == ("format", "close", "exact")
    assert reward.correct == (total == 1.0)
    assert reward.well_formed == (total > 0.0)


@pytest.mark.parametrize("style", STYLES)
def test_every_ideal_completion_scores_the_full_reward(style):
    task = Arithmetic(style=style)
    full = sum(task.default_rewards.values())
    for index in range(0, task.size, 5):
        expression = task.expression(index)
        problem = Problem(f"What is {expression}?", str(expression.value))
        for working in ("", expression.working):
            reward = reward_of(task, problem, ideal_completion(problem.answer, style, working))
            assert reward.total == full == (4.0 if style == "reasoning" else 1.0)
            assert reward.correct
            assert reward.well_formed


HACKS = [
    "",
    " ",
    "What is (4 - 9) * 6?",
    system_prompt("answer"),
    system_prompt("think"),
    system_prompt("answer") + "<answer>-30</answer>",
    "-30",
    "The answer is -30.",
    "<answer>-30",
    "-30</answer>",
    "<answer></answer>",
    "<answer>...</answer>",
    "<answer>-30</answer>\n",
    "<answer>-30</answer>.",
    "<answer>-30</answer><|im_end|>",
    "<answer>-30</answer>" * 2,
    "<answer>-30</answer>" * 100,
    "<answer>-29</answer><answer>-30</answer>",
    "<answer>-30</answer> or <answer>-29</answer>",
    "<answer>-30</answer></answer>",
    "<answer><answer>-30</answer></answer>",
    "".join(f"<answer>{n}</answer>" for n in range(-40, 0)),
    "<answer>-31 -30 -29</answer>",
    "<answer>-30 or -29</answer>",
    "<answer>(4 - 9) * 6</answer>",
    "<answer>(4-9)*6</answer>",
    "<answer>-30.0</answer>",
    "<answer>-3e1</answer>",
    "<answer>-3_0</answer>",
    "<answer>−30</answer>",
    "<answer>-٣٠</answer>",
    "<answer>-３０</answer>",
    "<answer> -30 </answer>",
    "<answer>--30</answer>",
    "<answer>-30\x00</answer>",
    "<answer>-" + "0" * 5000 + "30</answer>",
    "<answer>" + "9" * 5000 + "</answer>",
    "<answer>99**98**97</answer>",
    "<answer>__import__('os').system('true')</answer>",
    "<answer>nan</answer>",
    "<answer>inf</answer>",
    "<answer>True</answer>",
    "<ANSWER>-30</ANSWER>",
    "\\boxed{-30}",
    "<answer>-30</answer>" + "\ud800",
    "<|im_start|>assistant\n-30<|im_end|>",
]


@pytest.mark.parametrize("hack", HACKS, ids=range(len(HACKS)))
def test_a_hack_is_not_paid_like_an_answer(hack):
    for style in STYLES:
        task = Arithmetic(style=style)
        reward = reward_of(task, PROBLEM, hack)
        assert reward.total < sum(task.default_rewards.values())
        assert not reward.correct
    assert reward_of(TASK, PROBLEM, hack).total == 0.0  # none of them is even well-formed


def test_the_think_style_pays_for_no_answer_outside_its_form():
    task = Arithmetic(style="think")
    for completion in ("<answer>-30</answer>", "x<think></think><answer>-30</answer>", "<think><answer>-30</answer>"):
        assert reward_of(task, PROBLEM, completion).total == 0.0


# --- the neighbouring skills ---


@pytest.mark.parametrize("name", SKILLS)
def test_the_right_completion_of_a_skill_scores_1_and_a_wrong_one_0(name):
    skill = SKILLS[name]
    problems = [skill.training_problem(0, step, 0) for step in range(100)] + skill.held_out("test", 100)
    for problem, other in pairwise(problems):
        right = skill.completion(problem)
        reward = reward_of(skill, problem, right)
        assert (reward.total, reward.correct, reward.well_formed) == (1.0, True, True)
        wrong = [right + " ", right + ".", right[:-1], problem.question, "", "0" + right + "0"]
        if other.answer != problem.answer:
            wrong.append(skill.completion(other))
        for completion in wrong:
            reward = reward_of(skill, problem, completion)
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
    assert SKILLS[name].judge(Problem(question, answer), SKILLS[name].completion(Problem(question, answer))).correct


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

    judges = {"single": single, "larger": larger, "backwards": backwards, "letters": letters}
    assert set(judges) == set(SKILLS)
    for name, skill in SKILLS.items():
        for problem in skill.held_out("test", 300):
            assert problem.answer == str(judges[name](problem.question)), problem


@pytest.mark.parametrize("name", ["single", "larger"])
def test_several_answers_are_no_answer_in_a_tagged_skill_either(name):
    # The task takes exactly one block (PITFALLS 18); a skill that took the last of many would not see a
    # policy that has learned to write many.
    skill = SKILLS[name]
    problem = skill.held_out("test", 1)[0]
    for before in ("<answer>123</answer>", "<answer>", "</answer>", f"<answer>{problem.answer}</answer>"):
        assert reward_of(skill, problem, before + skill.completion(problem)).total == 0.0, before


@pytest.mark.parametrize("name", SKILLS)
def test_a_skill_is_not_trained_on_what_it_is_measured_on(name):
    skill = SKILLS[name]
    held_out = {split: skill.held_out(split, 500) for split in ("validation", "test")}
    questions = {split: {problem.question for problem in problems} for split, problems in held_out.items()}
    for split, problems in held_out.items():
        assert len(problems) >= 300
        assert len(questions[split]) == len(problems)
    assert not questions["validation"] & questions["test"]
    drawn = {skill.training_problem(0, step, row).question for step in range(500) for row in range(4)}
    assert not drawn & (questions["validation"] | questions["test"])
    if name == "single":  # a + b and b + a are one problem
        spelled_backwards = {f"What is {' '.join(reversed(q[8:-1].split(' ')))}?" for q in drawn if " - " not in q}
        assert not spelled_backwards & (questions["validation"] | questions["test"])


@pytest.mark.parametrize("name", SKILLS)
def test_the_problems_of_a_skill_are_always_the_same(name):
    skill = SKILLS[name]
    assert skill.held_out("test", 50) == skill.held_out("test", 50)
    assert len(skill.held_out("test", 50)) == 50
    assert skill.training_problem(1, 2, 3) == skill.training_problem(1, 2, 3)
    assert len({skill.training_problem(1, step, 3).question for step in range(50)}) > 25


# --- every task ---

EVERY_TASK = {
    "arithmetic": TASK,
    "arithmetic, think": Arithmetic(style="think"),
    "arithmetic, reasoning": Arithmetic(style="reasoning"),
    "reverse": Reverse(),
    "reverse, reasoning": Reverse(style="reasoning"),
    **SKILLS,
}


@pytest.mark.parametrize("name", EVERY_TASK)
def test_a_chat_asks_the_question_last_and_says_what_form_is_wanted(name):
    task = EVERY_TASK[name]
    messages = task.messages("What is (4 - 9) * 6?")
    assert messages[-1] == {"role": "user", "content": "What is (4 - 9) * 6?"}
    assert [m["role"] for m in messages] in (["user"], ["system", "user"])
    assert all(type(text) is str for message in messages for text in message.values())


@pytest.mark.parametrize("name", EVERY_TASK)
def test_scoring_never_raises_whatever_the_text(name):
    task = EVERY_TASK[name]
    problem = task.held_out("test", 1)[0]

    @given(st.one_of(ANY_TEXT, NEAR_MISS, st.builds("{}<answer>{}</answer>".format, ANY_TEXT, NEAR_MISS)))
    @settings(max_examples=150, deadline=None)
    def check(text):
        reward = reward_of(task, problem, text)
        assert 0.0 <= reward.total <= sum(task.default_rewards.values())
        assert reward.total == sum(reward.parts.values())
        assert set(reward.parts) == set(task.default_rewards)
        if reward.correct:
            assert problem.answer in text

    check()
