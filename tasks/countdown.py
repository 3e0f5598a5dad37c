"""Countdown: make a target from given numbers. Many answers are right, so an answer is judged by its value.

    Make 46 from 25, 3 and 7, each once, with + - * / and brackets.      <answer>25 + 3 * 7</answer>

A problem is made from a random expression, so it has a solution. Python never runs an answer as code, because a model
wrote it: the functions below split the answer into tokens and evaluate it in exact fractions.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Annotated

from tasks.base import Answer, Option, Problem
from tasks.common.drawn_task import DrawnTask
from tasks.common.qa_task import CLOSE_ENOUGH

LARGEST_TARGET = 100
MAX_NUMBERS = 8  # the largest value of --numbers
MAX_CHARACTERS = 300  # A longer answer is wrong; an expression of 8 numbers, each in brackets, has about 100.
MAX_DIGITS = 6  # A number with more digits makes an answer wrong.
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
SPELLINGS = str.maketrans("×·÷−–", "**/--")
TOKENS_BEGIN_WITH = "0123456789+-*/()"


@dataclass(frozen=True, kw_only=True)
class Countdown(DrawnTask):
    """The countdown task (`tasks.base.Task`)."""

    numbers: Annotated[int, Option("how many numbers a problem gives", least=2)] = 3
    largest_number: Annotated[int, Option("largest of the given numbers", least=2)] = 20
    name: str = "countdown"
    kind: str = "text"
    example: str = "Make 46 from 25, 3 and 7, each once, with + - * / and brackets."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.numbers > MAX_NUMBERS:
            raise ValueError(f"--numbers is {self.numbers}; it must be at most {MAX_NUMBERS}")

    def draw(self, rng: Random) -> Problem:
        """Return a random problem with a target from 1 to 100."""
        while True:
            numbers = [rng.randint(1, self.largest_number) for _ in range(self.numbers)]
            expression, target, steps = _random_expression(rng, numbers)
            if target.denominator == 1 and 1 <= target <= LARGEST_TARGET:
                break
        shown = rng.sample(numbers, len(numbers))
        listed = ", ".join(map(str, shown[:-1]))
        question = f"Make {target} from {listed} and {shown[-1]}, each once, with + - * / and brackets."
        return Problem(question, expression, {"numbers": shown, "target": int(target)}, working="\n".join(steps))

    def key(self, problem: Problem) -> str:
        """Return a text that problems share if they differ only in the order of the numbers."""
        return f"{problem.columns['target']} of {sorted(problem.columns['numbers'])}"

    def is_correct(self, problem: Problem, answer: Answer) -> bool:
        """Return whether an expression uses each number exactly once and has the target as its value."""
        return value(str(answer), problem.columns["numbers"]) == problem.columns["target"]

    def is_close(self, problem: Problem, answer: Answer) -> bool:
        """Return whether an expression uses each number exactly once and has a value within ±1 of the target."""
        result = value(str(answer), problem.columns["numbers"])
        return result is not None and abs(result - problem.columns["target"]) <= CLOSE_ENOUGH


def value(text: str, numbers: list[int]) -> Fraction | None:
    """Return the value of an expression of exactly these numbers; None for any other text.

    `=` and the right value may follow the expression. The time is linear in the length; there is no recursion.

    >>> value("25 + 3 * 7", [3, 7, 25])
    Fraction(46, 1)
    >>> value("(25 + 3) * 7 = 46", [3, 7, 25]) is None
    True
    """
    if len(text) > MAX_CHARACTERS:
        return None
    expression, equals, claimed = text.translate(SPELLINGS).partition("=")
    tokens = re.findall(r"[0-9]+|\S", expression)
    if any(token[0] not in TOKENS_BEGIN_WITH or len(token) > MAX_DIGITS for token in tokens):
        return None
    if sorted(int(token) for token in tokens if token.isdigit()) != sorted(numbers):
        return None
    result = _evaluate(tokens)
    if equals and str(result) != claimed.strip():
        return None
    return result


def _evaluate(tokens: list[str]) -> Fraction | None:
    """Evaluate tokens in the usual order of operations; return None if they are not a valid expression.

    Dijkstra's shunting-yard algorithm: an operator is applied as soon as the next operator does not bind tighter.
    """
    values: list[Fraction] = []
    waiting: list[str] = []  # operators and opening brackets
    after_value = False
    for token in ["(", *tokens, ")"]:
        if token.isdigit() or token == "(":
            if after_value:
                return None
            if token == "(":
                waiting.append(token)
                continue
            values.append(Fraction(int(token)))
            after_value = True
            continue
        if not after_value:  # an operator or a closing bracket must follow a value; numbers have no signs
            return None
        level = PRECEDENCE.get(token, 0)
        while waiting and waiting[-1] != "(" and PRECEDENCE[waiting[-1]] >= level:
            operator = waiting.pop()
            right = values.pop()
            left = values.pop()
            if operator == "/" and right == 0:
                return None
            values.append(_apply(left, operator, right))
        if token != ")":
            waiting.append(token)
            after_value = False
        elif waiting:
            waiting.pop()
        else:
            return None
    return values[0] if len(values) == 1 and not waiting else None


def _apply(left: Fraction, operator: str, right: Fraction) -> Fraction:
    if operator in "+-":
        return left + right if operator == "+" else left - right
    return left * right if operator == "*" else left / right


def _random_expression(rng: Random, numbers: list[int]) -> tuple[str, Fraction, list[str]]:
    """Return a random expression that uses the numbers, its value, and its steps, such as `3 * 7 = 21`."""
    parts = [(str(n), Fraction(n), 3) for n in numbers]  # text, value, precedence: a number binds tightest
    steps = []
    while len(parts) > 1:
        left, a, left_level = parts.pop(rng.randrange(len(parts)))
        right, b, right_level = parts.pop(rng.randrange(len(parts)))
        # Division is allowed only if the quotient is whole, so that every step has whole numbers.
        operator = rng.choice([o for o in PRECEDENCE if o != "/" or (b != 0 and (a / b).denominator == 1)])
        level = PRECEDENCE[operator]
        result = _apply(a, operator, b)
        steps.append(f"{a} {operator} {b} = {result}")
        left = f"({left})" if left_level < level else left
        right = f"({right})" if right_level < level or (right_level == level and operator in "-/") else right
        parts.append((f"{left} {operator} {right}", result, level))
    return parts[0][0], parts[0][1], steps
