"""Problems, tasks of numbers, and the reward of one completion."""

import operator
from contextlib import nullcontext

from tasks.arithmetic import Arithmetic
from tasks.base import Problem
from tasks.common.rows import Rows
from tasks.rewards import REWARDS, parse_rewards, score

TASK = Arithmetic()
SUM = Problem("What is (4 - 9) * 6?", "-30")
WORD = Problem("Spell batori backwards.", "irotab")
MEANING = {"+": operator.add, "-": operator.sub, "*": operator.mul}  # the operators without a function of the project


def numbers_task(style="reasoning"):
    """Return a task of numbers without problems, which can grade any."""
    return Rows(name="gsm8k", problems={}, files={}, kind="number", style=style)


def value(name, completion, problem=SUM, task=TASK):
    """Return what a named reward pays for a completion."""
    return REWARDS[name](task.grade(problem, completion))


def untimed(name):
    """Stand in for the clock of `score`, which times each reward function."""
    return nullcontext()


def reward_of(task, problem, completion, specs=()):
    """Return the reward of one completion, by these `NAME=WEIGHT` or else by the task's own weights."""
    [reward] = score(parse_rewards(specs, task.default_rewards), [task.grade(problem, completion)], {}, untimed)
    return reward
