"""Start a training run: in this process alone, or as one of the processes of torchrun. Imports nothing heavy."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import click

from grpo.config import TrainConfig
from grpo.launch.run_folder import claim_folder
from grpo.runtime.console import printable


def start(settle: Callable[[], TrainConfig], train: Callable[..., int], fresh: bool, check: bool) -> int:
    """Get the settings, lock the output folder, train, and return the exit status.

    `settle` returns the settings, and `train(config)` runs the training. With `fresh`, an earlier run in the folder
    is moved aside; with `check`, nothing is written. Under torchrun, the process ends here instead of returning.
    """
    if is_one_of_several():
        from grpo.launch.torchrun import train_together

        train_together(settle, train, fresh, check)
    with mistakes_are_wrong_usage():
        config = settle()
    with nullcontext() if check else claim_folder(config, fresh):
        return train(config)


def is_one_of_several() -> bool:
    """Return whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def mistakes_are_wrong_usage() -> Iterator[None]:
    """Turn a ValueError about settings into a UsageError of click, whose exit status is 2."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(printable(str(error))) from None
