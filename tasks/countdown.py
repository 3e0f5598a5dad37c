"""Countdown: make a number of given ones. Many answers are right, and each is checked by what it comes to.

    Make 46 from 25, 3 and 7, each once, with + - * / and brackets.      <answer>25 + 3 * 7</answer>

Problems are made from an expression, so each has a solution. An answer is read by a tokenizer and evaluated in exact
fractions here: it is text of a model, and Python never runs it.
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
LONGEST = 300  # characters of an expression; one of 8 numbers, each in brackets of its own, has 100
MOST_DIGITS = 6  # of a number in it
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
SPELLINGS = str.maketrans("×·÷−–", "**/--")
_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")


@dataclass(frozen=True, kw_only=True)
class Countdown(DrawnTask):
    """The task of making a number of others (`tasks.base.Task`)."""

    numbers: Annotated[int, Option("how many numbers a problem gives", least=2)] = 3
    largest_number: Annotated[int, Option("largest of the given numbers", least=2)] = 20
    name: str = "countdown"
    kind: str = "text"
    example: str = "Make 46 from 25, 3 and 7, each once, with + - * / and brackets."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.numbers > 8:
            raise ValueError(f"--numbers is {self.numbers}; it must be at most 8")

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
        """Return a text that problems with the same numbers in another order share."""
        return f"{problem.columns['target']} of {sorted(problem.columns['numbers'])}"

    def is_correct(self, problem: Problem, answer: Answer) -> bool:
        """Return whether an expression has all the numbers, each once, and comes to the target."""
        return value(str(answer), problem.columns["numbers"]) == problem.columns["target"]

    def is_close(self, problem: Problem, answer: Answer) -> bool:
        """Return whether an expression has all the numbers, each once, and comes to the target ± 1."""
        found = value(str(answer), problem.columns["numbers"])
        return found is not None and abs(found - problem.columns["target"]) <= CLOSE_ENOUGH


def value(text: str, numbers: list[int]) -> Fraction | None:
    """Return what an expression of exactly these numbers comes to; None if it is no such expression.

    `=` and the value may follow, if it is the right one. Linear in the length, and without recursion.

    >>> value("25 + 3 * 7", [3, 7, 25])
    Fraction(46, 1)
    >>> value("(25 + 3) * 7 = 46", [3, 7, 25]) is None
    True
    """
    if len(text) > LONGEST:
        return None
    expression, equals, claimed = text.translate(SPELLINGS).partition("=")
    tokens = _tokens(expression)
    if tokens is None or sorted(int(token) for token in tokens if token.isdigit()) != sorted(numbers):
        return None
    found = _evaluate(tokens)
    if equals and str(found) != claimed.strip():
        return None
    return found


def _tokens(text: str) -> list[str] | None:
    """Return numbers, operators and brackets in order; None if there is anything else."""
    tokens, end, text = [], 0, text.rstrip()
    while end < len(text):
        match = _TOKEN.match(text, end)
        if match is None or len(match[1]) > MOST_DIGITS:
            return None
        tokens.append(match[1])
        end = match.end()
    return tokens


def _evaluate(tokens: list[str]) -> Fraction | None:
    """Return the value of tokens in the usual order of operations, by two stacks; None if they are no expression.

    Dijkstra's shunting yard, which evaluates an operator as soon as the next one does not bind tighter.
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
        if not after_value:  # there is no sign before a number
            return None
        level = PRECEDENCE.get(token, 0)
        while waiting and waiting[-1] != "(" and PRECEDENCE[waiting[-1]] >= level:
            right, left, operator = values.pop(), values.pop(), waiting.pop()
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
    """Return a random expression of the numbers, its value, and its steps, such as `3 * 7 = 21`."""
    parts = [(str(n), Fraction(n), 3) for n in numbers]  # text, value, how tightly it holds together
    steps = []
    while len(parts) > 1:
        (left, a, left_level), (right, b, right_level) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        # quotients that are whole, so that the steps are in whole numbers
        fitting = [o for o in PRECEDENCE if o != "/" or (b != 0 and (a / b).denominator == 1)]
        operator = rng.choice(fitting)
        level, result = PRECEDENCE[operator], _apply(a, operator, b)
        steps.append(f"{a} {operator} {b} = {result}")
        left = f"({left})" if left_level < level else left
        right = f"({right})" if right_level < level or (right_level == level and operator in "-/") else right
        parts.append((f"{left} {operator} {right}", result, level))
    return parts[0][0], parts[0][1], steps
