"""The arithmetic task: `(a op b) op c`.

    What is (4 - 9) * 6?      <answer>-30</answer>

Operands are integers from `min_operand` to `max_operand`; a negative operand is written in brackets, as in
(4 - (-9)) * 6. Operators are +, - and *. The category of a problem is its two operators: `-*` for the example above.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from operator import add, mul, sub
from typing import Annotated

from tasks.base import Option, Problem, seeded_rng, split_of
from tasks.common.qa_task import QATask

OPERATIONS = {"+": add, "-": sub, "*": mul}
OPERATORS = tuple(OPERATIONS)
LARGEST_OPERAND = 100_000  # A product of three operands has at most 16 digits, and the parser accepts 18.
HINTS = {
    "too_easy": "Raise --max-operand.",
    "too_hard": "Lower --max-operand.",
    "overfitting": "Raise --max-operand, so that there are more distinct problems.",
}


@dataclass(frozen=True)
class Expression:
    """The expression (a op b) op2 c."""

    a: int
    op: str
    b: int
    op2: str
    c: int

    @property
    def inner(self) -> int:
        """Return the value of a op b."""
        return OPERATIONS[self.op](self.a, self.b)

    @property
    def value(self) -> int:
        """Return the value of the whole expression."""
        return OPERATIONS[self.op2](self.inner, self.c)

    @property
    def steps(self) -> tuple[str, str]:
        """Return both steps, such as `4 - 9 = -5` and `(-5) * 6 = -30`."""
        first = f"{operand(self.a)} {self.op} {operand(self.b)} = {self.inner}"
        return first, f"{operand(self.inner)} {self.op2} {operand(self.c)} = {self.value}"

    @property
    def key(self) -> str:
        """Return a text that expressions share if they differ only in the order or grouping of terms or factors.

        For example, (a - b) + c, (a + c) - b and (c - b) + a are one problem. So are (a * b) * c and (c * a) * b, and
        also (a + b) * c and (b + a) * c.
        """
        inner = [self.a, -self.b if self.op == "-" else self.b]
        last = -self.c if self.op2 == "-" else self.c
        inner_kind = "product" if self.op == "*" else "sum"
        outer_kind = "product" if self.op2 == "*" else "sum"
        if inner_kind == outer_kind:
            return f"{inner_kind} of {sorted([*inner, last])}"
        return f"{outer_kind} of {last} and the {inner_kind} of {sorted(inner)}"

    def __str__(self) -> str:
        return f"({operand(self.a)} {self.op} {operand(self.b)}) {self.op2} {operand(self.c)}"


def operand(value: int) -> str:
    """Return a number as it is written in an expression: in brackets if negative, so that no two signs meet."""
    return f"({value})" if value < 0 else str(value)


@dataclass(frozen=True)
class Arithmetic(QATask):
    """The arithmetic task (`tasks.base.Task`)."""

    max_operand: Annotated[int, Option("largest operand", least=1)] = 10
    min_operand: Annotated[int, Option("smallest operand; a negative one is written in brackets")] = 0
    _: KW_ONLY
    name: str = "arithmetic"
    example: str = "What is (4 - 9) * 6?"
    hints: Mapping[str, str] = field(default_factory=lambda: HINTS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.max_operand <= LARGEST_OPERAND:
            raise ValueError(f"--max-operand is {self.max_operand}; it must be from 1 to {LARGEST_OPERAND}")
        if not -LARGEST_OPERAND <= self.min_operand <= self.max_operand:
            raise ValueError(
                f"--min-operand is {self.min_operand}; it must be from -{LARGEST_OPERAND} to --max-operand, "
                f"{self.max_operand}"
            )

    @property
    def operands(self) -> range:
        """Return the range of the operands."""
        return range(self.min_operand, self.max_operand + 1)

    @property
    def size(self) -> int:
        """Return the number of expressions; different spellings of the same problem count separately."""
        return len(self.operands) ** 3 * len(OPERATORS) ** 2

    def expression(self, index: int) -> Expression:
        """Return expression number `index`, from 0 to size - 1."""
        numbers = self.operands
        n = len(numbers)
        index, c = divmod(index, n)
        index, b = divmod(index, n)
        index, a = divmod(index, n)
        op, op2 = divmod(index, len(OPERATORS))
        return Expression(numbers[a], OPERATORS[op], numbers[b], OPERATORS[op2], numbers[c])

    def training_expression(self, *place: object) -> Expression:
        """Return a training expression, drawn uniformly; it depends only on `place`, such as (seed, step, row)."""
        rng = seeded_rng("arithmetic", *place)
        while True:
            expression = self.expression(rng.randrange(self.size))
            if split_of(expression.key) == "train":
                return expression

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """Return training problem number `row` of step `step`."""
        return _problem(self.training_expression(seed, step, row))

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Return up to `limit` problems of a held-out split. Raises ValueError if the split has none.

        No two of them are different spellings of the same problem.
        """
        order = seeded_rng("arithmetic", split).sample(range(self.size), min(self.size, 40 * limit + 1000))
        chosen: dict[str, Problem] = {}
        for expression in map(self.expression, order):
            if len(chosen) == limit:
                break
            if split_of(expression.key) == split:
                chosen.setdefault(expression.key, _problem(expression))
        if not chosen:
            raise ValueError(
                f"--min-operand {self.min_operand} and --max-operand {self.max_operand} leave no {split} problems; "
                "take a wider range"
            )
        return list(chosen.values())


def _problem(expression: Expression) -> Problem:
    return Problem(
        f"What is {expression}?",
        str(expression.value),
        category=expression.op + expression.op2,
        working="\n".join(expression.steps),
    )
