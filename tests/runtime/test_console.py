"""Text on the terminal."""

import shlex
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.runtime import console


def test_colours_are_for_terminals_only_and_never_with_no_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert console.paint("right", "green") == "right"
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    assert console.paint("right", "green") == "\x1b[32mright\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.paint("right", "green") == "right"


@pytest.mark.parametrize(
    ("text", "columns", "lines"),
    [
        ("step 10  reward 0.5  best", 30, ["step 10  reward 0.5  best"]),
        ("step 10  reward 0.5  best", 24, ["step 10  reward 0.5", "    best"]),
        ("  a row  of two cells", 12, ["  a row  of", "      two", "      cells"]),
        ("a long sentence of words", 10, ["a long", "    sentence", "    of", "    words"]),
        ("one/" * 5 + " b", 10, ["one/" * 5, "    b"]),  # a word that is too long stays whole
        ("\n  x\n", 10, ["", "  x", ""]),
        ("\x1b[31mred\x1b[0m blue", 8, ["\x1b[31mred\x1b[0m blue"]),  # colours take no room
        ("你好 你好", 6, ["你好", "    你好"]),  # two columns a letter
    ],
)
def test_lines_break_between_cells_if_they_can_and_else_between_words(text, columns, lines):
    assert console.folded(text, columns).split("\n") == lines


@given(st.text("ab  -\n", max_size=80), st.integers(1, 30))
def test_folding_keeps_every_word_and_no_line_that_could_be_shorter_is_too_long(text, columns):
    lines = console.folded(text, columns, 0).split("\n")
    assert " ".join(lines).split() == text.split()
    assert all(len(line) <= columns or len(line.split()) == 1 for line in lines)


@pytest.mark.parametrize("columns", [40, 60, 140])
def test_a_command_is_broken_as_the_shell_reads_it(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    words = ["python", "inference.py", "--model", "my runs/it's/saved_model", "--compare"]
    text = console.command_line("Next:", words, ["What is 3 * 4?"])
    assert all(len(line) < columns for line in text.split("\n"))
    assert shlex.split(text.removeprefix("Next:").replace("\\\n", " ")) == [*words, "What is 3 * 4?"]
    assert shlex.split(console.command_line("", words, ["x" * 200]).replace("\\\n", " ")) == words


def test_a_text_is_cut_by_columns_not_by_letters():
    assert console.fitted("你好你好", 5) == "你好…"
    assert [console.fitted("abcd", n) for n in (4, 3, 1, 0)] == ["abcd", "ab…", "…", ""]


def test_nothing_is_folded_without_a_terminal(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("os.get_terminal_size", lambda *_: (_ for _ in ()).throw(OSError()))
    console.say("word " * 60 + "end")
    assert capsys.readouterr().out == "word " * 60 + "end\n"


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_a_figure_of_the_progress_bar_is_whole_or_not_there(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = []
    bar = console.ProgressBar(0, 60)
    bar._bar = SimpleNamespace(set_postfix=lambda figures, refresh: shown.append(figures), update=lambda n: None)
    bar.update(1, {"reward": 0.5, "accuracy": 0.25, "kl": None})
    names = list(shown[0])
    assert names == ["reward", "accuracy", "kl"][: {60: 1, 80: 2, 140: 3}[columns]]
