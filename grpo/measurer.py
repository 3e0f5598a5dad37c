"""Measure the policies of a run, record metrics and findings, and save the best policy."""

import os
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo.algorithm.rollout import Rollout
from grpo.config import TrainConfig
from grpo.diagnostics.findings import SHOW_EXAMPLES, new_findings
from grpo.evaluation.evaluator import Evaluator
from grpo.model.language_model import LanguageModel
from grpo.model.saving import SAVED_MODEL, save
from grpo.model_card import NAMED
from grpo.record.metrics import Metrics
from grpo.record.samples import GROUPS, Samples
from grpo.record.schema import evaluations
from grpo.record.tracker import Tracker
from grpo.report.progress import show_finding
from grpo.report.saved_readme import saved_readme
from grpo.resume import Progress
from grpo.runtime.ranks import ONE, Ranks
from tasks.base import Task, asked


class Measurer:
    """Measures the policies of a run, records the results and looks for findings. It holds no model."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        evaluator: Evaluator,
        metrics: Metrics,
        progress: Progress,
        ranks: Ranks = ONE,
    ) -> None:
        """Prepare to write to --output-dir. Only rank 0 writes."""
        self.config, self.task, self.ranks = config, task, ranks
        self.evaluator, self.metrics, self.progress = evaluator, metrics, progress
        self.saved_model = Path(config.output_dir) / SAVED_MODEL
        self.samples = Samples(metrics.path and metrics.path.parent)
        self.tracker = Tracker(config.track if ranks.is_main else "none")
        self.rollout: Rollout | None = None  # the rollout of the last step

    def record(self, rollout: Rollout, entry: dict[str, Any]) -> None:
        """Record the current step in metrics, samples and tracker, and look for findings."""
        self.rollout, step = rollout, self.progress.step
        self.metrics.add_step(entry)
        if self.samples.wants(step):
            self.samples.add(rollout.samples(step, GROUPS))
        self.tracker.log(self.progress.total, entry)
        self.diagnose()

    def measure(
        self, lm: LanguageModel, split: str, step: int, abandonable: AbstractContextManager[None]
    ) -> dict[str, Any]:
        """Measure the policy of a step on a split, record and return the evaluation, and look for findings.

        On the "test" split, skills that are not trained on are measured too. The measurement runs in the context
        `abandonable`, so a signal may interrupt it.
        """
        start = time.perf_counter()
        with abandonable:
            measured = self.evaluator.test(lm) if split == "test" else self.evaluator.validate(lm)
        entry = {"step": step, "split": split, **measured, "time/evaluate": time.perf_counter() - start}
        self.metrics.add_eval(entry)
        self.tracker.log(self.progress.total, entry, f"{split}/")
        self.diagnose(aloud=split != "test")  # findings of a test are printed at the end of the run
        return entry

    def is_validated(self, step: int) -> bool:
        """Return whether the policy of a step has been measured on the validation problems."""
        return any(entry["step"] == step for entry in evaluations(self.metrics.record, "validation"))

    def slowest_validation(self) -> float:
        """Return how many seconds the slowest validation so far took; 0 if there was none."""
        validations = evaluations(self.metrics.record, "validation")
        return max((entry.get("time/evaluate") or 0.0 for entry in validations), default=0.0)

    def diagnose(self, aloud: bool = True) -> None:
        """Look for new findings, add them to the metrics, and print them if `aloud`."""
        recorded = self.metrics.record["findings"]
        for finding in new_findings(self.metrics.record, {earlier["name"] for earlier in recorded}):
            hint = self.task.hints.get(finding.name, "")
            entry = {**asdict(finding), "text": f"{finding.text} {hint}".rstrip()}
            if finding.name in SHOW_EXAMPLES and self.rollout is not None:
                entry["examples"] = self.rollout.top_rewarded_wrong()
            recorded.append(entry)
            if aloud:
                show_finding(entry)

    def save(self, lm: LanguageModel) -> None:
        """Write `lm`, the best policy so far, to saved_model/, with a README.md and a card that a later run reads."""
        c, start = self.config, time.perf_counter()
        on_disk = c.model not in NAMED and os.path.exists(c.model)
        card = {
            "task": self.task.name,
            "step": self.progress.best["step"],
            **asked(self.task),
            "max_new_tokens": c.max_new_tokens,
            "base_model": str(Path(c.model).resolve()) if on_disk else c.model,
            "skills": list(self.evaluator.skills),
            "settings": c.inheritable_settings(),
        }
        readme = saved_readme(c, self.task, self.progress.best, self.progress.before, None)
        save(self.saved_model, lm, card, readme, self.ranks)
        self.metrics.add_time("save", time.perf_counter() - start)
