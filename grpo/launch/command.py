"""The command of a script: help and errors that break between words on any terminal. Imports nothing heavy."""

import atexit
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import click

from grpo.runtime.console import folded, for_terminal

EXAMPLE = "What is (4 - 9) * 6?"  # of a question
LEFT = 30  # columns of the options, where there is room


class Help(click.HelpFormatter):
    """Help that breaks at spaces only; click itself breaks at hyphens, and its options do not break at all."""

    def write_text(self, text: str) -> None:
        """Write paragraphs."""
        paragraphs = (" ".join(one.split()) for one in text.split("\n\n"))
        self.write("\n\n".join(self._indented(one, self.width) for one in paragraphs) + "\n")

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = LEFT, col_spacing: int = 2) -> None:
        """Write options and their meaning side by side; an option that is too long has lines of its own."""
        left = min(col_max, self.width // 3, max(len(term) for term, _ in rows)) + col_spacing + self.current_indent
        for term, meaning in rows:
            first = self._indented(term, self.width)
            lines = folded(meaning.strip(), self.width - left, 0).split("\n")
            if len(first) + col_spacing <= left:
                first += " " * (left - len(first)) + lines.pop(0)
            self.write("\n".join([first, *(" " * left + line for line in lines if line)]) + "\n")

    def _indented(self, text: str, columns: int) -> str:
        margin = " " * self.current_indent
        return margin + folded(text, columns - len(margin), 0).replace("\n", "\n" + margin)


class _Context(click.Context):
    formatter_class = Help


class Script(click.Command):
    """A command whose help and errors fit the terminal."""

    context_class = _Context

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """Read the arguments."""
        with errors_that_fit():
            return super().make_context(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the script."""
        with errors_that_fit():
            return super().invoke(ctx)


def run_script(command: click.Command) -> None:
    """Run a script and end the process with its status.

    Python takes torch down in one to three seconds, in which nothing is left to do: a stopped run ends without them.
    """
    try:
        command()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            atexit._run_exitfuncs()
            with suppress(OSError):  # what cannot be written is for Python to report
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code or 0)
        raise


@contextmanager
def errors_that_fit() -> Iterator[None]:
    """Break the message of an error between words."""
    try:
        yield
    except click.ClickException as error:
        text = for_terminal(f"Error: {error.format_message()}").removeprefix("Error:").lstrip()
        if isinstance(error, click.UsageError):
            raise click.UsageError(text, error.ctx) from None
        raise click.ClickException(text) from None


class Asking(Script):
    """A command that knows a question without quotes when it sees one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; -5 in a question is no option."""
        words = [arg for arg in args if not arg.startswith("--")]
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if len(words) > 1 and error.option_name[1:2].isdigit():
                raise click.UsageError(without_quotes(words), ctx) from None
            raise


def without_quotes(words: Sequence[str]) -> str:
    """Return what to say where the shell has split a question, or put the names of files in the place of a *."""
    question = EXAMPLE if any(os.path.exists(word) for word in words) else " ".join(words)
    return f"this looks like a question without quotes; write: python inference.py {shlex.quote(question)}"
