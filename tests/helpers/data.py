"""Helpers of several test files."""

import json

import pytest

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


def write(path, rows):
    """A JSON Lines file of rows; texts are lines as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def refusal(load, *args, **more):
    """The one line that a file is refused with."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        load(*args, **more)
    assert str(caught.value).isprintable()
    return str(caught.value)
