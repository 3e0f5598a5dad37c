"""Print to the terminal: break long lines, escape unsafe characters, draw a progress bar, hide useless warnings."""

import os
import re
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TextIO

import click
from tqdm import tqdm
from tqdm.utils import disp_len

WIDEST = 100  # A paragraph is at most this many columns wide.
BAR_COLUMNS = 44  # Columns that a progress bar needs besides its values and step numbers.
CELL = re.compile("( *)([^ ]+(?: [^ ]+)*)")  # Two or more spaces separate the cells of a table.
PLAIN_LINE_SECONDS = 15.0  # Without a terminal, progress is printed at most every 15 s, and after the last step.


def printable(text: str) -> str:
    """Escape every control character of a text, line breaks too, so that a model's output cannot move the cursor.

    >>> printable("4 - 9 = -5\\n\\x1b[2J")
    '4 - 9 = -5\\\\n\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def make_streams_safe() -> None:
    """Keep printing from raising errors: escape characters that the encoding lacks, and replace a closed output."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, it stays open to the end
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def paint(text: str, colour: str) -> str:
    """Colour a text, for example "green". Return it unchanged if there is no terminal, or if NO_COLOR is set."""
    plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    return text if plain else click.style(text, fg=colour)


def fitted(text: str, width: int) -> str:
    """Cut a text to at most `width` columns. A Chinese character takes two columns."""
    if disp_len(text) <= width:
        return text
    text = text[: max(0, width)]
    while text and disp_len(text) > width - 1:
        text = text[:-1]
    return text + "…" * (width > 0)


def width() -> int:
    """Return the number of columns of the terminal, at least 40; 100 if there is no terminal."""
    return max(40, shutil.get_terminal_size((100, 24)).columns)


def terminal_columns() -> int | None:
    """Return the value of COLUMNS if it is set, else the width of the terminal; None if there is no terminal."""
    return shutil.get_terminal_size((0, 24)).columns or None


def folded(text: str, columns: int, indent: int | None = None) -> str:
    """Break lines that are longer than `columns`: between table cells if they fit on a line, else between words.

    Continuation lines are indented by `indent` columns, by default by 4 more than the line. No word is ever broken.

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
    """Break lines that are too long for the terminal; return the text unchanged if the width is not known."""
    columns = terminal_columns()
    return folded(text, columns - 1) if columns else text  # some terminals wrap a line that fills the last column


def say(text: str = "", file: TextIO | None = None) -> None:
    """Print a text on standard output, or to `file`. A progress bar stays below it."""
    file = file or sys.stdout
    tqdm.write(for_terminal(text), file=file)
    file.flush()


def paragraph(text: str, indent: int) -> None:
    """Print a text, escaped and wrapped. All lines except the first are indented by `indent`."""
    say(folded(printable(text), min(WIDEST, width()) - 1, indent))


def command_line(before: str, words: Sequence[str], optional: Sequence[str] = ()) -> str:
    """Return `before` and a command, which is quoted for the shell and broken into lines with backslashes.

    The `optional` words at the end of the command are left out if one of them is too long for a line.
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


def show_command(before: str, words: Sequence[str]) -> None:
    """Print the text `before`, then a command. No word is broken, because the shell would misread a broken word."""
    tqdm.write(before, file=sys.stdout)
    tqdm.write(command_line("   ", words), file=sys.stdout)
    sys.stdout.flush()


class ProgressBar:
    """A progress bar on standard error; if standard error is not a terminal, a plain line now and then."""

    def __init__(self, first: int, total: int, name: str = "") -> None:
        """Begin after `first` of `total` steps. `name` is the kind of step, empty for GRPO."""
        self.total, self.name = total, f"{name} " if name else ""
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(initial=first, total=total, desc=name or "GRPO", unit="step", dynamic_ncols=True)
        self._started = self._printed = time.monotonic()
        self._first = first

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """Show that step number `step`, counted from 1, is done, with its values by name."""
        shown = {name: "-" if value is None else f"{value:.3f}" for name, value in values.items()}
        if self._bar is not None:
            room = width() - BAR_COLUMNS - 2 * len(str(self.total))
            while shown and len(", ".join(f"{name}={value}" for name, value in shown.items())) > room:
                shown.popitem()  # a value that does not fit is not shown at all
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(1)
            return
        now = time.monotonic()
        if now - self._printed > PLAIN_LINE_SECONDS or step == self.total:
            self._printed = now
            rate = (now - self._started) / (step - self._first)
            left = duration(rate * (self.total - step))
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            line = f"{self.name}step {step}/{self.total}  {text}  {rate:.2f} s/step, {left} left"
            print(for_terminal(line), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop drawing, and leave the bar on the terminal."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float, decimals: bool = False) -> str:
    """Format seconds as 42 s, 3 min 20 s, or 2 h 05 min; with `decimals`, less than 10 s as 0.52 s or 4.2 s."""
    if decimals and seconds < 9.95:
        return f"{seconds:.2g} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Suppress the warnings of libraries in the block. A user can do nothing about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
