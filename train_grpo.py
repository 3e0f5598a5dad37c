"""Train a small instruct model with GRPO: on arithmetic, (a op b) op c, or on another --task.

    python train_grpo.py                                        the bundled starter model, minutes on a CPU
    python train_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct     a model of the Hugging Face Hub

Writes saved_model/ (the policy that is best on validation problems), grpo_metrics.json, grpo_overview.png,
grpo_training_curve.png, grpo_kl_divergence.png and checkpoints/ into --output-dir. The same command goes on with a
run that was cut short. It departs from the published recipe in the direction of the KL, in exact zeros for tied
groups, and in keeping the best policy instead of the last; README.md says why.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields
from typing import Any

import click
from click.core import ParameterSource

from grpo.config import TrainConfig, resolve
from grpo.files import claim_folder


class GroupedCommand(click.Command):
    """A command whose --help shows the settings under the headings of `TrainConfig`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section a group, in the order of the fields."""
        groups = {f.name: f.metadata["group"] for f in fields(TrainConfig)}
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(groups.get(parameter.name, "Other"), []).append(record)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def setting_options(command: click.Command) -> click.Command:
    """Add an option for every field of `TrainConfig`."""
    for f in reversed(fields(TrainConfig)):
        name = f"--{f.name.replace('_', '-')}"
        kind = {"type": click.Choice(f.metadata["choices"]) if f.metadata["choices"] else f.type}
        if f.type == tuple[str, ...]:
            kind = {"type": str, "multiple": True}
        if f.type is bool:
            name, kind = f"{name}/--no-{name[2:]}", {}
        option = click.option(name, f.name, default=f.default, show_default=True, help=f.metadata["meaning"], **kind)
        command = option(command)
    return command


@click.command(cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@setting_options
@click.option("--fresh", is_flag=True, help="start over; what an earlier run wrote is moved to earlier_runs/")
@click.pass_context
def main(ctx: click.Context, fresh: bool, **settings: Any) -> None:
    """Train a small instruct model with GRPO, on arithmetic or another task.

    The defaults shown are the published ones, for models of the Hub. The starter has settings of its own,
    kept in its grpo.json; a run prints what it resolved.
    """
    launched = time.monotonic()
    given = {
        name: value
        for name, value in settings.items()
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    try:
        config = resolve(given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    rank = int(os.environ.get("RANK", "0"))  # of the processes that torchrun starts, one a device
    try:
        with claim_folder(config, fresh) if rank == 0 else in_silence():
            ctx.exit(train(config, launched))
    except (ValueError, OSError) as error:
        raise click.ClickException(f"process {rank}: {error}" if rank else str(error)) from None
    except KeyboardInterrupt:
        ctx.exit(130)


@contextmanager
def in_silence() -> Iterator[None]:
    """Without what all processes of a run would say alike: the first one says it."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def train(config: TrainConfig, launched: float) -> int:
    """Run the training and return the exit status; the heavy imports come after the folder is locked."""
    from tasks.choose import choose_task

    task = choose_task(config)  # first: what is wrong with its data is said at once

    from grpo import ranks
    from grpo.memory import is_out_of_memory
    from grpo.trainer import Trainer
    from tasks.skills import SKILLS

    try:
        status = Trainer(config, task, SKILLS, launched).run()
        ranks.leave()  # not after an error: the others may be waiting for something else
        return status
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise ValueError(
                f"{config.model} does not fit into memory; take a smaller one, or --device cpu"
            ) from None
        if ranks.is_loss(error):
            raise ValueError(f"another process of this run has ended; {ranks.WHAT_THEN}") from None
        raise


if __name__ == "__main__":
    main()
