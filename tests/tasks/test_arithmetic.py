"""The arithmetic task: right answers, splits and ranges of operands."""

import re

import pytest

from tasks.arithmetic import OPERATORS, Arithmetic, Expression
from tasks.base import SPLITS, seeded_rng, split_of
from tests.helpers.tasks import MEANING, TASK, fingerprint

EVERYTHING = 10**6  # a limit above the number of problems


def tokens_of(question):
    """Read `What is (a op b) op2 c?` as [a, op, b, op2, c] without a function of the project; accept nothing else."""
    opening, _, rest = question.removeprefix("What is ").removesuffix("?").partition(")")
    assert opening.startswith("(")
    a, op, b = opening[1:].split(" ")
    nothing, op2, c = rest.split(" ")
    assert nothing == ""
    return [int(a), op, int(b), op2, int(c)]


def value_of(question):
    """Return the value that a question asks for."""
    a, op, b, op2, c = tokens_of(question)
    return MEANING[op2](MEANING[op](a, b), c)


def canonical(question):
    """Return a number that is the same for problems which differ only in the order or grouping of operands."""
    return fingerprint(*tokens_of(question))


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
    assert value_of("What is (4 - 9) * 6?") == -30  # the evaluation of this test itself
    problems = [TASK.training_problem(0, step, row) for step in range(200) for row in range(5)]
    for split in ("validation", "test"):
        problems += TASK.held_out(split, EVERYTHING)
    for problem in problems:
        assert problem.answer == str(value_of(problem.question)), problem


def test_the_working_is_the_first_step_and_true():
    for index in range(0, TASK.size, 7):
        expression = TASK.expression(index)
        left, equals, right = expression.steps[0].partition(" = ")
        assert equals
        assert f"({left})" in str(expression)
        assert int(right) == MEANING[expression.op](expression.a, expression.b)


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
    # Of 11 operands: three terms or three factors in any order, 286 each; two added and one subtracted, 66 · 11; one
    # less two, 11 · 66; (a + b) * c, (a * b) + c and (a * b) - c, 66 · 11 each; (a - b) * c, 121 · 11.
    problems = 286 + 286 + 66 * 11 + 11 * 66 + 3 * 66 * 11 + 121 * 11
    assert len(train) + len(validation) + len(test) == problems == 5533
    for split, share in ((train, 0.8), (validation, 0.1), (test, 0.1)):
        # The standard deviation of a share of 10% is 0.40%, of one of 80% 0.54%.
        assert len(split) / problems == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_is_its_split_each_problem_once(split):
    problems = TASK.held_out(split, EVERYTHING)
    forms = {canonical(problem.question) for problem in problems}
    assert len(forms) == len(problems) == {"validation": 503, "test": 508}[split]  # no problem in two spellings
    of_split = [e for e in map(TASK.expression, range(TASK.size)) if split_of(e.key) == split]
    assert len({e.key for e in of_split}) == len(problems)
    assert forms <= {canonical(f"What is {e}?") for e in of_split}  # a + 0 and a - 0 have one key and two forms


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("limit", [1, 2, 7, 100, 500])
def test_held_out_gives_as_many_as_asked_for_and_always_the_same(split, limit):
    problems = TASK.held_out(split, limit)
    assert len(problems) == limit
    assert problems == Arithmetic().held_out(split, limit)
    assert len({canonical(problem.question) for problem in problems}) == limit


@pytest.mark.parametrize("max_operand", [*range(2, 21), 100, 1000])
def test_a_low_limit_finds_problems_wherever_there_are_some(max_operand):
    # From max_operand 2 on, a split has at least 10 problems, so one and three can always be found.
    for split in ("validation", "test"):
        for limit in (1, 3):
            assert len(Arithmetic(max_operand).held_out(split, limit)) == limit


def test_training_problems_are_never_held_out_ones():
    held_out = {canonical(p.question) for split in ("validation", "test") for p in TASK.held_out(split, EVERYTHING)}
    sampled = [TASK.training_problem(7, step, row) for step in range(750) for row in range(4)]
    assert not {canonical(problem.question) for problem in sampled} & held_out
    # 3000 uniform samples from 0.8 · 11979 spellings leave about 9583 · (1 − e^(−3000/9583)) = 2580 different ones.
    assert len({problem.question for problem in sampled}) > 2400


def test_training_problems_are_sampled_uniformly():
    sampled = [tokens_of(TASK.training_problem(1, step, 0).question) for step in range(3000)]
    for place in (1, 3):  # operators: 1000 of each, standard deviation 26
        for op in OPERATORS:
            assert sum(tokens[place] == op for tokens in sampled) == pytest.approx(1000, abs=130)
    for place in (0, 2, 4):  # operands: 273 of each, standard deviation 16
        for value in range(11):
            assert sum(tokens[place] == value for tokens in sampled) == pytest.approx(273, abs=90)


def test_a_training_problem_is_a_function_of_seed_step_and_row():
    places = [(seed, step, row) for seed in (0, 1) for step in (1, 2, 11) for row in (0, 1, 12)]
    first = [TASK.training_problem(*place) for place in places]
    again = [Arithmetic().training_problem(*place) for place in reversed(places)]
    assert first == again[::-1]  # neither the order nor earlier calls matter
    assert len({problem.question for problem in first}) > 15  # of 18 places; a few may coincide
    names = [(1, 1, 11), (1, 11, 1), (11, 1, 1), (1, 111, ""), (111, "", 1)]
    assert len({seeded_rng("x", *name).random() for name in names}) == len(names)  # no two names run together


@pytest.mark.parametrize("max_operand", [1, 2, 3])
def test_a_small_range_works_with_the_problems_it_has(max_operand):
    task = Arithmetic(max_operand=max_operand)
    held_out = set()
    for split in ("validation", "test"):
        problems = task.held_out(split, 500)
        assert problems
        held_out |= {canonical(problem.question) for problem in problems}
    sampled = {canonical(task.training_problem(0, step, 0).question) for step in range(300)}
    assert sampled
    assert not sampled & held_out
    for problem in task.held_out("test", 500):
        assert all(0 <= tokens_of(problem.question)[place] <= max_operand for place in (0, 2, 4))


def test_negative_operands_stand_in_brackets_and_mean_what_python_says():
    assert str(Expression(-4, "-", -9, "*", -6)) == "((-4) - (-9)) * (-6)"
    assert Expression(-4, "-", -9, "*", -6).value == -30  # -4 + 9 = 5, times -6
    assert Expression(-4, "-", 9, "*", 6).steps[0] == "(-4) - 9 = -13"
    task = Arithmetic(5, -3)
    assert task.size == 9**3 * 9  # nine operands from -3 to 5
    problems = [task.training_problem(0, step, 0) for step in range(300)] + task.held_out("test", 300)
    seen = set()
    for problem in problems:
        text = problem.question.removeprefix("What is ").removesuffix("?")
        # read it without a function of the project: no space inside an operand, so no two signs meet
        a, op, b, op2, c = re.fullmatch(r"\((\S+) (.) (\S+)\) (.) (\S+)", text).groups()
        values = [int(x.strip("()")) if x.startswith("(-") else int(x) for x in (a, b, c)]
        assert all((x < 0) == t.startswith("(") for x, t in zip(values, (a, b, c), strict=True))
        assert problem.answer == str(MEANING[op2](MEANING[op](values[0], values[1]), values[2]))
        seen |= set(values)
    assert seen == set(range(-3, 6))
    train = {problem.question for problem in problems[:300]}
    assert not train & {problem.question for problem in problems[300:]}


PINNED_TRAIN = ["What is (5 + 3) - 7?", "What is (2 * 5) * 7?", "What is (1 * 5) * 10?"]
PINNED_TEST = ["What is (3 * 0) - 5?", "What is (2 - 8) * 6?", "What is (0 + 4) - 0?"]


def test_the_problems_of_a_seed_are_those_of_earlier_versions():
    # A run continues with the same problems. Change these only with `checkpoint.FORMAT`, which refuses older runs.
    assert [TASK.training_problem(0, step, row).question for step, row in ((1, 0), (1, 1), (2, 0))] == PINNED_TRAIN
    assert [problem.question for problem in TASK.held_out("test", 3)] == PINNED_TEST


@pytest.mark.parametrize("min_operand", [11, 100_000, -100_001, -(10**20)])
def test_a_smallest_operand_out_of_range_is_refused(min_operand):
    with pytest.raises(ValueError, match="--min-operand") as caught:
        Arithmetic(10, min_operand)
    assert "\n" not in str(caught.value)


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
    assert refusal is None or ("--max-operand" in refusal and "\n" not in refusal)


@pytest.mark.parametrize("max_operand", [0, -1])
def test_a_range_without_problems_is_refused(max_operand):
    with pytest.raises(ValueError, match="--max-operand"):
        Arithmetic(max_operand=max_operand)
