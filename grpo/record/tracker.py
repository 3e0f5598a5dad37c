"""Send metrics to an experiment tracker too: trackio or wandb, which have the same interface."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROJECT = "grpo"


class Tracker:
    """The tracker that `--track` names; "none" ignores everything."""

    def __init__(self, name: str) -> None:
        """Raises ValueError with the line that installs the package if it is missing."""
        self.package: Any = None
        if name == "none":
            return
        try:
            if name == "wandb":
                import wandb as package
            else:
                import trackio as package
        except ImportError:
            raise ValueError(f"--track {name} needs {name}: pip install {name}") from None
        self.package = package

    @contextmanager
    def tracking(self, folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
        """Open a run of the tracker, and close it however the block ends."""
        if self.package is None:
            yield
            return
        self.package.init(project=PROJECT, name=folder.resolve().name, config=dict(config))
        try:
            yield
        finally:
            self.package.finish()

    def log(self, step: int, entry: Mapping[str, Any], prefix: str = "") -> None:
        """Send the numbers of an entry of `steps`, or of `evals` under a prefix such as "validation/".

        `step` is that of the run, also for a test of an earlier policy: wandb drops what goes back.
        """
        if self.package is not None:
            numbers = {prefix + k: v for k, v in entry.items() if isinstance(v, int | float) and k != "step"}
            self.package.log(numbers, step=step)
