"""The curriculum: its estimates by hand, what it chooses, and that a resumed run chooses the same."""

from types import SimpleNamespace

import pytest

from tasks.arithmetic import Arithmetic
from tasks.base import Problem
from tasks.selection.curriculum import FORGETTING, Curriculum, level_of, mixed

EASY, MIXED, HARD = (Problem(f"Solve {level}.", "1", level=level) for level in ("easy", "mixed", "hard"))


class Levels:
    """A task with a problem of each level, in turn."""

    def training_problem(self, seed, step, row):
        """Return the problem of a candidate: rows of one place are 10**8 apart."""
        return (EASY, MIXED, HARD)[(row // 10**8) % 3]


def test_the_chance_of_a_mixed_group_by_hand():
    assert mixed(0.5, 2) == 0.5
    assert mixed(0.25, 4) == pytest.approx(1 - 1 / 256 - 81 / 256)
    assert mixed(0.0, 8) == mixed(1.0, 8) == 0.0


def test_the_posterior_by_hand():
    curriculum = Curriculum(Levels(), 4)
    assert curriculum.posterior("easy") == (1, 1)
    curriculum.observe([(EASY, 4, 0), (EASY, 3, 1), (HARD, 0, 4)])
    assert curriculum.posterior("easy") == (8, 2)
    assert curriculum.posterior("hard") == (1, 5)
    curriculum.observe([(EASY, 1, 3)])  # what was known counts for less
    assert curriculum.posterior("easy") == pytest.approx((1 + 7 * FORGETTING + 1, 1 + 1 * FORGETTING + 3))
    rates = [right / (right + wrong) for right, wrong in map(curriculum.posterior, ("easy", "mixed"))]
    assert sum(rates) / 2 == pytest.approx((8.3 / (8.3 + 4.9) + 0.5) / 2)
    for _ in range(60):
        curriculum.observe([])
    assert curriculum.counts == {}  # forgotten


def test_what_the_estimates_say_of_a_step_by_hand():
    curriculum = Curriculum(Levels(), 4)
    assert curriculum.figures([EASY, HARD]) == {"level": None, "solve_rate": 0.5}  # nothing is known
    curriculum.observe([(EASY, 4, 0)])
    assert curriculum.figures([EASY, HARD]) == {"level": None, "solve_rate": pytest.approx((5 / 6 + 1 / 2) / 2)}
    curriculum.observe([(EASY, 4, 0), (MIXED, 2, 2), (HARD, 0, 4)])
    new = Problem("Solve this.", "1", level="new")
    figures = curriculum.figures([EASY, HARD, HARD, MIXED, new])
    easy = (1 + 4 * FORGETTING + 4) / (2 + 4 * FORGETTING + 4)
    assert figures["solve_rate"] == pytest.approx((easy + 1 / 6 + 1 / 6 + 1 / 2 + 1 / 2) / 5)
    assert figures["level"] == pytest.approx((0 + 1 + 1 + 0.5) / 4)  # the new one has no place
    curriculum.counts = {"easy": [1.0, 1.0], "mixed": [1.0, 1.0], "hard": [0.0, 4.0]}
    assert curriculum.figures([EASY])["level"] == pytest.approx(0.25)  # the middle of places 0 and 1, of 2


def test_problems_are_drawn_where_groups_are_mixed():
    curriculum = Curriculum(Levels(), 8)
    drawn = [curriculum.problem(0, 1, row) for row in range(100)]
    assert min(drawn.count(problem) for problem in (EASY, MIXED, HARD)) > 10  # nothing is known
    for _ in range(10):
        curriculum.observe([(EASY, 80, 0), (MIXED, 40, 40), (HARD, 0, 80)])
    drawn = [curriculum.problem(0, 2, row) for row in range(200)]
    assert drawn.count(MIXED) == 200
    for _ in range(40):  # what was easy is mixed now, what was mixed has been learned
        curriculum.observe([(EASY, 40, 40), (MIXED, 80, 0), (HARD, 0, 80)])
    drawn = [curriculum.problem(0, 3, row) for row in range(200)]
    assert drawn.count(EASY) > 190


def test_it_is_a_function_of_seed_step_row_and_what_was_seen():
    task = Arithmetic()
    one, other = Curriculum(task, 8), Curriculum(task, 8)
    seen = [(task.training_problem(0, 1, row), row % 9, 8 - row % 9) for row in range(16)]
    one.observe(seen)
    other.counts = dict(one.state_dict())
    places = [(seed, step, row) for seed in (0, 1) for step in (2, 3) for row in range(8)]
    assert [one.problem(*place) for place in places] == [other.problem(*place) for place in places]
    drawn = {one.problem(*place).question for place in places}
    assert len(drawn) > 20
    held_out = {problem.question for split in ("validation", "test") for problem in task.held_out(split, 1000)}
    assert not held_out & drawn


def test_a_problem_without_a_level_is_known_by_itself():
    assert level_of(EASY) == "easy"
    assert level_of(Problem("Why?", "42")) == "Why?"
    assert level_of(Arithmetic().training_problem(0, 1, 0)).split(" to ")[0] in {a + b for a in "+-*" for b in "+-*"}


@pytest.mark.parametrize("state", [None, [], {"a": 1}, {"a": [1]}, {"a": [1, -1]}, {"a": [1, "x"]}, {"a": (1, 1)}])
def test_a_damaged_state_is_recognised(state):
    assert not Curriculum.is_state(state)
    assert Curriculum.is_state({})
    assert Curriculum.is_state(Curriculum(SimpleNamespace(), 8, {"a": [1.5, 2]}).state_dict())
