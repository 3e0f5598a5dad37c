"""Send metrics to an experiment tracker as well: trackio or wandb, which have the same interface."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROJECT = "grpo"


class Tracker:
    """The tracker that `--track` names; the tracker "none" does nothing."""

    def __init__(self, name: str) -> None:
        """Import the package. Raises ValueError with the command that installs it if it is missing."""
        package = None
        try:
            if name == "wandb":
                import wandb as package
            elif name == "trackio":
                import trackio as package
        except ImportError:
            raise ValueError(f"--track {name} needs {name}: pip install {name}") from None
        self.package: Any = package

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

        `step` is the current step of the run, also for a test of an earlier policy: wandb drops steps that go back.
        """
        if self.package is not None:
            numbers = {prefix + k: v for k, v in entry.items() if isinstance(v, int | float) and k != "step"}
            self.package.log(numbers, step=step)
