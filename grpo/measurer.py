"""What a run measures: policies on held-out problems, findings in its metrics; and the best policy as it is saved."""

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
from grpo.record.tracker import Tracker
from grpo.report.progress import show_finding
from grpo.report.saved_readme import saved_readme
from grpo.resume import Progress
from grpo.runtime.ranks import ONE, Ranks
from tasks.base import Task, asked


class Measurer:
    """Measures the policies of a run and records what they reach; holds no model."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        evaluator: Evaluator,
        metrics: Metrics,
        progress: Progress,
        ranks: Ranks = ONE,
    ) -> None:
        """Write to the output folder of the settings; only rank 0 does."""
        self.ranks = ranks
        self.config, self.task = config, task
        self.evaluator, self.metrics, self.progress = evaluator, metrics, progress
        self.saved_model = Path(config.output_dir) / SAVED_MODEL
        self.samples = Samples(metrics.path and metrics.path.parent)
        self.tracker = Tracker(config.track if ranks.is_main else "none")
        self.rollout: Rollout | None = None  # of the last step

    def record(self, rollout: Rollout, entry: dict[str, Any]) -> None:
        """Record a step in metrics, samples and tracker, and look for findings."""
        self.rollout, step = rollout, self.progress.step
        self.metrics.add_step(entry)
        if self.samples.wants(step):
            self.samples.add(rollout.samples(step, GROUPS))
        self.tracker.log(self.progress.total, entry)
        self.diagnose()

    def validate(self, lm: LanguageModel, abandonable: AbstractContextManager[None]) -> dict[str, Any]:
        """Measure the policy of this step on the validation problems; in `abandonable`, a signal may end that."""
        start = time.perf_counter()
        with abandonable:
            measured = self.evaluator.validate(lm)
        return self._add(measured, self.progress.step, "validation", start)

    def test(self, lm: LanguageModel, step: int, abandonable: AbstractContextManager[None]) -> dict[str, Any]:
        """Measure the policy of a step on the test problems and the neighbouring skills."""
        start = time.perf_counter()
        with abandonable:
            measured = self.evaluator.test(lm)
        return self._add(measured, step, "test", start)

    def is_validated(self, step: int) -> bool:
        """Return whether the policy of a step has been measured on the validation problems."""
        return any(entry["step"] == step for entry in self._validations())

    def seconds_of_a_validation(self) -> float:
        """Return how long the slowest validation so far took."""
        return max((entry.get("time/evaluate") or 0.0 for entry in self._validations()), default=0.0)

    def _validations(self) -> list[dict[str, Any]]:
        return [entry for entry in self.metrics.record["evals"] if entry["split"] == "validation"]

    def _add(self, measured: dict[str, Any], step: int, split: str, start: float) -> dict[str, Any]:
        """Add an evaluation to the metrics, and look for findings."""
        entry = {"step": step, "split": split, **measured, "time/evaluate": time.perf_counter() - start}
        self.metrics.add_eval(entry)
        self.tracker.log(self.progress.total, entry, f"{split}/")
        self.diagnose(aloud=split != "test")  # findings of the last test are in the list that follows it
        return entry

    def diagnose(self, aloud: bool = True) -> None:
        """Add the findings that the metrics newly show, and print them."""
        record = self.metrics.record["findings"]
        for finding in new_findings(self.metrics.record, {earlier["name"] for earlier in record}):
            hint = self.task.hints.get(finding.name, "")
            record.append({**asdict(finding), "text": f"{finding.text} {hint}".rstrip()})
            if finding.name in SHOW_EXAMPLES and self.rollout is not None:
                record[-1]["examples"] = self.rollout.top_rewarded_wrong()
            if aloud:
                show_finding(record[-1])

    def save(self, lm: LanguageModel) -> None:
        """Write the best policy, which `lm` is now, to saved_model/, with what a reader and a next run need."""
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
        readme = saved_readme(c, self.progress.best, self.progress.before, None)
        save(self.saved_model, lm, card, readme, self.ranks)
        self.metrics.add_time("save", time.perf_counter() - start)
