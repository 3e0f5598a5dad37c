"""Run a script's command, with help and errors whose lines break between words. Imports nothing heavy."""

import atexit
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import click

from grpo.runtime.console import folded, for_terminal, make_streams_safe

EXAMPLE = "What is (4 - 9) * 6?"  # an example question for inference.py
OPTION_COLUMNS = 30  # An option that is longer gets its own line in --help.


class Help(click.HelpFormatter):
    """Format help whose lines break only at spaces; click breaks at hyphens too, and never breaks options."""

    def write_text(self, text: str) -> None:
        """Write the paragraphs of a text."""
        paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        self.write("\n\n".join(self._indented(paragraph, self.width) for paragraph in paragraphs) + "\n")

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = OPTION_COLUMNS, col_spacing: int = 2) -> None:
        """Write options and their meanings side by side; an option that is too long gets its own line."""
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
    """Run a command whose help and errors fit the terminal."""

    context_class = _Context

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """Return the context with the parsed arguments."""
        with errors_that_fit():
            return super().make_context(*args, **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the script."""
        with errors_that_fit():
            return super().invoke(ctx)


def run_script(command: click.Command) -> None:
    """Run a script's command and end the process with its exit status. Call this in the script's last line.

    The process ends without torch's own cleanup, which would delay the end of a stopped run by one to three seconds.
    A notebook (`%run`) or any other program that runs the script continues: it gets the SystemExit.
    """
    script = sys._getframe(1)
    is_whole_program = script.f_back is None and not sys.flags.interactive
    make_streams_safe()
    try:
        command()
    except SystemExit as end:
        if is_whole_program and (end.code is None or isinstance(end.code, int)):
            atexit._run_exitfuncs()
            # If flushing fails, `raise` below ends the process, and Python reports the failure.
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code or 0)
        raise
    finally:
        names = script.f_globals
        if not is_whole_program and "get_ipython" not in names:  # %run -i runs in the notebook's namespace
            # %run copies what the script defines over the user's variables of the same name, `train` for example.
            for name in [name for name in names if not name.startswith("__")]:
                del names[name]


@contextmanager
def errors_that_fit() -> Iterator[None]:
    """Wrap the message of a click error between words, to the width of the terminal."""
    try:
        yield
    except click.ClickException as error:
        text = for_terminal(f"Error: {error.format_message()}").removeprefix("Error:").lstrip()
        if isinstance(error, click.UsageError):
            raise click.UsageError(text, error.ctx) from None
        raise click.ClickException(text) from None


class Asking(Script):
    """Run a command that recognizes a question typed without quotes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. Raises UsageError with a hint if a number such as -5 was read as an option."""
        words = [arg for arg in args if not arg.startswith("--")]
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if len(words) > 1 and error.option_name[1:2].isdigit():
                raise click.UsageError(without_quotes(words), ctx) from None
            raise


def without_quotes(words: Sequence[str]) -> str:
    """Return the message for a question that the shell split, or in which the shell replaced a * by file names."""
    question = EXAMPLE if any(os.path.exists(word) for word in words) else " ".join(words)
    return f"this looks like a question without quotes; write: python inference.py {shlex.quote(question)}"
