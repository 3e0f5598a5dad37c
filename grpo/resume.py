"""Checkpoints of a run: the state of its parts to and from disk, and whether a launch is of the same run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from grpo import report
from grpo.algorithm.grpo import GRPO
from grpo.config import TrainConfig
from grpo.evaluation.evaluator import Evaluator
from grpo.record.checkpoint import RECOVERY_HINT, Checkpoint, newest_checkpoint, write_checkpoint
from grpo.record.metrics import Metrics
from grpo.record.samples import Samples
from grpo.record.schema import is_evaluation
from grpo.runtime import distributed
from grpo.runtime.checks import check_entries, is_count
from grpo.runtime.console import say

TENSORS = ("policy", "optimizer", "reference")


@dataclass
class Progress:
    """How far a run is, and the best it has reached."""

    step: int = 0
    before: Mapping[str, Any] = field(default_factory=dict)  # the starting model on the test problems
    best: Mapping[str, Any] | None = None  # the evaluation of the best policy, with its step

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps besides the step."""
        return {"before": self.before, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises ValueError if that cannot be its value."""
        before, best = state.get("before"), state.get("best", ...)
        check_entries({"before": before == {} or is_evaluation(before), "best": best is None or is_evaluation(best)})
        self.step, self.before, self.best = state["step"], before, best


@dataclass(frozen=True)
class RunState:
    """The parts of a run that a checkpoint keeps; each has a `state_dict` and checks its own."""

    config: TrainConfig
    files: Mapping[str, str]  # SHA-256 of each file of problems or rewards, by path
    progress: Progress
    grpo: GRPO
    evaluator: Evaluator
    metrics: Metrics

    def save(self, folder: Path) -> None:
        """Write a checkpoint, unless there is one of this step. All ranks must call this; rank 0 writes."""
        learned = self.grpo.state_dict()
        state = {
            "config": self.config.to_dict(),
            "files": self.files,
            "threads": torch.get_num_threads(),
            **self.progress.state_dict(),
            **self.evaluator.state_dict(),
            **{name: value for name, value in learned.items() if name not in TENSORS},
        }
        tensors = {name: learned[name] for name in TENSORS}
        if distributed.is_main_process():
            checkpoint = Checkpoint(self.progress.step, metrics=self.metrics.state_dict(), state=state, **tensors)
            write_checkpoint(folder, checkpoint)

    def restore(self, folder: Path, samples: Samples) -> bool:
        """Continue from the newest checkpoint that verifies; return False if there is none to continue from.

        Raises ValueError if there is a run but none of its checkpoints can be used, or if it is another run.
        """
        with distributed.main_process_first():  # rank 0 sets damaged ones aside
            checkpoint, problems = newest_checkpoint(folder)
        for problem in problems:
            say(f"Warning: {problem}")
        if checkpoint is None:
            if problems:
                raise ValueError(f"none of the checkpoints in {folder.resolve()} can be used; {RECOVERY_HINT}")
            return False
        state = {**checkpoint.state, **{name: getattr(checkpoint, name) for name in TENSORS}}
        with _explained(checkpoint):
            check_entries(
                {"config": isinstance(state.get("config"), dict), "threads": is_count(state.get("threads"))}
            )
        check_same_run(folder, checkpoint, self.config, self.files)
        same_passes = state["config"].get("micro_batch_size") == self.config.micro_batch_size
        with _explained(checkpoint):
            self.progress.load_state_dict(state)
            self.evaluator.load_state_dict(state)
            self.metrics.load_state_dict(checkpoint.metrics, checkpoint.step)
            self.grpo.load_state_dict(state, keep_limits=same_passes)
        samples.truncate(checkpoint.step)
        report.continuing(checkpoint.step, state["threads"], torch.get_num_threads())
        return True


def check_same_run(folder: Path, checkpoint: Checkpoint, config: TrainConfig, files: Mapping[str, str]) -> None:
    """Raise ValueError if a launch with these settings and files (SHA-256 by path) is not of the same run."""
    ways_on = "to continue, --fresh to start over, or --output-dir NEW"
    if conflicts := config.conflicting_settings(checkpoint.state["config"]):
        raise ValueError(
            f"{folder.resolve()} holds a run with other settings: {', '.join(conflicts)}; give the same {ways_on}"
        )
    earlier = checkpoint.state.get("files", {})
    if changed := [path for path, sha256 in files.items() if earlier.get(path, sha256) != sha256]:
        raise ValueError(
            f"{', '.join(changed)} changed since the run in {folder.resolve()} began; put it back {ways_on}"
        )


@contextmanager
def _explained(checkpoint: Checkpoint) -> Iterator[None]:
    """Name the checkpoint in a ValueError about its content, for which its sums do not vouch, and say what to do."""
    try:
        yield
    except ValueError as error:
        name = f"step-{checkpoint.step:08d}"
        raise ValueError(f"checkpoint {name} cannot be used: {error}; {RECOVERY_HINT}") from None
