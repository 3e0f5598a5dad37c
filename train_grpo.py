"""Train a small instruct model with GRPO: on arithmetic, (a op b) op c, or on another --task.

    python train_grpo.py                                        the bundled starter model, minutes on a CPU
    python train_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct     a model of the Hugging Face Hub
    python train_grpo.py --check                                show a prompt, rewards, expected time; train nothing
    python train_grpo.py --config runs/a/grpo_metrics.json      the settings of another run

Writes saved_model/ (the policy that is best on validation problems), grpo_metrics.json, grpo_samples.jsonl,
grpo_overview.png, grpo_training_curve.png, grpo_kl_divergence.png and checkpoints/ into --output-dir. The same
command continues a run that was stopped. The main differences from the published recipe are the sign of the log-ratio
in the KL, advantages of exactly 0 in tied groups, and the saved policy, which is the best and not the last.
grpo/algorithm/README.md has all differences, with the reasons.
"""

import signal
import sys

if sys._getframe().f_back is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # During the imports, Ctrl-C ends the program silently; but it must not end a notebook that runs this file.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grpo.config import TrainConfig
from grpo.launch.command import run_script
from grpo.launch.config_file import read_settings, resolve_with_file
from grpo.launch.options import TrainCommand, given_settings, help_all_option, setting_options
from grpo.launch.start import mistakes_are_wrong_usage, start
from grpo.model_card import resolve
from grpo.runtime.console import printable
from grpo.setting import parse_duration
from tasks.base import Task
from tasks.common.user_file import naming_own_code
from tasks.common.watch import limited
from tasks.registry import make_task

if TYPE_CHECKING:
    from grpo.runtime.ranks import Ranks


@click.command(cls=TrainCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@setting_options
@click.option("--config", "file", type=click.Path(path_type=Path), help="JSON file of settings; options override it")
@click.option("--check", is_flag=True, help="show a prompt, rewards, expected time and memory; train nothing")
@click.option("--seeds", help="one run for each of these seeds, such as 0,1,2, in the folders seed-0/ and so on")
@click.option("--fresh", is_flag=True, help="start over; what an earlier run wrote is moved to earlier_runs/")
@click.option("--train-anyway", is_flag=True, help="train even if hardly any group has mixed rewards at the start")
@click.option("--accept-changed-files", is_flag=True, help="continue even if files of rewards, tasks or data changed")
@click.option("--trust-device", is_flag=True, help="train even if the device computes other results than the CPU")
@help_all_option
@click.pass_context
def main(
    ctx: click.Context,
    file: Path | None,
    check: bool,
    seeds: str | None,
    fresh: bool,
    train_anyway: bool,
    accept_changed_files: bool,
    trust_device: bool,
    **settings: Any,
) -> None:
    """Train a small instruct model with GRPO, on arithmetic or another task.

    The default model, the starter, changes some defaults: see "starter" below. Other models may change some too. A
    run prints the settings that it uses.
    """
    launched = time.monotonic()
    given = given_settings(ctx, settings)
    if seeds is not None:
        from grpo.launch.seeds import parse_seeds, run_seeds

        with mistakes_are_wrong_usage():
            if check:
                raise ValueError("--check cannot be combined with --seeds: it checks one run; give --seed")
            if "seed" in given:
                raise ValueError("--seed cannot be combined with --seeds; give one of them")
            in_file = read_settings(file) if file else {}
            in_file.pop("seed", None)
            resolve_with_file(file, in_file, given)
            flags = (fresh, train_anyway, accept_changed_files, trust_device)
            ctx.exit(run_seeds(__file__, parse_seeds(seeds), {**in_file, **given}, *flags))
    try:
        train_as_asked = partial(train, launched, check, train_anyway, accept_changed_files, trust_device)
        ctx.exit(start(partial(settings_of, file, given), train_as_asked, fresh, check))
    except (ValueError, OSError) as error:
        raise click.ClickException(printable(str(error))) from None
    except KeyboardInterrupt:
        ctx.exit(130)


def settings_of(file: Path | None, given: dict[str, Any]) -> TrainConfig:
    """Return the settings of a run: `given` overrides the file. Raises ValueError for an impossible value."""
    return resolve_with_file(file, read_settings(file), given) if file else resolve(given)


def train(
    launched: float,
    check: bool,
    train_anyway: bool,
    accept_changed_files: bool,
    trust_device: bool,
    config: TrainConfig,
    task: Task | None = None,
    ranks: "Ranks | None" = None,
    earlier: float = 0.0,
) -> int:
    """Run the training, or only check it, and return the exit status.

    `launched` is the `time.monotonic()` of this launch. With `train_anyway`, train even if there is hardly any
    learning signal. With `accept_changed_files`, continue even if files of rewards, tasks or problems changed.
    With `trust_device`, train even if the device computes other results than the CPU. After a restart by torchrun,
    `earlier` is the number of seconds since the first start, which count towards the time limit. `ranks` are the
    processes of the run, by default this process alone. Slow imports are inside the function, so that the output
    folder is locked first.
    """
    from tasks.rewards.scoring import rewards_of, try_out

    if "torch" not in sys.modules:  # importing torch takes seconds
        click.echo(f"Loading {printable(config.model)}", err=True)
    deadline = launched - earlier + parse_duration(config.time_limit) if config.time_limit else None
    with naming_own_code(), limited(deadline):
        task = make_task(config) if task is None else task  # first, so that an error in its data is reported at once
        rewards, remarks = try_out(rewards_of(config, task), task)
        for remark in remarks:
            click.echo(printable(f"Note: {remark}"), err=True)

    from grpo.launch.check import check as check_run
    from grpo.runtime.failures import failures_in_words
    from grpo.runtime.ranks import ONE
    from grpo.trainer import Trainer
    from tasks.skills import SKILLS

    with failures_in_words(config.model), naming_own_code():
        flags = (train_anyway, accept_changed_files, trust_device)
        trainer = Trainer(config, task, SKILLS, rewards, launched - earlier, ranks or ONE, *flags)
        if check:
            check_run(trainer.grpo, trainer.evaluator, trainer.metrics.record["environment"], launched)
            return 0
        return trainer.run()


if __name__ == "__main__":
    run_script(main)
