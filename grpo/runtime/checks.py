"""Checks of values read from files. A checkpoint or a metrics file may be damaged, or written by another program."""

from collections.abc import Callable, Mapping
from typing import Any

LARGEST_NUMBER = 10**300  # JSON may hold integers that are too large for a float


def is_count(value: Any) -> bool:
    """Return whether a value can be a count, such as a number of steps: an integer, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_NUMBER


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number that fits into a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER


def is_list_of(is_item: Callable[[Any], bool], value: Any) -> bool:
    """Return whether a value is a list whose items all pass `is_item`."""
    return isinstance(value, list) and all(map(is_item, value))


def check_entries(passed: Mapping[str, bool]) -> None:
    """Raise a ValueError that names the entries whose value in `passed` is False."""
    if wrong := [name for name, is_valid in passed.items() if not is_valid]:
        raise ValueError(f"invalid entries: {', '.join(wrong)}")
