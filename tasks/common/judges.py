"""Compare answers as a person would: with `same_text` by default, or with `--correct choice` or `--correct math`.

Every function accepts any string without an exception and takes time linear in its length.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from tasks.common.parsing import number_and_unit, unmarked

MATH_TOLERANCE = Fraction(1, 1000)  # the largest relative difference that --correct math accepts
_FRACTION = re.compile(
    r"(?P<sign>-?)(?:\\d?frac\{(?P<a>[0-9]{1,18})\}\{(?P<b>[0-9]{1,18})\}|(?P<c>[0-9]{1,18}) ?/ ?(?P<d>[0-9]{1,18}))"
)
_LETTER = re.compile(r"\(?(?P<letter>[A-Za-z])(?:[).:]|$)")  # matches the letter in B, (B), B. and B) Paris
_IN_BRACKETS = re.compile(r"\((?P<letter>\w)\)|(?P<before>\w)[).]")  # matches (B), B) and B. as a whole


def same_text(given: str, answer: str) -> bool:
    r"""Return whether two texts are the same answer: marks, brackets around a letter and a missing unit do not count.

    >>> same_text("2/4", "1/2"), same_text("B", "(B)"), same_text("42", "42 km"), same_text("42 miles", "42 km")
    (True, True, True, False)
    """
    given_value, given_unit = _value(given)
    value, unit = _value(answer)
    return given_value == value and (given_unit == unit or not given_unit or not unit)


def _value(text: str) -> tuple[Fraction | str, str]:
    """Return the number and the unit in a text; if it has no number, the text without marks and an empty unit."""
    text = unmarked(text)
    if match := _IN_BRACKETS.fullmatch(text):
        text = match["letter"] or match["before"]
    if (fraction := _fraction(text)) is not None:
        return fraction, ""
    if (pair := number_and_unit(text)) is not None:
        return Fraction(pair[0]), pair[1]
    return text, ""


def _fraction(text: str) -> Fraction | None:
    r"""Return the value of a fraction, written like 1/2 or \frac{1}{2}; None for any other text."""
    match = _FRACTION.fullmatch(text)
    if match is None or int(match["b"] or match["d"]) == 0:
        return None
    value = Fraction(int(match["a"] or match["c"]), int(match["b"] or match["d"]))
    return -value if match["sign"] else value


def choice(given: str, answer: str, **columns: Any) -> bool:
    """Return whether two answers name the same letter, as in B, (b), `B.` or `B) Paris`, or else are equal texts."""
    letters = [_LETTER.match(unmarked(text)) for text in (given, answer)]
    if None in letters:
        return unmarked(given).casefold() == unmarked(answer).casefold()
    return letters[0]["letter"].casefold() == letters[1]["letter"].casefold()


def math(given: str, answer: str, **columns: Any) -> bool:
    """Return whether two answers have the same value within a thousandth, or else are the same text without spaces.

    A value is a number, a fraction or a percentage, with or without a unit: 0.5, 1/2, 50% and 0.4999 are the same.
    """
    if same_text(given, answer):
        return True
    pairs = [_value(text.rpartition("=")[2].strip()) for text in (unmarked(given), unmarked(answer))]
    if any(isinstance(value, str) for value, _ in pairs):
        return "".join(unmarked(given).split()).casefold() == "".join(unmarked(answer).split()).casefold()
    units = [unit for _, unit in pairs if unit not in ("", "%")]
    if len(set(units)) > 1:
        return False
    first, second = ([value, value / 100] if unit == "%" else [value] for value, unit in pairs)
    return any(abs(a - b) <= MATH_TOLERANCE * abs(b) for a in first for b in second)


JUDGES: dict[str, Callable[..., bool]] = {"choice": choice, "math": math}  # by the name that --correct takes
