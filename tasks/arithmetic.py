"""The arithmetic task: `(a op b) op c`.

    What is (4 - 9) * 6?      <answer>-30</answer>

Operands are integers from 0 to `max_operand`, operators + - *.
"""

from dataclasses import dataclass

from tasks.base import Message, Problem, Reward, split_of, stream
from tasks.parsing import parse_answer
from tasks.prompts import SYSTEM_PROMPTS, chat
from tasks.rewards import shaped_reward

OPERATORS = ("+", "-", "*")
LARGEST_OPERAND = 100_000  # its cube still fits in the 18 digits that the parser reads
REWARD_WEIGHTS = {"format": 0.2, "close": 0.2, "exact": 0.6}


def apply(operator: str, a: int, b: int) -> int:
    """a op b for one of OPERATORS."""
    if operator == "+":
        return a + b
    return a - b if operator == "-" else a * b


@dataclass(frozen=True)
class Expression:
    """(a op b) op2 c."""

    a: int
    op: str
    b: int
    op2: str
    c: int

    @property
    def inner(self) -> int:
        """The value of a op b."""
        return apply(self.op, self.a, self.b)

    @property
    def value(self) -> int:
        """The value of the whole."""
        return apply(self.op2, self.inner, self.c)

    @property
    def working(self) -> str:
        """The first step, as one would write it down."""
        return f"{self.a} {self.op} {self.b} = {self.inner}"

    @property
    def key(self) -> str:
        """One text for all spellings of the problem: a + b and b + a share a split, as a * b and b * a."""
        a, b = sorted((self.a, self.b)) if self.op in "+*" else (self.a, self.b)
        return f"({a} {self.op} {b}) {self.op2} {self.c}"

    def __str__(self) -> str:
        return f"({self.a} {self.op} {self.b}) {self.op2} {self.c}"


@dataclass(frozen=True)
class Arithmetic:
    """The task, as the trainer sees it (`tasks.base.Task`)."""

    max_operand: int = 10
    style: str = "answer"
    name: str = "arithmetic"
    reward_parts: tuple[str, ...] = tuple(REWARD_WEIGHTS)

    def __post_init__(self) -> None:
        if not 1 <= self.max_operand <= LARGEST_OPERAND:
            raise ValueError(f"max_operand is {self.max_operand}; it must be from 1 to {LARGEST_OPERAND}")

    @property
    def size(self) -> int:
        """How many expressions there are, both spellings of a sum or product counted."""
        return (self.max_operand + 1) ** 3 * len(OPERATORS) ** 2

    def expression(self, index: int) -> Expression:
        """The expression with a number from 0 to size - 1."""
        n, k = self.max_operand + 1, len(OPERATORS)
        index, c = divmod(index, n)
        index, b = divmod(index, n)
        index, a = divmod(index, n)
        op, op2 = divmod(index, k)
        return Expression(a, OPERATORS[op], b, OPERATORS[op2], c)

    def training_expression(self, *place: object) -> Expression:
        """An expression of the training split, drawn uniformly; a pure function of the place."""
        draw = stream("arithmetic", *place)
        while True:
            expression = self.expression(draw.randrange(self.size))
            if split_of(expression.key) == "train":
                return expression

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """The training problem of a place in the run."""
        return _problem(self.training_expression(seed, step, row))

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Up to `limit` problems of a held-out split, no two of them spellings of one problem."""
        order = stream("arithmetic", split).sample(range(self.size), min(self.size, 40 * limit + 1000))
        chosen: dict[str, Problem] = {}
        for expression in map(self.expression, order):
            if len(chosen) == limit:
                break
            if split_of(expression.key) == split:
                chosen.setdefault(expression.key, _problem(expression))
        if not chosen:
            raise ValueError(f"max_operand {self.max_operand} leaves no {split} problems; take a larger one")
        return list(chosen.values())

    def messages(self, question: str) -> list[Message]:
        """The chat that asks `question`."""
        return chat(question, SYSTEM_PROMPTS[self.style])

    def score(self, problem: Problem, completion: str) -> Reward:
        """0.2 for a well-formed completion, 0.2 for a number within ±1, 0.6 for the right one."""
        return shaped_reward(parse_answer(completion, self.style), int(problem.answer), REWARD_WEIGHTS)


def _problem(expression: Expression) -> Problem:
    return Problem(f"What is {expression}?", str(expression.value))
