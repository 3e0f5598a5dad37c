"""Text on the terminal."""

import sys
from types import SimpleNamespace

from grpo.runtime import console


def test_colours_are_for_terminals_only_and_never_with_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert console.paint("right", "green") == "right"
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    assert console.paint("right", "green") == "\x1b[32mright\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.paint("right", "green") == "right"
