"""The folder of a run: who may write to it, and what is moved aside. Imports nothing heavy."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from grpo.config import TrainConfig
from grpo.model_card import model_folder
from grpo.runtime.atomic_io import name_in_errors, restore_interrupted_swap
from tasks.common.user_file import dangling

WRITTEN = (
    "saved_model",
    "checkpoints",
    "grpo_metrics.json",
    "grpo_samples.jsonl",
    "grpo_training_curve.png",
    "grpo_kl_divergence.png",
    "grpo_overview.png",
)
# written by some runs, and by plot_metrics.py about the same run
ON_REQUEST = ("grpo_sft_curve.png", "grpo_report.html")
LOCK, HOLDER = ".grpo.lock", ".grpo.pid"
EARLIER = "earlier_runs"


@contextmanager
def claim_folder(config: TrainConfig, fresh: bool, patience: float = 0.0) -> Iterator[None]:
    """Make the output folder and lock it for this process; with `fresh`, move an earlier run aside.

    The system releases the lock when the process ends, however it ends. Raises ValueError if another process still
    holds the folder after `patience` seconds, or if it cannot be written.
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
        raise ValueError(f"cannot write to --output-dir {folder}: {error.strerror}") from None
    try:
        with name_in_errors(folder / HOLDER):
            (folder / HOLDER).write_text(str(os.getpid()), encoding="utf-8")
        restore_interrupted_swap(folder / "saved_model")
        if fresh:
            _move_aside(config, folder)
        _check_resumable(folder)
        yield
    finally:
        with suppress(OSError):  # the folder may have become read-only; what ended the run matters more
            (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _check_resumable(folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    there = [name for name in WRITTEN if name != checkpoints.name and (folder / name).exists()]
    there += sorted(path.name for path in checkpoints.glob("*.damaged-*"))
    if there and not any(checkpoints.glob("step-????????")):
        raise ValueError(
            f"{folder.resolve()} holds a run ({', '.join(there)}) without a checkpoint to continue from; --fresh "
            f"moves it to {EARLIER}/ and starts over, --output-dir NEW trains elsewhere"
        )


def _holder(folder: Path) -> str:
    try:
        return f"another run, process {int((folder / HOLDER).read_text(encoding='utf-8'))}"
    except (OSError, ValueError):
        return "another run"


def _move_aside(config: TrainConfig, folder: Path) -> None:
    there = [name for name in WRITTEN if (folder / name).exists()]
    if not there:
        return
    start = model_folder(config.model)
    if start is not None and start.resolve() == (folder / "saved_model").resolve():
        raise ValueError(f"--fresh would move {config.model} aside, which you train from; give --output-dir NEW")
    aside = next(path for n in range(1, 10**6) if not (path := folder / EARLIER / str(n)).exists())
    aside.mkdir(parents=True)
    for name in (*there, *(name for name in ON_REQUEST if (folder / name).exists())):
        (folder / name).rename(aside / name)
