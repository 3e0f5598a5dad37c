"""Also send the metrics to an experiment tracker: trackio or wandb, which have the same interface, or TensorBoard."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from grpo.runtime.console import printable, say

PROJECT = "grpo"


class Tracker:
    """The tracker that `--track` names; "none" sends nothing. After a first failure, nothing more is sent."""

    _is_open = False

    def __init__(self, name: str) -> None:
        """Import the tracker's package. Raises ValueError, with the command that installs it, if it is missing."""
        self.name = name
        self.package: Any = None
        if name == "none":
            return
        try:
            if name == "wandb":
                import wandb as package
            elif name == "trackio":
                import trackio as package
            else:
                from torch.utils import tensorboard as package
            self.package = package
        except ImportError:
            raise ValueError(f"--track {name} needs {name}: pip install {name}") from None

    @contextmanager
    def tracking(self, folder: Path, config: Mapping[str, Any], last_step: int | None = None) -> Iterator[None]:
        """Open a run of the tracker, and close it however the block ends.

        If the training run continues, `last_step` is the last step that it keeps, and the tracker's run continues
        too. With None, the tracker begins a new run.
        """
        if self.package is None:
            yield
            return
        self._is_open = True
        self._attempt(lambda: self._open(folder, config, last_step))
        try:
            yield
        finally:
            self._attempt(lambda: (self._writer.close if self.name == "tensorboard" else self.package.finish)())
            self._is_open = False

    def log(self, step: int, entry: Mapping[str, Any], prefix: str = "") -> None:
        """Send the numbers in an entry of `steps`, or, with a prefix such as "validation/", in an entry of `evals`.

        `step` is the current step of the run, even for a test of an earlier policy, because wandb drops an entry
        whose step is lower than the step of the entry before it.
        """
        numbers = {prefix + k: v for k, v in entry.items() if isinstance(v, int | float) and k != "step"}
        self._attempt(lambda: self._send(numbers, step))

    def _open(self, folder: Path, config: Mapping[str, Any], last_step: int | None) -> None:
        """Open a new run of the tracker, or the run whose id or name an earlier launch has left in the folder."""
        if self.name == "tensorboard":
            first = 0 if last_step is None else last_step + 1  # later entries of an interrupted launch are dropped
            self._writer = self.package.SummaryWriter(str(folder / "tensorboard"), purge_step=first)
            self._writer.add_text("config", json.dumps(dict(config)))
            return
        name, place = folder.resolve().name, folder / f".grpo.{self.name}"
        known = place.read_text(encoding="utf-8") if last_step is not None and place.is_file() else ""
        options: dict[str, Any] = {"project": PROJECT, "name": name, "config": dict(config)}
        if self.name == "wandb":
            known = known or uuid4().hex
            self.package.init(**options, id=known, resume="allow")
        elif known:
            self.package.init(**{**options, "name": known}, resume="allow")
        else:
            run = self.package.init(**options, resume="never")
            known = str(getattr(run, "name", None) or name)  # trackio changes a name that is taken
        place.write_text(known, encoding="utf-8")

    def _send(self, numbers: Mapping[str, float], step: int) -> None:
        if self.name == "tensorboard":
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
        else:
            self.package.log(dict(numbers), step=step)

    def _attempt(self, call: Callable[[], Any]) -> None:
        """Call the tracker if its run is open. A failure prints one warning, and ends the tracking."""
        if not self._is_open:
            return
        try:
            call()
        except Exception as error:
            self._is_open = False
            text = printable(f"{type(error).__name__}: {error}".split("\n")[0])
            say(f"Warning: {self.name} failed ({text}); training goes on without it", sys.stderr)
