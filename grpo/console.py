"""What a person sees while a run goes on: a progress bar or plain lines, and text that is safe to print."""

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping

import click
from tqdm import tqdm

WIDEST = 100  # columns of a paragraph
PLAIN_LINE_EVERY = 15.0  # seconds, where there is no terminal to draw a bar on


def printable(text: str) -> str:
    """A model's text on one line, with every control character escaped: it cannot move the cursor.

    >>> printable("4 - 9 = -5\\n\\x1b[2J")
    '4 - 9 = -5\\\\n\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def paint(text: str, colour: str) -> str:
    """A text in a colour ("green", "red", "cyan") on a terminal; as it is elsewhere, or with NO_COLOR set."""
    plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    return text if plain else click.style(text, fg=colour)


def fitted(text: str, width: int) -> str:
    """A text that is at most `width` characters long, its end cut off if need be."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def width() -> int:
    """Columns of the terminal, 100 where there is none."""
    return max(40, shutil.get_terminal_size((100, 24)).columns)


def say(text: str = "") -> None:
    """Print a result on standard output, above the bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def paragraph(text: str, indent: int) -> None:
    """Print a text on as many lines as it needs, those after the first indented; it may quote a model."""
    columns = min(WIDEST, width()) - 1
    say("\n".join(textwrap.wrap(printable(text), columns, subsequent_indent=" " * indent, break_on_hyphens=False)))


class Progress:
    """A bar on standard error; off a terminal, a plain line now and then."""

    def __init__(self, first: int, total: int) -> None:
        self.total = total
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(initial=first, total=total, desc="GRPO", unit="step", dynamic_ncols=True)
        self._started = self._said = time.monotonic()
        self._first = first

    def update(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Step number `step` (from 1) is done; show its figures."""
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
                f"step {step}/{self.total}  {text}  {rate:.2f} s/step, {left} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
