"""How much code one training step runs through: what a reader has to read to audit it, measured.

    python -m tests.test_one_step       print the lines of each file and of each definition that the step enters

The step is `GRPO.step(1)` with the default settings of the starter, in float32 on the CPU. Loading the model, probing
it and making the optimizer come before it and do not count. `sys.setprofile` reports every function that is called;
the backward passes of the project's autograd functions are among them, because on a CPU autograd calls them in the
thread that called `backward`.

Only files of grpo/ and tasks/ count:

- a file, if any of its code is entered;
- a definition: a function or a class at the top level of a file, if it, or code inside it, is entered. A method, a
  nested function, a lambda or a comprehension belongs to the definition around it. The lambdas of a table belong to
  no definition, and methods that `dataclass` writes to no file;
- the lines of these definitions, from decorator to end, with docstrings, comments and blank lines, but without the
  methods of a class that are not entered and the blank line above each.
"""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

from grpo.algorithm.grpo import GRPO
from grpo.model.loading import load_policy
from grpo.model_card import resolve
from tasks.registry import make_task

ROOT = Path(__file__).parents[1]
FOLDERS = ("grpo", "tasks")

# What the step enters today. A bound may be lowered; it may not be raised.
MOST_FILES = 24
MOST_DEFINITIONS = 94
MOST_LINES = 1550

Entered = dict[str, dict[str, int]]  # the lines of each definition that was entered, by file and by name


def starter_step() -> Callable[[], Any]:
    """Load the starter with its default settings; return a function that takes the first step."""
    config = resolve({"device": "cpu", "precision": "float32"})
    device = torch.device(config.device)
    grpo = GRPO(config, make_task(config), load_policy(config, device), device=device)
    return lambda: grpo.step(1)


def entered_code(function: Callable[[], Any]) -> set[CodeType]:
    """Call a function; return every code object that was entered during the call."""
    entered = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return entered


def first_line(node: ast.FunctionDef | ast.ClassDef) -> int:
    """Return the line that a definition begins in, with its decorators."""
    return min(part.lineno for part in (node, *node.decorator_list))


def definitions(source: str, lines: set[int]) -> dict[str, int]:
    """Return the number of lines of each top-level definition of a source that holds one of these line numbers.

    `lines` are the first lines of the code objects that were entered.
    """

    rows = source.splitlines()

    def size(node: ast.FunctionDef | ast.ClassDef) -> int:
        return node.end_lineno - first_line(node) + 1

    def size_in_class(method: ast.FunctionDef) -> int:
        return size(method) + (not rows[first_line(method) - 2].strip())

    def is_entered(node: ast.AST) -> bool:
        return any(first_line(node) <= line <= node.end_lineno for line in lines)

    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and is_entered(node):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            unused = [method for method in methods if isinstance(node, ast.ClassDef) and not is_entered(method)]
            found[node.name] = size(node) - sum(map(size_in_class, unused))
    return found


def measure() -> Entered:
    """Take one step of the starter; return the files and definitions of the project that it enters."""
    lines_by_file: dict[str, set[int]] = {}
    for code in entered_code(starter_step()):
        path = Path(code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in FOLDERS:
            lines_by_file.setdefault(path.relative_to(ROOT).as_posix(), set()).add(code.co_firstlineno)
    return {
        file: definitions((ROOT / file).read_text(encoding="utf-8"), lines) for file, lines in lines_by_file.items()
    }


def total(entered: Entered) -> tuple[int, int, int]:
    """Return the number of files, of definitions and of lines."""
    sizes = [size for found in entered.values() for size in found.values()]
    return len(entered), len(sizes), sum(sizes)


def table(entered: Entered) -> str:
    """Return a text with the files, the longest first, and below each its definitions with their lines."""
    rows = ["{} files, {} definitions, {} lines".format(*total(entered))]
    for file, found in sorted(entered.items(), key=lambda item: -sum(item[1].values())):
        rows.append(f"{sum(found.values()):5} {file}")
        rows += [f"{size:12} {name}" for name, size in sorted(found.items(), key=lambda item: -item[1])]
    return "\n".join(rows)


SOURCE = """
class A:
    x = 1

    def f(self):
        pass

    @property
    def g(self):
        pass

@cache
def h():
    def inner():
        pass
    return inner

table = [lambda: 1]
"""


@pytest.mark.parametrize(
    ("entered", "expected"),
    [
        ({5}, {"A": 5}),  # the 9 lines of A without the 3 of g and the blank line above
        ({8}, {"A": 6}),  # without the 2 of f and the blank line above
        ({5, 8}, {"A": 9}),
        ({12}, {"h": 5}),
        ({14}, {"h": 5}),
        ({5, 12}, {"A": 5, "h": 5}),
        ({18}, {}),
    ],
)
def test_a_definition_has_its_lines_without_the_methods_that_are_not_entered(entered, expected):
    assert definitions(SOURCE, entered) == expected


def test_one_step_runs_through_no_more_code_than_before():
    entered = measure()
    files, count, lines = total(entered)
    assert files <= MOST_FILES, table(entered)
    assert count <= MOST_DEFINITIONS, table(entered)
    assert lines <= MOST_LINES, table(entered)


if __name__ == "__main__":
    print(table(measure()))
