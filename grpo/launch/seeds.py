"""Train once for each of several seeds, then compare the runs: `train_grpo.py --seeds 0,1,2`.

Each seed is trained in its own folder, as a run that stops, continues and fails like any other. The same command
continues with the seeds that have not finished.
"""

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.launch.start import is_one_of_several
from grpo.runtime.console import say
from grpo.setting import as_typed


def parse_seeds(text: str) -> list[int]:
    """Return the seeds in "0,1,2". Raises ValueError for any other form, equal seeds, and fewer than two."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise ValueError(f"--seeds is {text!r}; write it as 0,1,2")
    if len({int(part) for part in parts}) < max(2, len(parts)):
        raise ValueError(f"--seeds is {text!r}; give two or more different seeds, or --seed for one")
    return [int(part) for part in parts]


def run_seeds(
    script: str,
    seeds: Sequence[int],
    given: Mapping[str, Any],
    fresh: bool,
    train_anyway: bool,
    accept_changed_files: bool,
    trust_device: bool,
) -> int:
    """Train with each seed, then print and draw the comparison; return the exit status.

    `given` are the settings of the command line and the --config file. If a run fails, the later seeds are not run.
    Raises ValueError under torchrun.
    """
    if is_one_of_several():
        raise ValueError("--seeds cannot be used under torchrun; start torchrun once for each seed, with --seed")
    folder = Path(given.get("output_dir", "."))
    folders = [folder / f"seed-{seed}" for seed in seeds]
    flags = [*["--fresh"] * fresh, *["--train-anyway"] * train_anyway]
    flags += [*["--accept-changed-files"] * accept_changed_files, *["--trust-device"] * trust_device]
    for seed, seed_folder in zip(seeds, folders, strict=True):
        say(f"Seed {seed}, in {seed_folder}/")
        arguments = as_arguments({**given, "seed": seed, "output_dir": str(seed_folder)})
        status = _run([sys.executable, script, *arguments, *flags])
        if status:
            say(f"Seed {seed} was stopped or failed. Run the same command again to continue it.")
            return status if status > 0 else 128 - status
    conclude(folder, folders)
    return 0


def _run(command: Sequence[str]) -> int:
    """Run a command and return its exit status. The terminal sends Ctrl-C to it; SIGTERM is passed on to it."""
    with subprocess.Popen(command) as process:
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        on_terminate = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGINT, on_interrupt)
            signal.signal(signal.SIGTERM, on_terminate)


def as_arguments(given: Mapping[str, Any]) -> list[str]:
    """Return settings as arguments for the command line."""
    arguments = []
    for name, value in given.items():
        option = as_typed(name)
        if isinstance(value, bool):
            arguments.append(option if value else f"--no-{option[2:]}")
        else:
            values = value if isinstance(value, (tuple, list)) else [value]
            arguments += [f"{option}={item}" for item in values]
    return arguments


def conclude(folder: Path, folders: Sequence[Path]) -> None:
    """Print the table of the runs in `folders`, and draw them in one picture in `folder`."""
    from grpo.plots.comparison import draw_comparison
    from grpo.plots.series import group_runs
    from grpo.record.metrics import load_metrics

    records = [load_metrics(run) for run in folders]
    if not all(record.get("finished") for record in records):
        say("Some runs have not finished. Run the same command again to continue them.")
        return
    say("\n" + "\n".join(table(records)))
    [picture] = draw_comparison(group_runs(folders, records, []), folder)
    say(f"Drawn in {picture}")


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return rows of text: each run's test accuracy before and after, then the means with 95% intervals."""
    from grpo.evaluation.intervals import accuracy_text, mean_interval
    from grpo.record.schema import evaluations

    lines = ["seed   test accuracy"]
    columns = []
    for record in records:
        tests = evaluations(record, "test")
        columns.append([entry["accuracy"] for entry in (tests[0], tests[-1])])
        lines.append(
            f"{record['config']['seed']:>4}   {accuracy_text(tests[0])}  ->  {accuracy_text(tests[-1])}, "
            f"step {tests[-1]['step']}"
        )
    means = [mean_interval(values) for values in zip(*columns, strict=True)]
    cells = [f"{100 * mean:.1f}% [{100 * low:.1f}, {100 * high:.1f}]" for mean, low, high in means]
    lines.append(f"mean   {'  ->  '.join(cells)} (95% interval of the mean over {len(records)} seeds, Student's t)")
    return lines
