"""Train a small instruct model with GRPO: on arithmetic, (a op b) op c, or on another --task.

    python train_grpo.py                                        the bundled starter model, minutes on a CPU
    python train_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct     a model of the Hugging Face Hub
    python train_grpo.py --check                                a prompt, rewards, expected time: trains nothing
    python train_grpo.py --config runs/a/grpo_metrics.json      the settings of another run

Writes saved_model/ (the policy that is best on validation problems), grpo_metrics.json, grpo_overview.png,
grpo_training_curve.png, grpo_kl_divergence.png and checkpoints/ into --output-dir. The same command continues a
run that was cut short. It departs from the published recipe in the direction of the KL, in exact zeros for tied
groups, and in keeping the best policy instead of the last; README.md says why.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is silent during the imports, until a run listens itself

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click

from grpo.config import TrainConfig
from grpo.launch.command import run_script
from grpo.launch.config_file import read_settings, resolve_with_file
from grpo.launch.options import TrainCommand, given_settings, help_all_option, setting_options
from grpo.launch.run_folder import claim_folder
from grpo.model_card import resolve
from grpo.runtime.console import printable
from tasks.base import Task
from tasks.common.user_file import naming_own_code
from tasks.registry import make_task


@click.command(cls=TrainCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@setting_options
@click.option("--config", "file", type=click.Path(path_type=Path), help="JSON file of settings; options override it")
@click.option("--check", is_flag=True, help="show a prompt, rewards, expected time and memory; train nothing")
@click.option("--seeds", help="one run for each of several seeds, such as 0,1,2, in folders seed-0/ and so on")
@click.option("--fresh", is_flag=True, help="start over; what an earlier run wrote is moved to earlier_runs/")
@help_all_option
@click.pass_context
def main(ctx: click.Context, file: Path | None, check: bool, seeds: str | None, fresh: bool, **settings: Any) -> None:
    """Train a small instruct model with GRPO, on arithmetic or another task.

    The default model, the starter, has settings of its own where "starter" stands beside a default. So may other
    models; a run prints the settings that it uses.
    """
    launched = time.monotonic()
    given = given_settings(ctx, settings)
    rank = int(os.environ.get("RANK", "0"))  # torchrun starts one process a device
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        if seeds is not None and check:
            raise ValueError("--check looks at one run; give it a --seed, not --seeds")
        if seeds is not None:
            in_file = read_settings(file) if file else {}
            in_file.pop("seed", None)
            resolve_with_file(file, in_file, given)
            ctx.exit(train_seeds(seeds, {**in_file, **given}, fresh))
        settle = partial(settings_of, file, given)
        config = None if several else settle()  # a mistake in one of several processes concerns all
    except ValueError as error:
        raise click.UsageError(printable(str(error))) from None
    try:
        if config is None:
            train_with_others(settle, launched, fresh, check)
        with nullcontext() if check else claim_folder(config, fresh):
            ctx.exit(train(config, launched, check=check))
    except (ValueError, OSError) as error:
        raise click.ClickException(printable(f"process {rank}: {error}" if rank else str(error))) from None
    except KeyboardInterrupt:
        ctx.exit(130)


def train_seeds(text: str, given: dict[str, Any], fresh: bool) -> int:
    """Train with each of some seeds and return the exit status. Raises ValueError if that cannot be."""
    from grpo.launch.seeds import parse_seeds, run_seeds

    if "seed" in given:
        raise ValueError("--seed and --seeds say the same; give one of them")
    if "RANK" in os.environ:
        raise ValueError("--seeds starts a run for each seed; under torchrun give --seed, one launch each")
    return run_seeds(__file__, parse_seeds(text), given, fresh)


@contextmanager
def silenced() -> Iterator[None]:
    """Suppress what all ranks would print alike: rank 0 prints it."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def settings_of(file: Path | None, given: dict[str, Any]) -> TrainConfig:
    """Return the settings of a run: those `given`, over those of a file. Raises ValueError if they cannot be."""
    return resolve_with_file(file, read_settings(file), given) if file else resolve(given)


def train_with_others(settle: Callable[[], TrainConfig], launched: float, fresh: bool, check: bool) -> NoReturn:
    """Train as one of the processes that torchrun started, and end this process when all are done."""
    from grpo.launch.agreement import agree, claim_shared_folder
    from grpo.runtime import distributed
    from grpo.runtime.device import choose_device
    from grpo.runtime.rendezvous import Heartbeat

    with nullcontext() if os.environ["RANK"] == "0" else silenced():
        config, task, meeting = agree(settle)
        with failures_in_words(config), Heartbeat(meeting, distributed.RESUME_HINT):
            distributed.connect(meeting, distributed.own_device(choose_device(config.device)))
            before = meeting.seconds_before()  # the launch began, which torchrun restarted
            with nullcontext() if check else claim_shared_folder(config, meeting, fresh and before is None):
                meeting.begin()
                status = train(config, launched - (before or 0.0), task, check)
            distributed.barrier()  # torchrun could not restart one that dies now without one that has ended
    sys.stdout.flush()
    os._exit(status)


def train(config: TrainConfig, launched: float, task: Task | None = None, check: bool = False) -> int:
    """Run the training, or only check it, and return the exit status.

    The heavy imports come after the folder is locked.
    """
    from tasks.rewards.scoring import rewards_of, try_out

    if "torch" not in sys.modules:  # importing it takes seconds
        click.echo(f"Loading {printable(config.model)}", err=True)
    task = make_task(config) if task is None else task  # first, so that an error in its data is reported at once
    with naming_own_code():
        try_out(rewards_of(config, task), task)

    from grpo.launch.check import check as look
    from grpo.trainer import Trainer
    from tasks.skills import SKILLS

    with failures_in_words(config), naming_own_code():
        trainer = Trainer(config, task, SKILLS, launched)
        if check:
            look(trainer.grpo, trainer.evaluator, trainer.metrics.record["environment"], launched)
            return 0
        return trainer.run()


@contextmanager
def failures_in_words(config: TrainConfig) -> Iterator[None]:
    """Raise ValueError with a message for users if memory runs out, or another process ends."""
    from grpo.runtime import distributed
    from grpo.runtime.microbatch import is_out_of_memory

    try:
        yield
    except MemoryError:
        raise ValueError(
            "a step does not fit into memory; lower --batch-size, --num-generations or --max-new-tokens"
        ) from None
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise ValueError(
                f"{config.model} does not fit into memory; take a smaller model, or --device cpu"
            ) from None
        if distributed.is_peer_failure(error):
            raise ValueError(
                f"another process of this run has ended: look for its last message. {distributed.RESUME_HINT}"
            ) from None
        raise


if __name__ == "__main__":
    run_script(main)
