"""The terminal: lines that fit it, a progress bar, text that is safe to print, warnings that nobody can act on."""

import os
import re
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

import click
from tqdm import tqdm
from tqdm.utils import disp_len

WIDEST = 100  # columns of a paragraph
BAR = 44  # columns of a progress bar without its figures, and without the numbers of steps
CELL = re.compile("( *)([^ ]+(?: [^ ]+)*)")  # of a table, where cells are two or more spaces apart
PLAIN_LINE_EVERY = 15.0  # seconds, where there is no terminal to draw a bar on


def printable(text: str) -> str:
    """Return a text on one line with every control character escaped, so that a model cannot move the cursor.

    >>> printable("4 - 9 = -5\\n\\x1b[2J")
    '4 - 9 = -5\\\\n\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def paint(text: str, colour: str) -> str:
    """Colour a text ("green", "red", "cyan") on a terminal; return it unchanged elsewhere, or if NO_COLOR is set."""
    plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    return text if plain else click.style(text, fg=colour)


def fitted(text: str, width: int) -> str:
    """Cut a text to at most `width` columns; a letter of Chinese, say, takes two."""
    if disp_len(text) <= width:
        return text
    text = text[: max(0, width)]
    while text and disp_len(text) > width - 1:
        text = text[:-1]
    return text + "…" * (width > 0)


def width() -> int:
    """Return the columns of the terminal, 100 if there is none."""
    return max(40, shutil.get_terminal_size((100, 24)).columns)


def terminal_columns() -> int | None:
    """Return the columns of the terminal, or COLUMNS if that is set; None if there is neither."""
    return shutil.get_terminal_size((0, 24)).columns or None


def folded(text: str, columns: int, indent: int | None = None) -> str:
    """Break lines that are longer than `columns` at spaces: where cells of a table meet, if they fit, else in a cell.

    What follows a break is indented, by default by 4 more than its line. A longer word stays whole.

    >>> print(folded("step 10  accuracy 70%, n = 500  best so far", 36))
    step 10  accuracy 70%, n = 500
        best so far
    """
    lines = []
    for line in text.split("\n"):
        margin = " " * (len(line) - len(line.lstrip(" ")) + 4 if indent is None else indent)
        current = ""
        for gap, cell in CELL.findall(line):
            if disp_len(current + gap + cell) <= columns:
                current += gap + cell
            elif current.strip() and disp_len(margin + cell) <= columns:
                lines.append(current)
                current = margin + cell
            else:
                for number, word in enumerate(cell.split(" ")):
                    space = " " if number else gap
                    if current.strip() and disp_len(current + space + word) > columns:
                        lines.append(current)
                        current, space = margin, ""
                    current += space + word
        lines.append(current)
    return "\n".join(lines)


def for_terminal(text: str) -> str:
    """Return a text with no line longer than those of the terminal, if there is one or COLUMNS is set."""
    columns = terminal_columns()
    return folded(text, columns - 1) if columns else text  # the last column is left free: some terminals wrap there


def say(text: str = "", file: TextIO | None = None) -> None:
    """Print a result on standard output, or in `file`, above the progress bar if there is one."""
    file = file or sys.stdout
    tqdm.write(for_terminal(text), file=file)
    file.flush()


def paragraph(text: str, indent: int) -> None:
    """Print a text, wrapped and with all lines but the first indented; it may quote a model."""
    say(folded(printable(text), min(WIDEST, width()) - 1, indent))


def command_line(before: str, words: Sequence[str], optional: Sequence[str] = ()) -> str:
    """Return a command, quoted for the shell, after a text; broken between words as the shell reads it.

    `optional` words at its end are left out where they do not fit a line.
    """
    columns = width() - 1
    quoted = [printable(shlex.quote(word)) for word in words]
    tail = [printable(shlex.quote(word)) for word in optional]
    if all(disp_len(word) <= columns - 6 for word in tail):
        quoted += tail
    lines = [before]
    for word in quoted:
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if disp_len(joined) <= columns - 2 or lines[-1] == before:
            lines[-1] = joined
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)


class ProgressBar:
    """A progress bar on standard error; off a terminal, a plain line now and then."""

    def __init__(self, first: int, total: int, name: str = "") -> None:
        """Begin after `first` of `total` steps; `name` says of which kind, if not those of GRPO."""
        self.total, self.name = total, f"{name} " if name else ""
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(initial=first, total=total, desc=name or "GRPO", unit="step", dynamic_ncols=True)
        self._started = self._said = time.monotonic()
        self._first = first

    def update(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Show that `step` (from 1) is done, with its figures."""
        shown = {name: "-" if value is None else f"{value:.3f}" for name, value in figures.items()}
        if self._bar is not None:
            room = width() - BAR - 2 * len(str(self.total))
            while shown and len(", ".join(f"{name}={value}" for name, value in shown.items())) > room:
                shown.popitem()  # a figure is shown whole or not at all
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(1)
            return
        now = time.monotonic()
        if now - self._said > PLAIN_LINE_EVERY or step == self.total:
            self._said = now
            rate = (now - self._started) / (step - self._first)
            left = duration(rate * (self.total - step))
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            said = f"{self.name}step {step}/{self.total}  {text}  {rate:.2f} s/step, {left} left"
            print(for_terminal(said), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop drawing; the bar stays as it is."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Format seconds as 42 s, 3 min 20 s, or 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Suppress library warnings the user cannot act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
