"""Lock the output folder of a run, and move an earlier run aside. Imports nothing heavy."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
from filelock import FileLock, Timeout

from grpo.config import TrainConfig
from grpo.model_card import model_folder
from grpo.runtime.atomic_io import name_in_errors, restore_interrupted_swap
from grpo.runtime.console import printable
from tasks.common.user_file import dangling

WRITTEN = (  # what runs write to the output folder
    "saved_model",
    "checkpoints",
    "grpo_metrics.json",
    "grpo_samples.jsonl",
    "grpo_training_curve.png",
    "grpo_kl_divergence.png",
    "grpo_overview.png",
)
# Only runs with SFT, plot_metrics.py, or trackers (grpo/record/tracker.py) write these files.
OPTIONAL = ("grpo_sft_curve.png", "grpo_report.html", "tensorboard", ".grpo.trackio", ".grpo.wandb")
LOCK = ".grpo.lock"
PROCESS = ".grpo.pid"  # a file with the id of the process that has the lock
EARLIER = "earlier_runs"
CANNOT_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # errors of disks that cannot lock files


@contextmanager
def claim_folder(config: TrainConfig, fresh: bool, patience: float = 0.0) -> Iterator[None]:
    """Make the output folder and lock it for this process; with `fresh`, move an earlier run aside.

    The system releases the lock when the process ends, even if it is killed. Raises ValueError if another process
    still holds the folder after `patience` seconds, or if the folder cannot be written. On a disk without locks, a
    line on standard error says so, and the folder is not locked.
    """
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = dangling(str(folder)) or error.strerror
        raise ValueError(f"cannot make --output-dir {folder}: {reason}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to --output-dir {folder}: no permission, or a read-only disk")
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise ValueError(f"{folder.resolve()} is in use by {_holder(folder)}; give another --output-dir") from None
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            raise ValueError(f"cannot write to --output-dir {folder}: {error.strerror}") from None
        place = printable(str(folder))
        click.echo(f"{place} cannot be locked ({error.strerror}); start no other run in it", err=True)
    try:
        with name_in_errors(folder / PROCESS):
            (folder / PROCESS).write_text(str(os.getpid()), encoding="utf-8")
        restore_interrupted_swap(folder / "saved_model")
        if fresh:
            _move_aside(config, folder)
        _check_resumable(folder)
        yield
    finally:
        with suppress(OSError):  # A folder that became read-only must not hide the error that ended the run.
            (folder / PROCESS).unlink(missing_ok=True)
        lock.release()


def _check_resumable(folder: Path) -> None:
    """Raise ValueError if the folder holds the files of a run but no checkpoint."""
    checkpoints = folder / "checkpoints"
    names = [name for name in WRITTEN if name != checkpoints.name and (folder / name).exists()]
    names += sorted(path.name for path in checkpoints.glob("*.damaged-*"))
    if names and not any(checkpoints.glob("step-????????")):
        raise ValueError(
            f"{folder.resolve()} holds a run ({', '.join(names)}) without a checkpoint to continue from; --fresh "
            f"moves it to {EARLIER}/ and starts over, --output-dir NEW trains elsewhere"
        )


def free_folder(folder: Path) -> None:
    """Remove the files of a run that ends before its first step, so that a run with other settings can begin."""
    checkpoints = folder / "checkpoints"
    if [path.name for path in checkpoints.iterdir()] == ["step-00000000"]:
        for path in (folder / name for name in WRITTEN):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _holder(folder: Path) -> str:
    try:
        return f"another run, process {int((folder / PROCESS).read_text(encoding='utf-8'))}"
    except (OSError, ValueError):
        return "another run"


def _move_aside(config: TrainConfig, folder: Path) -> None:
    """Move an earlier run to a new folder in `EARLIER`. Raises ValueError if the new run starts from its model."""
    if not any((folder / name).exists() for name in WRITTEN):
        return
    start = model_folder(config.model)
    if start is not None and start.resolve() == (folder / "saved_model").resolve():
        raise ValueError(f"--fresh would move {config.model} aside, but the run starts from it; use --output-dir NEW")
    aside = next(path for n in range(1, 10**6) if not (path := folder / EARLIER / str(n)).exists())
    aside.mkdir(parents=True)
    for name in (*WRITTEN, *OPTIONAL):
        if (folder / name).exists():
            (folder / name).rename(aside / name)
