"""The folder of a run: what may be written where, before anything heavy is imported."""

import os
from pathlib import Path

from grpo.config import TrainConfig, model_folder

WRITTEN = ("saved_model", "grpo_metrics.json", "grpo_training_curve.png", "grpo_kl_divergence.png")
EARLIER = "earlier_runs"


def put_back(model: Path) -> None:
    """Undo half a replacement of a model folder: a kill between its two renames leaves the earlier one beside it."""
    earlier = model.with_name(f".{model.name}.old")
    if earlier.is_dir() and not model.exists():
        earlier.rename(model)


def claim_folder(config: TrainConfig, fresh: bool) -> None:
    """Make the output folder and see that it is free; with `fresh`, move an earlier run aside.

    Raises ValueError where it holds a run, or cannot be written.
    """
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make --output-dir {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to --output-dir {folder}: no permission")
    put_back(folder / "saved_model")
    there = [name for name in WRITTEN if (folder / name).exists()]
    if not there:
        return
    if not fresh:
        raise ValueError(
            f"{folder.resolve()} holds a run ({', '.join(there)}); --fresh moves it to {EARLIER}/ and starts over, "
            "--output-dir NEW trains elsewhere"
        )
    start = model_folder(config.model)
    if start is not None and start.resolve() == (folder / "saved_model").resolve():
        raise ValueError(f"--fresh would move {config.model} aside, which you train from; give --output-dir NEW")
    aside = next(path for n in range(1, 10**6) if not (path := folder / EARLIER / str(n)).exists())
    aside.mkdir(parents=True)
    for name in there:
        (folder / name).rename(aside / name)
