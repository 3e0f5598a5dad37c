"""Problems, tasks of numbers, and the reward of one completion."""

import operator
import random
from contextlib import nullcontext
from functools import cache

from tasks.arithmetic import Arithmetic
from tasks.base import Problem
from tasks.common.rows import Rows
from tasks.rewards.functions import REWARDS
from tasks.rewards.scoring import parse_rewards, score

TASK = Arithmetic()
SUM = Problem("What is (4 - 9) * 6?", "-30")
WORD = Problem("Spell batori backwards.", "irotab")
MEANING = {"+": operator.add, "-": operator.sub, "*": operator.mul}  # the operators without a function of the project

PRIME = 2**61 - 1


@cache
def _random_value(term, negative=False):
    return random.Random(f"{term} {negative}").randrange(PRIME)


def fingerprint(a, op, b, op2, c):
    """Return a number that reordering and regrouping do not change, and that otherwise almost surely differs.

    It is the value of (a op b) op2 c with a random number for each operand, where a - b is a plus another number
    for -b. A sum within a product, or a product within a sum, counts as one term: neither law takes it apart.
    """

    def apply(value, operator, operand):
        if operator == "*":
            return value * _random_value(operand) % PRIME
        return (value + _random_value(operand, negative=operator == "-")) % PRIME

    inner = apply(_random_value(a), op, b)
    if (op == "*") != (op2 == "*"):
        inner = _random_value(inner)
    return apply(inner, op2, c)


def numbers_task(style="reasoning"):
    """Return a task of numbers without problems, which can grade any problem."""
    return Rows(name="gsm8k", problems={}, files={}, kind="number", style=style)


def value(name, completion, problem=SUM, task=TASK):
    """Return the value of a named reward for a completion."""
    return REWARDS[name](task.grade(problem, completion))


def untimed(name):
    """Stand in for the clock of `score`, which times each reward function."""
    return nullcontext()


def reward_of(task, problem, completion, specs=()):
    """Return the reward of one completion, by these `NAME=WEIGHT` or else by the task's own weights."""
    [reward] = score(parse_rewards(specs, task.default_rewards), [task.grade(problem, completion)], {}, untimed)
    return reward
