"""What the starter model is trained on: chats and completions from `tasks/`, none of them held out.

Most are problems of the default task, in the wording that `python train_grpo.py` uses and in all others of the
project; the rest are neighbouring skills. Problems that carry are drawn far more often than chance would, because
they are what a model of this size gets wrong.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from random import Random
from typing import TypeVar

from tasks.arithmetic import OPERATORS, Arithmetic, apply
from tasks.base import KINDS, Message, Problem, seeded_rng
from tasks.common.prompts import STYLES, ideal_completion, system_prompt
from tasks.skills import SKILLS

Drawn = TypeVar("Drawn")

SEED = 0
BATCH = 96  # rows a step
OTHER_PROMPTS = 0.35  # of the arithmetic problems, asked in any of PROMPTS, the others in the first
SKILL_SHARE = 0.35  # of all rows
CARRY_SHARE = {"arithmetic": 0.4, "single": 0.5}  # of the problems, drawn until their last operation carries
WIDE_SHARE = 0.6  # of `single`, drawn from larger numbers than it is measured on


def example(step: int, row: int, haste: float) -> tuple[list[Message], str]:
    """Return a row of training data, a chat and the completion to learn, as a pure function of its place."""
    draw = seeded_rng("starter", SEED, step, row)
    if draw.random() < SKILL_SHARE:
        name = draw.choice(["single", *SKILLS])  # single twice: it is the hardest
        skill, carry = SKILLS[name], False
        if name == "single":
            skill, carry = WIDE_SINGLE if draw.random() < WIDE_SHARE else skill, draw.random() < CARRY_SHARE[name]
        problem = _first(
            lambda n: skill.training_problem(SEED, step, row + BATCH * n),
            lambda p: not carry or _carries(int(p.question.split()[2]), int(p.answer)),
        )
        return skill.messages(problem.question), skill.completion(problem)
    task = ARITHMETIC[draw.choice(PROMPTS) if draw.random() < OTHER_PROMPTS else PROMPTS[0]]
    carry = draw.random() < CARRY_SHARE["arithmetic"]
    expression = _first(
        lambda n: task.training_expression(SEED, step, row + BATCH * n),
        lambda e: not carry or _carries(e.inner, e.value),
    )
    working = "" if draw.random() < haste else expression.working
    completion = ideal_completion(str(expression.value), task.style, working)
    return task.messages(f"What is {expression}?"), completion


def _first(draw: Callable[[int], Drawn], suits: Callable[[Drawn], bool]) -> Drawn:
    """Return the first of draw(0), draw(1), … that suits."""
    return next(drawn for drawn in map(draw, count()) if suits(drawn))


def _carries(operand: int, result: int) -> bool:
    """Return whether an operation on a number of two digits or more changes more than its last digit."""
    return abs(operand) > 9 and operand // 10 != result // 10


def _wide_single(rng: Random) -> Problem:
    operator, a, b = rng.choice(OPERATORS), rng.randint(-20, 200), rng.randint(0, 10)
    return Problem(f"What is {a} {operator} {b}?", str(apply(operator, a, b)))


WIDE_SINGLE = replace(SKILLS["single"], make=_wide_single)
# Every wording of the project's own prompts; the first is the one that `python train_grpo.py` uses.
PROMPTS = [(style, kind) for style in STYLES for kind in KINDS]
ARITHMETIC = {
    (style, kind): Arithmetic(style=style, system_prompt=system_prompt(style, kind)) for style, kind in PROMPTS
}
