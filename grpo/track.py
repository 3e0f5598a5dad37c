"""Metrics to an experiment tracker as well: trackio or wandb, whose interfaces are the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROJECT = "grpo"


class Tracker:
    """Sends each entry of the metrics to the tracker that `--track` names; does nothing for "none"."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        """Raises ValueError with the line that installs the package, where it is missing."""
        self.module: Any = None
        if name == "none":
            return
        try:
            if name == "wandb":
                import wandb as module
            else:
                import trackio as module
        except ImportError:
            raise ValueError(f"--track {name} needs {name}: pip install {name}") from None
        module.init(project=PROJECT, name=folder.resolve().name, config=dict(config))
        self.module = module

    def log(self, step: int, entry: Mapping[str, Any], prefix: str = "") -> None:
        """Send the numbers of an entry of `steps`, or of `evals` under a prefix such as "validation/".

        `step` is that of the run, also for a test of an earlier policy: wandb drops what goes back.
        """
        if self.module is not None:
            numbers = {prefix + k: v for k, v in entry.items() if isinstance(v, int | float) and k != "step"}
            self.module.log(numbers, step=step)

    def close(self) -> None:
        """Send what is left."""
        if self.module is not None:
            self.module.finish()
