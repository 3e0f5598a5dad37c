"""JSON Lines files of problems, and the line that a malformed one is refused with."""

import json
import textwrap
from pathlib import Path

import pytest

import tasks

PEOPLE = ("Ann", "Ben", "Cleo", "Dan")
GSM8K_ROWS = [  # in the published format, made up here
    {
        "question": f"{name} picks {a} baskets of {b} apples. How many apples is that?",
        "answer": f"{name} picks {a} * {b} = <<{a}*{b}={a * b}>>{a * b} apples.\n#### {a * b:,}",
    }
    for name in PEOPLE
    for a in range(3, 13)
    for b in (7, 250)
]


def town_rows(n=200):
    """Return rows of the jsonl task whose answers are texts, with a column `level`."""
    return [{"question": f"What is town {i} called?", "answer": f"Town {i}", "level": i % 3} for i in range(n)]


def write(path, rows):
    """Write rows to a JSON Lines file and return its path as text; a row that is a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def example_task():
    """Return the file that the page of tasks shows as a task of one's own."""
    page = (Path(tasks.__file__).parent / "README.md").read_text(encoding="utf-8")
    return textwrap.dedent(
        page[page.index('    """Name a multiple') : page.index("    python train_grpo.py --task mul")]
    )


def refusal(load, *args, **more):
    """Return the message of the ValueError that a call must raise, which must be one printable line."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        load(*args, **more)
    assert str(caught.value).isprintable()
    return str(caught.value)
