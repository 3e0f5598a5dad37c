"""The folder of a run: what may be written where, before anything heavy is imported."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from grpo.config import TrainConfig, model_folder

SAMPLES = "grpo_samples.jsonl"
WRITTEN = ("saved_model", "checkpoints", "grpo_metrics.json", "grpo_training_curve.png", "grpo_kl_divergence.png")
WRITTEN += (SAMPLES,)
LOCK, HOLDER = ".grpo.lock", ".grpo.pid"
EARLIER = "earlier_runs"


def put_back(model: Path) -> None:
    """Undo half a replacement of a model folder: a kill between its two renames leaves the earlier one beside it."""
    earlier = model.with_name(f".{model.name}.old")
    if earlier.is_dir() and not model.exists():
        earlier.rename(model)


def fsync(path: Path) -> None:
    """Have the system put a file, or the names in a folder, on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder, and keeps names itself
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path, kinds: type[Exception] = OSError) -> Iterator[None]:
    """Have a failure name what could not be written; that of a write, on a full disk, does not by itself."""
    try:
        yield
    except kinds as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OSError(f"cannot write {path}: {reason}") from None


@contextmanager
def claim_folder(config: TrainConfig, fresh: bool) -> Iterator[None]:
    """Make the output folder and hold it for this process; with `fresh`, move an earlier run aside.

    The system lets go of the lock when the process ends, however it ends. Raises ValueError where another process
    holds the folder, or it cannot be written.
    """
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make --output-dir {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to --output-dir {folder}: no permission, or a read-only disk")
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"{folder.resolve()} is in use by {_holder(folder)}; give another --output-dir") from None
    except OSError as error:
        raise ValueError(f"cannot write to --output-dir {folder}: {error.strerror}") from None
    try:
        with writing(folder / HOLDER):
            (folder / HOLDER).write_text(str(os.getpid()), encoding="utf-8")
        put_back(folder / "saved_model")
        if fresh:
            _move_aside(config, folder)
        _see_that_it_can_go_on(folder)
        yield
    finally:
        with suppress(OSError):  # in a folder that has become read-only; what ended the run is what should be read
            (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _see_that_it_can_go_on(folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    there = [name for name in WRITTEN if name != checkpoints.name and (folder / name).exists()]
    there += sorted(path.name for path in checkpoints.glob("*.damaged-*"))
    if there and not any(checkpoints.glob("step-????????")):
        raise ValueError(
            f"{folder.resolve()} holds a run ({', '.join(there)}) without a checkpoint to go on from; --fresh moves "
            f"it to {EARLIER}/ and starts over, --output-dir NEW trains elsewhere"
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
    for name in there:
        (folder / name).rename(aside / name)
