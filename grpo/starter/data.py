"""Draw the training data of the starter model: chats and completions of training problems from `tasks/`.

Most chats are problems of the default task, with the prompt of `python train_grpo.py` or another prompt of the
project. The others train the skills of `tasks/skills.py`. Problems with a carry are drawn far more often than by
chance, because a model of this size often gets them wrong.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from random import Random
from typing import TypeVar

from tasks.arithmetic import OPERATIONS, OPERATORS, Arithmetic
from tasks.base import KINDS, Message, Problem, seeded_rng
from tasks.common.prompts import FIRST_WORDING, STYLES, ideal_completion, system_prompt
from tasks.skills import SKILLS

Draw = TypeVar("Draw")

SEED = 0
BATCH = 96  # rows a step
SKILL_SHARE = 0.35  # share of the rows that train a skill; the other rows are arithmetic
ANY_PROMPT_SHARE = 0.35  # share of the arithmetic rows with a random prompt of PROMPTS; the others have the first
CARRY_SHARE = 0.4  # share of the arithmetic rows that are drawn again until the last operation carries
SINGLE_CARRY_SHARE = 0.5  # share of the rows of `single` that are drawn again until the operation carries
WIDE_SHARE = 0.6  # share of the rows of `single` with larger numbers than its test problems have


def example(step: int, row: int, direct_share: float) -> tuple[list[Message], str]:
    """Return a row of training data, a chat and its completion, as a pure function of the arguments.

    `direct_share` is the share of arithmetic completions that give only the answer, without the first step.
    """
    draw = seeded_rng("starter", SEED, step, row)
    if draw.random() < SKILL_SHARE:
        name = draw.choice(["single", *SKILLS])  # `single` is in the list twice because it is the hardest
        skill = SKILLS[name]
        carry = False
        if name == "single":
            skill = WIDE_SINGLE if draw.random() < WIDE_SHARE else skill
            carry = draw.random() < SINGLE_CARRY_SHARE
        problem = _first(
            lambda n: skill.training_problem(SEED, step, row + BATCH * n),
            lambda p: not carry or _carries(int(p.question.split()[2]), int(p.answer)),
        )
        return skill.messages(problem.question), skill.completion(problem)
    task = ARITHMETIC[draw.choice(PROMPTS) if draw.random() < ANY_PROMPT_SHARE else PROMPTS[0]]
    carry = draw.random() < CARRY_SHARE
    expression = _first(
        lambda n: task.training_expression(SEED, step, row + BATCH * n),
        lambda e: not carry or _carries(e.inner, e.value),
    )
    working = "" if draw.random() < direct_share else expression.steps[0]
    completion = ideal_completion(str(expression.value), task.style, working)
    return task.messages(f"What is {expression}?"), completion


def _first(draw: Callable[[int], Draw], is_suitable: Callable[[Draw], bool]) -> Draw:
    """Return the first suitable value of draw(0), draw(1), …"""
    return next(filter(is_suitable, map(draw, count())))


def _carries(operand: int, result: int) -> bool:
    """Return whether an operation on a number of two digits or more changes more than its last digit."""
    return abs(operand) > 9 and operand // 10 != result // 10


def _wide_single(rng: Random) -> Problem:
    operator = rng.choice(OPERATORS)
    a = rng.randint(-20, 200)
    b = rng.randint(0, 10)
    return Problem(f"What is {a} {operator} {b}?", str(OPERATIONS[operator](a, b)))


WIDE_SINGLE = replace(SKILLS["single"], make=_wide_single)
# All prompts of the project, by style and kind of answer. `python train_grpo.py` uses the first.
PROMPTS = [(style, kind) for style in STYLES for kind in KINDS]
ARITHMETIC = {
    (style, kind): Arithmetic(style=style, system_prompt=system_prompt(style, kind, FIRST_WORDING))
    for style, kind in PROMPTS
}
