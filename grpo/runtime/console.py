"""The terminal: a progress bar or plain lines, text that is safe to print, warnings that nobody can act on."""

import os
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import click
from tqdm import tqdm

WIDEST = 100  # columns of a paragraph
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
    """Cut a text to at most `width` characters."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def width() -> int:
    """Return the columns of the terminal, 100 if there is none."""
    return max(40, shutil.get_terminal_size((100, 24)).columns)


def say(text: str = "") -> None:
    """Print a result on standard output, above the progress bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def paragraph(text: str, indent: int) -> None:
    """Print a text, wrapped and with all lines but the first indented; it may quote a model."""
    columns = min(WIDEST, width()) - 1
    say("\n".join(textwrap.wrap(printable(text), columns, subsequent_indent=" " * indent, break_on_hyphens=False)))


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
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(1)
            return
        now = time.monotonic()
        if now - self._said > PLAIN_LINE_EVERY or step == self.total:
            self._said = now
            rate = (now - self._started) / (step - self._first)
            left = duration(rate * (self.total - step))
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(
                f"{self.name}step {step}/{self.total}  {text}  {rate:.2f} s/step, {left} left",
                file=sys.stderr,
                flush=True,
            )

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
