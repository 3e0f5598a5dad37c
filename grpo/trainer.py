"""The run: step by step, with evaluations, checkpoints and an end. What a step is stands in `grpo/learner.py`."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

from grpo import ranks, report
from grpo.checkpoint import (
    WAYS_ON,
    newest_checkpoint,
    refuse_another_run,
    see_that_it_is_ours,
    write_checkpoint,
)
from grpo.config import TrainConfig, model_folder, read_card
from grpo.console import Progress, say
from grpo.examiner import Examiner
from grpo.files import writing
from grpo.forgetting import StartingAnswers
from grpo.health import SHOW_EXAMPLES, new_findings
from grpo.learner import Learner
from grpo.lora import add_adapter, four_bits
from grpo.memory import peak_memory
from grpo.metrics import Metrics, ended_with, environment
from grpo.models import ROWS, SAVED_MODEL, LanguageModel, be_deterministic, choose_device, load, save
from grpo.plots import draw_all
from grpo.rollout import RolloutBatch
from grpo.samples import Samples
from grpo.sharding import shard
from grpo.stops import Stops
from grpo.track import Tracker
from tasks.base import Task
from tasks.rewards import parse_rewards

MOST_SKIPPED = 10  # updates in a row that were not finite, before the run ends


class Trainer:
    """A run in a folder: `Trainer(config, task, skills).run()`."""

    def __init__(
        self, config: TrainConfig, task: Task, skills: dict[str, Task], launched: float | None = None
    ) -> None:
        """`launched` is the `time.monotonic()` that a time limit counts from; now, if not given."""
        self.config, self.task = config, task
        self.rewards = parse_rewards(config.reward, task.default_rewards)
        self.files = {**task.files, **{reward.path: reward.sha256 for reward in self.rewards if reward.path}}
        self.folder = Path(config.output_dir)
        self.card = read_card(config.model)
        be_deterministic(config.deterministic)
        device = ranks.start(choose_device(config.device))
        ranks.see_that_it_divides(config.batch_size, config.shard)
        before = torch.device("cpu") if config.shard else device
        self.lm = load(config.model, before, **(four_bits(device) if config.load_in_4bit else {}))
        if config.lora_rank:
            self.lm = replace(self.lm, model=add_adapter(self.lm.model, config))
        self.learner = Learner(config, task, self.lm, self.rewards, device)
        known = {name: skills[name] for name in self.card.get("skills", []) if name in skills}
        self.examiner = Examiner(config, task, known)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        versions["numpy"] = numpy.__version__
        where = environment(_device_name(device), torch.get_num_threads(), versions)
        folder = self.folder if ranks.is_first() else None  # the others write nothing
        self.metrics = Metrics(folder, config.to_dict(), {**where, "processes": ranks.count()})
        self.samples = Samples(folder)
        self.tracker = Tracker(config.track if ranks.is_first() else "none")
        self.saved_model = self.folder / SAVED_MODEL
        self.before: dict[str, Any] = {}  # the starting model on the test problems
        self.best: dict[str, Any] | None = None  # the evaluation of the best policy, with its step
        self.done = 0  # steps
        self.rollout: RolloutBatch | None = None  # of the last step
        self.launched = time.monotonic() if launched is None else launched
        self.slowest = self.ending = 0.0  # seconds of the slowest step, and of what comes after the last

    def run(self) -> int:
        """Go on from the newest checkpoint, or begin; train; measure the best policy. Returns the exit status."""
        with Stops(self.config.time_limit, self.launched) as stops:
            shared = {"the update": self.learner.shared, "sampling": self.learner.repeated}
            report.introduce(self.config, self.lm, self.metrics.record["environment"], shared)
            ended = self._restore()
            if ended and self._why_done():
                report.already_finished(self.folder, ended)
                self._draw(ended)
                return 0
            with self.tracker.tracking(self.folder, self.config.to_dict()):
                self._go_on(stops)
            return stops.exit_status

    def _go_on(self, stops: Stops) -> None:
        """From where the run stands to its end, or to a reason to stop."""
        self._begin()
        try:
            reason = self._why_done() or self._train(stops)
        except ValueError:  # out of memory, a broken reward: what has been done stays known
            self.metrics.write()
            raise
        self._checkpoint()
        if stops.interrupted():
            report.interrupted(self.folder, self.done, reason)
        else:
            self._finish(reason)
        self.metrics.write()
        self._draw(self.metrics.record)

    def _train(self, stops: Stops) -> str:
        """Steps until there is a reason to stop, which is returned."""
        c = self.config
        progress = Progress(self.done, c.num_iterations)
        try:
            while True:
                start = time.monotonic()
                self.rollout, entry = self.learner.step(self.done + 1)
                self.done += 1
                self.metrics.add_step(entry)
                self.samples.add(self.done, self.rollout)
                self.tracker.log(self.done, entry)
                self._diagnose()
                progress.update(
                    self.done, {"reward": entry["reward_mean"], "accuracy": entry["accuracy"], "kl": entry["kl"]}
                )
                self._stop_if_broken()
                if c.show_every and self.done % c.show_every == 0:
                    report.show_completions(self.done, self.rollout)
                if self.done % c.eval_every == 0 or self.done == c.num_iterations:
                    self._validate(self.done)
                self.slowest = max(self.slowest, time.monotonic() - start)
                if reason := self._why_done() or stops.reason(1.5 * (self.slowest + self.ending)):
                    return reason
                if self.done % c.save_every == 0:
                    self._checkpoint()
        finally:
            progress.close()

    def _begin(self) -> None:
        """What comes before the first step: a checkpoint to return to, and where the model stands."""
        if self.before:
            return
        self.examiner.remember(self.lm)
        self._checkpoint()
        self.before = self._test(self.lm, 0)
        self._validate(0)

    def _why_done(self) -> str | None:
        """Why no more steps are due, from what has been reached, or None."""
        c = self.config
        evals = [e for e in self.metrics.record["evals"] if e["split"] == "validation"]
        if self.done >= c.num_iterations:
            return "all steps are done"
        if c.target_accuracy and self.best and self.best["accuracy"] >= c.target_accuracy:
            return f"validation accuracy reached {c.target_accuracy:g}"
        later = [e for e in evals if self.best and e["step"] > self.best["step"]]
        if c.patience and len(later) >= c.patience:
            return f"the last {len(later)} evaluations were no better than that of step {self.best['step']}"
        return None

    def _finish(self, reason: str) -> None:
        """Measure the saved policy on the test problems, and say what the run reached."""
        device = self.lm.device
        del self.learner, self.lm  # policy, reference and optimizer make room
        best = load(str(self.saved_model), torch.device("cpu") if self.config.shard else device)
        if self.config.shard:
            shard(best.model, device)
        after = self._test(best, self.best["step"])
        if ranks.is_first():
            readme = report.model_card(self.config, self.best, self.before, after)
            with writing(self.saved_model / "README.md"):
                (self.saved_model / "README.md").write_text(readme, encoding="utf-8")
        ending = {"step": self.done, "reason": reason, "peak_memory": peak_memory(device)}
        self.metrics.record["finished"] = ending
        self.metrics.write()
        report.conclude(self.folder, self.metrics.record, time.monotonic() - self.launched)

    def _stop_if_broken(self) -> None:
        skipped = self.learner.skipped_in_a_row
        if skipped < MOST_SKIPPED:
            return
        self._checkpoint()
        raise ValueError(
            f"the last {skipped} updates had a loss or gradient that is not finite. None was applied: "
            f"the weights are those of the last good one, {self.saved_model} holds the best policy. Start anew with "
            "a smaller --learning-rate or a larger --beta"
        )

    def _checkpoint(self) -> None:
        """Write what the rest of the run depends on; a checkpoint of the same step is already the same."""
        start = time.perf_counter()
        state = {
            "config": self.config.to_dict(),
            "files": self.files,
            "threads": torch.get_num_threads(),
            "before": self.before,
            "best": self.best,
            "evaluate_limit": self.examiner.limit.rows,
            "start": self.examiner.start and self.examiner.start.to_dict(),
        }
        record = {name: self.metrics.record[name] for name in ("steps", "evals", "findings")}
        checkpoint = self.learner.checkpoint(self.done, record, state)
        if ranks.is_first():
            write_checkpoint(self.folder, checkpoint)
        self.metrics.add_time("save", time.perf_counter() - start)

    def _restore(self) -> dict[str, Any] | None:
        """Go on from the newest checkpoint that verifies; returns the whole record if the run had ended there.

        Raises ValueError where there is a run but none of its checkpoints can be used, or its settings are others.
        """
        with ranks.first_before_others():  # it sets damaged ones aside
            checkpoint, problems = newest_checkpoint(self.folder)
        for problem in problems:
            say(f"Warning: {problem}")
        if checkpoint is None:
            if problems:
                raise ValueError(f"none of the checkpoints in {self.folder.resolve()} can be used; {WAYS_ON}")
            return None
        see_that_it_is_ours(checkpoint)
        refuse_another_run(self.folder, checkpoint, self.config, self.files)
        self.learner.restore(checkpoint)
        self.examiner.limit.rows = checkpoint.state.get("evaluate_limit", ROWS)
        if start := checkpoint.state.get("start"):
            self.examiner.start = StartingAnswers(**start)
        self.done = checkpoint.step
        self.before, self.best = checkpoint.state["before"], checkpoint.state["best"]
        self.metrics.restore(checkpoint.metrics)
        self.samples.cut(self.done)
        behind = self.best and self.best["step"] == self.done != read_card(str(self.saved_model)).get("step")
        if ranks.of_first(behind):
            self._save()  # a kill came between the checkpoint and this
        report.going_on(self.done, checkpoint.state["threads"], torch.get_num_threads())
        return ranks.of_first(ended_with(self.folder, checkpoint.step, checkpoint.metrics))

    def _draw(self, record: dict[str, Any]) -> None:
        if ranks.is_first():
            draw_all(record, self.folder)

    def _validate(self, step: int) -> None:
        """Measure on the validation problems; a new best policy goes to saved_model/."""
        entry = self._examine(self.examiner.validate, self.lm, step, "validation")
        improved = self.best is None or entry["accuracy"] > self.best["accuracy"]
        if improved:
            self.best = entry
            if step:
                self._checkpoint()  # first, so that saved_model/ is never ahead of what a run can go on from
            self._save()
        report.show_evaluation(entry, improved)

    def _test(self, lm: LanguageModel, step: int) -> dict[str, Any]:
        """Measure a model on the test problems, and on what else it should be able to."""
        entry = self._examine(self.examiner.test, lm, step, "test")
        self.ending = max(self.ending, entry["time/evaluate"])
        return entry

    def _examine(
        self, measure: Callable[[LanguageModel], dict[str, Any]], lm: LanguageModel, step: int, split: str
    ) -> dict[str, Any]:
        """An entry of `evals`, added to the metrics."""
        start = time.perf_counter()
        entry = {"step": step, "split": split, **measure(lm), "time/evaluate": time.perf_counter() - start}
        self.metrics.add_eval(entry)
        self.tracker.log(self.done, entry, f"{split}/")
        self._diagnose(aloud=split != "test")  # the findings of the last test are in the list that follows it
        return entry

    def _diagnose(self, aloud: bool = True) -> None:
        """Note what the metrics show of the run's health and have not shown before, and say it."""
        record = self.metrics.record["findings"]
        for finding in new_findings(self.metrics.record, {earlier["name"] for earlier in record}):
            record.append(asdict(finding))
            if finding.name in SHOW_EXAMPLES and self.rollout is not None:
                record[-1]["examples"] = self.rollout.paid_and_wrong()
            if aloud:
                report.show_finding(record[-1])

    def _save(self) -> None:
        """Write the policy as it is now to saved_model/, with what a reader and a next run need."""
        c, start = self.config, time.perf_counter()
        folder = model_folder(c.model)
        base = str(folder.resolve()) if folder and c.model != "starter" else c.model
        card = {
            "task": self.task.name,
            "step": self.best["step"],
            "kind": self.task.kind,
            "prompt_style": self.task.style,
            "system_prompt": self.task.system_prompt,
            "max_new_tokens": c.max_new_tokens,
            "base_model": base,
            "skills": list(self.examiner.skills),
            "settings": c.passed_on(),
        }
        save(self.saved_model, self.lm, card, report.model_card(c, self.best, self.before, None))
        self.metrics.add_time("save", time.perf_counter() - start)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
