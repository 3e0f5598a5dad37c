"""Helpers of several test files."""

from tasks.arithmetic import Arithmetic
from tasks.base import Problem
from tasks.common.rows import Rows
from tasks.rewards import REWARDS

SUM = Problem("What is (4 - 9) * 6?", "-30")


WORD = Problem("Spell batori backwards.", "irotab")


def numbers_task(style="reasoning"):
    """A task of numbers whose rows do not matter."""
    return Rows(name="gsm8k", problems={}, files={}, kind="number", style=style)


def value(name, completion, problem=SUM, task=None):
    """What a named reward gives for a completion."""
    return REWARDS[name]((task or Arithmetic()).grade(problem, completion))
