"""Malformed files: a tiny run, and the one line that a script must answer them with."""

from click.testing import CliRunner

import train_grpo
from tests.helpers.runs import options


def train(model, folder, **settings):
    """Train the tiny run in this process; return click's result."""
    return CliRunner().invoke(train_grpo.main, options(model=model, output_dir=folder, **settings))


def refusal(result, *names):
    """Return the one line that answers a file, after checking that there is no other and that it names the file."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2), result.output
    errors = [line for line in result.stderr.splitlines() if not line.startswith(("Usage: ", "Try ", "Model: "))]
    errors = [line for line in errors if line]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("Error: ")
    assert len(errors[0]) < 600
    assert any(name in errors[0] for name in names), errors[0]
    return errors[0]
