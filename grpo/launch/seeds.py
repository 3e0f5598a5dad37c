"""One run a seed, in folders of their own, and what they reached together: `train_grpo.py --seeds 0,1,2`.

Each seed is a launch of its own, so it stops, continues and fails as any run does; the same command goes on with the
seeds that are left.
"""

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.launch.start import is_one_of_several
from grpo.runtime.console import say


def parse_seeds(text: str) -> list[int]:
    """Return the seeds in "0,1,2". Raises ValueError for anything else, and for fewer than two different ones."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise ValueError(f"--seeds is {text!r}; write it as 0,1,2")
    if len({int(part) for part in parts}) < max(2, len(parts)):
        raise ValueError(f"--seeds is {text!r}; give two or more different ones, or --seed for one")
    return [int(part) for part in parts]


def run_seeds(script: str, seeds: Sequence[int], given: Mapping[str, Any], fresh: bool) -> int:
    """Train with each seed, then print and draw what they reached; return the exit status.

    `given` are the settings that were given. The first run that does not end well ends the others too. Raises
    ValueError under torchrun.
    """
    if is_one_of_several():
        raise ValueError("--seeds starts a run for each seed; under torchrun give --seed, one launch each")
    folder = Path(given.get("output_dir", "."))
    folders = [folder / f"seed-{seed}" for seed in seeds]
    for seed, own in zip(seeds, folders, strict=True):
        say(f"Seed {seed}, in {own}/")
        arguments = as_arguments({**given, "seed": seed, "output_dir": str(own)})
        status = _run([sys.executable, script, *arguments, *["--fresh"] * fresh])
        if status:
            say(f"Seed {seed} was stopped or failed. Run the same command again to continue it.")
            return status if status > 0 else 128 - status
    return conclude(folder, folders)


def _run(command: Sequence[str]) -> int:
    """Run a command and return its status. A terminal sends Ctrl-C to it as well; a SIGTERM is passed on."""
    with subprocess.Popen(command) as process:
        earlier = (
            signal.signal(signal.SIGINT, signal.SIG_IGN),
            signal.signal(signal.SIGTERM, lambda number, frame: process.terminate()),
        )
        try:
            return process.wait()
        finally:
            for number, handler in zip((signal.SIGINT, signal.SIGTERM), earlier, strict=True):
                signal.signal(number, handler)


def as_arguments(given: Mapping[str, Any]) -> list[str]:
    """Return settings as they are written on the command line."""
    arguments = []
    for name, value in given.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, (tuple, list)) else [value]
            arguments += [f"--{option}={one}" for one in values]
    return arguments


def conclude(folder: Path, folders: Sequence[Path]) -> int:
    """Print the table of some runs that ended, and draw them in one picture; return the exit status."""
    from grpo.plots.comparison import draw_comparison
    from grpo.plots.series import group_runs
    from grpo.record.metrics import load_metrics

    records = [load_metrics(run) for run in folders]
    if not all(record.get("finished") for record in records):
        say("Not all runs have ended; the same command goes on with them.")
        return 0
    say("\n" + "\n".join(table(records)))
    [picture] = draw_comparison(group_runs(folders, records, []), folder)
    say(f"Drawn in {picture}")
    return 0


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a row for each run's test accuracy before and after, and one of their means with 95% intervals."""
    from grpo.evaluation.intervals import accuracy_text, mean_interval

    lines, columns = ["seed   test accuracy"], []
    for record in records:
        tests = [entry for entry in record["evals"] if entry["split"] == "test"]
        columns.append([entry["accuracy"] for entry in (tests[0], tests[-1])])
        lines.append(
            f"{record['config']['seed']:>4}   {accuracy_text(tests[0])}  ->  {accuracy_text(tests[-1])}, "
            f"step {tests[-1]['step']}"
        )
    means = [mean_interval(values) for values in zip(*columns, strict=True)]
    cells = [f"{100 * mean:.1f}% [{100 * low:.1f}, {100 * high:.1f}]" for mean, low, high in means]
    lines.append(f"mean   {'  ->  '.join(cells)} (95% interval of the mean over {len(records)} seeds, Student's t)")
    return lines
