"""Save a run in checkpoints, and continue it from the newest one if settings and files are the same."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from grpo.algorithm.grpo import GRPO
from grpo.config import REMOVED, TrainConfig
from grpo.evaluation.evaluator import Evaluator
from grpo.model.lora import trainable
from grpo.record.checkpoint import RECOVERY_HINT, Checkpoint, newest_checkpoint, write_checkpoint
from grpo.record.metrics import Metrics
from grpo.record.samples import Samples
from grpo.record.schema import evaluations, is_evaluation
from grpo.report.opening import show_continuation
from grpo.runtime.checks import check_entries, is_count
from grpo.runtime.console import say
from grpo.runtime.ranks import ONE, Ranks

SAVE_AFTER_SECONDS = 60.0  # A checkpoint is also written once the last one is this old.
MAX_SAVING_SHARE = 0.02  # Checkpoints are rarer if writing them would take more than this share of the time.
BYTES_PER_WEIGHT = 4  # float32
TENSORS = ("policy", "optimizer", "reference")


@dataclass
class Progress:
    """How many steps a run has taken, and the evaluations of its first and its best policy."""

    step: int = 0
    sft_step: int = 0  # supervised steps taken; they come before step 1
    before: Mapping[str, Any] = field(default_factory=dict)  # evaluation of the starting model, on test problems
    best: Mapping[str, Any] | None = None  # evaluation of the best policy, on validation problems

    def is_better(self, entry: Mapping[str, Any]) -> bool:
        """Return whether an evaluation beats the best so far: by mean reward if both have it, else by accuracy."""
        if self.best is None:
            return True
        if "reward" not in entry:
            return entry["accuracy"] > self.best["accuracy"]
        # `best` has no reward if some of its answers were right, because accuracy chooses then, or if an older
        # version of this program measured it.
        if "reward" not in self.best:
            return entry["accuracy"] >= self.best["accuracy"]
        return entry["reward"] > self.best["reward"]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the progress besides the step number."""
        return {"sft_step": self.sft_step, "before": self.before, "best": self.best}

    @property
    def total(self) -> int:
        """Return the number of supervised and GRPO steps together. Checkpoints are numbered by it."""
        return self.sft_step + self.step

    def named(self) -> str:
        """Return the last step in words, such as "step 3" or "fine-tuning step 3"."""
        return f"fine-tuning step {self.sft_step}" if self.sft_step and not self.before else f"step {self.step}"

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises a ValueError that names invalid entries."""
        before, best, sft_step = state.get("before"), state.get("best", ...), state.get("sft_step", 0)
        check_entries(
            {
                "sft_step": is_count(sft_step) and sft_step <= state["step"],
                "before": before == {} or is_evaluation(before),
                "best": best is None or is_evaluation(best),
            }
        )
        self.step = state["step"] - sft_step
        self.sft_step = sft_step
        self.before = before
        self.best = best


@dataclass
class RunState:
    """The parts of a run that a checkpoint keeps. Each part has a `state_dict`, and checks what it loads."""

    config: TrainConfig
    files: Mapping[str, str]  # SHA-256 of each file with problems, tasks or rewards, by path
    progress: Progress
    grpo: GRPO
    evaluator: Evaluator
    metrics: Metrics
    ranks: Ranks = ONE
    saved_step: int | None = None  # step of the newest checkpoint
    saved_at: float = field(default_factory=time.monotonic)  # when the newest checkpoint was written
    saving_seconds: float = 0.0  # how long writing the newest checkpoint took
    accept_changed_files: bool = False  # Continue although files changed since the checkpoint.

    def why_done(self) -> str | None:
        """Return why the run needs no more steps, or None if it needs more."""
        c, step, best = self.config, self.progress.step, self.progress.best
        if step >= c.num_iterations:
            return "all steps are done"
        if c.target_accuracy and best and best["accuracy"] >= c.target_accuracy:
            return f"validation accuracy reached {c.target_accuracy:g}"
        validations = evaluations(self.metrics.record, "validation")
        later = [entry for entry in validations if best and entry["step"] > best["step"]]
        if c.patience and len(later) >= c.patience:
            return f"the last {len(later)} evaluations were no better than the one at step {best['step']}"
        return None

    def save(self, folder: Path) -> None:
        """Write a checkpoint, unless the newest one is up to date. All ranks must call this; rank 0 writes."""
        start = time.perf_counter()
        trained = self.grpo.state_dict()
        state = {
            "config": self.config.to_dict(),
            "files": self.files,
            "threads": torch.get_num_threads(),
            **self.progress.state_dict(),
            **self.evaluator.state_dict(),
            **{name: value for name, value in trained.items() if name not in TENSORS},
        }
        tensors = {name: trained[name] for name in TENSORS}
        if self.ranks.is_main:
            checkpoint = Checkpoint(self.progress.total, metrics=self.metrics.state_dict(), state=state, **tensors)
            write_checkpoint(folder, checkpoint)
        self.saved_step = self.progress.step
        self.saved_at = time.monotonic()
        self.saving_seconds = time.perf_counter() - start
        self.metrics.add_time("save", self.saving_seconds)

    def saved_long_ago(self) -> bool:
        """Return whether the last checkpoint is so old, on any rank, that another one should be written."""
        passed = time.monotonic() - self.saved_at
        return self.ranks.any(passed > max(SAVE_AFTER_SECONDS, self.saving_seconds / MAX_SAVING_SHARE))

    def what_is_lost(self, folder: Path, error: OSError) -> str:
        """Write the metrics if possible; return a message about a failed write: what is kept and what is lost."""
        if not folder.is_dir():
            return f"{folder.absolute()} was deleted or moved during the run, with everything that was saved; {error}"
        saved, step = self.saved_step, self.progress.step
        if saved is None:
            return f"{error}; nothing is kept"
        with suppress(OSError):
            self.metrics.write()
        lost = f"; later work, up to step {step}, is lost" if step > saved else ""
        return f"{error}; the checkpoint of step {saved} is kept{lost}. The same command continues from it"

    def bytes_to_come(self) -> int:
        """Return how many more bytes the run needs on disk for two checkpoints and a model."""
        weights = sum(p.numel() for p in trainable(self.grpo.policy).values())
        checkpoint = 3 * BYTES_PER_WEIGHT * weights  # the weights, and AdamW's two moments of each weight
        checkpoints = 1 if self.progress.total else 2
        model = 0 if self.progress.best else BYTES_PER_WEIGHT * self.grpo.policy.num_parameters()
        return checkpoints * checkpoint + model

    def restore(self, folder: Path, samples: Samples) -> bool:
        """Continue from the newest intact checkpoint; return False if there is no checkpoint.

        Raises ValueError if all checkpoints are damaged, or if settings or files have changed.
        """
        with self.ranks.main_first():  # rank 0 sets damaged checkpoints aside
            checkpoint, problems = newest_checkpoint(folder)
        self.ranks.check_alike("the newest checkpoint", f"of step {checkpoint.step}" if checkpoint else "none")
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
        changed = check_same_run(folder, checkpoint, self.config, self.files, self.accept_changed_files)
        if changed and not checkpoint.step:
            say(f"{', '.join(changed)} changed before the first update, so the run starts over.")
            samples.truncate(0)
            return False
        same_passes = state["config"].get("micro_batch_size") == self.config.micro_batch_size
        with _explained(checkpoint):
            self.progress.load_state_dict(state)
            self.saved_step = self.progress.step
            self.evaluator.load_state_dict(state)
            self.metrics.load_state_dict(checkpoint.metrics, self.progress.step, self.progress.sft_step)
            self.grpo.load_state_dict(state, keep_limits=same_passes)
        if changed:
            self.metrics.add_changed_files(self.progress.step, {path: self.files[path] for path in changed})
            say(f"{', '.join(changed)} changed; the run continues with the new content and notes it in its metrics.")
        samples.truncate(self.progress.step)
        show_continuation(self.progress.named(), state["threads"], torch.get_num_threads())
        return True


def check_same_run(
    folder: Path, checkpoint: Checkpoint, config: TrainConfig, files: Mapping[str, str], accept_changed_files: bool
) -> list[str]:
    """Raise ValueError if the run of a checkpoint had other settings or files. `files` has SHA-256 values by path.

    Return the files that changed. They may change before the first update, because nothing depends on them yet, and
    later only with `accept_changed_files`.
    """
    if checkpoint.state["config"].get(REMOVED):
        raise ValueError(
            f"{folder.resolve()} holds a run with --{REMOVED}, which this version no longer has; {RECOVERY_HINT}"
        )
    if conflicts := config.conflicting_settings(checkpoint.state["config"]):
        raise ValueError(
            f"{folder.resolve()} holds a run with other settings: {', '.join(conflicts)}; give the same settings "
            "to continue, --fresh to start over, or --output-dir NEW"
        )
    saved_files = checkpoint.state.get("files", {})
    changed = [path for path, sha256 in files.items() if saved_files.get(path, sha256) != sha256]
    if changed and checkpoint.step and not accept_changed_files:
        raise ValueError(
            f"{', '.join(changed)} changed since the run in {folder.resolve()} began; undo the change to continue, "
            "or give --fresh to start over, --output-dir NEW, or --accept-changed-files to accept the new files"
        )
    return changed


@contextmanager
def _explained(checkpoint: Checkpoint) -> Iterator[None]:
    """Add the name of the checkpoint, and advice, to a ValueError about the checkpoint's content."""
    try:
        yield
    except ValueError as error:
        name = f"step-{checkpoint.step:08d}"
        raise ValueError(f"checkpoint {name} cannot be used: {error}; {RECOVERY_HINT}") from None
