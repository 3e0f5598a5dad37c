"""The training loop: rollout, update, log, evaluate, save.

`Trainer.step` is the algorithm (DeepSeekMath, arXiv:2402.03300, algorithm 1): sample a group of completions
for each prompt, score them, compare each with its group, and take a few clipped updates against the policy
that sampled, with a KL penalty against the frozen reference.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

from grpo import report
from grpo.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    refuse_another_run,
    restore_optimizer,
    write_checkpoint,
)
from grpo.config import TrainConfig, model_folder, read_card
from grpo.console import Progress, say
from grpo.evaluate import ROWS, evaluate
from grpo.logprobs import can_share
from grpo.memory import PassLimit
from grpo.metrics import Metrics, Stopwatch, environment, load_metrics
from grpo.models import SAVED_MODEL, LanguageModel, be_deterministic, choose_device, frozen_copy, load, save
from grpo.plots import draw_all
from grpo.rollout import RolloutBatch, collect
from grpo.stops import Stops
from grpo.update import Batch, inner_update, reference_logprobs, summary
from tasks.base import Problem, Task
from tasks.rewards import parse_rewards

TEST_PROBLEMS = 1000  # or all there are
SKILL_PROBLEMS = 500
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
        device = choose_device(config.device)
        be_deterministic(config.deterministic)
        self.lm = load(config.model, device)
        self.reference = frozen_copy(self.lm.model) if config.beta > 0 else None
        self.optimizer = torch.optim.AdamW(
            self.lm.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        self.skills = {name: skills[name] for name in self.card.get("skills", []) if name in skills}
        versions = {library.__name__: library.__version__ for library in (torch, transformers, numpy)}
        machine = environment(_device_name(device), torch.get_num_threads(), versions)
        self.metrics = Metrics(self.folder, config.to_dict(), machine)
        g, prompts = config.num_generations, config.micro_batch_size or config.batch_size
        self.limits = {
            "sample": PassLimit("sampling", config.batch_size * g, g),
            "update": PassLimit("the update", min(prompts, config.batch_size) * g, g),
            "evaluate": PassLimit("the evaluation", ROWS, 1),
        }
        self.saved_model = self.folder / SAVED_MODEL
        self.before: dict[str, Any] = {}  # the starting model on the test problems
        self.best: dict[str, Any] | None = None  # the evaluation of the best policy, with its step
        self.skipped_in_a_row = 0
        self.done = 0  # steps
        self.launched = time.monotonic() if launched is None else launched
        self.slowest = self.ending = 0.0  # seconds of the slowest step, and of what comes after the last
        prompts = task.held_out("validation", 2)
        self.shared = can_share(self.lm.model, *self.lm.encode([task.messages(p.question) for p in prompts]))

    def step(self, step: int) -> tuple[RolloutBatch, dict[str, Any]]:
        """One step of GRPO: one rollout and `num_inner_updates` updates on it."""
        c, clock, updates, sample = self.config, Stopwatch(), [], self.limits["sample"].fit
        with clock("total"):
            rollout = sample(collect, self.lm, self.task, self.rewards, c, step, clock, shared=self.shared)
            batch, fit = Batch(rollout.tokens, rollout.advantages), self.limits["update"].fit
            with clock("reference"):
                if self.reference is not None:
                    ref_logprobs = fit(reference_logprobs, self.reference, rollout.tokens, c, shared=self.shared)
                    batch = replace(batch, ref_logprobs=ref_logprobs)
            with clock("update"):
                for _ in range(c.num_inner_updates):
                    stats, logprobs = fit(inner_update, self.lm.model, self.optimizer, batch, c, shared=self.shared)
                    updates.append(stats)
                    if batch.old_logprobs is None:  # the policy was still the one that sampled
                        batch = replace(batch, old_logprobs=logprobs)
        for update in updates:
            self.skipped_in_a_row = 0 if update.applied else self.skipped_in_a_row + 1
        times = {f"time/{phase}": seconds for phase, seconds in clock.seconds.items()}
        entry = rollout.summary() | summary(updates) | times
        return rollout, {"step": step, **entry, "learning_rate": c.learning_rate}

    def run(self) -> int:
        """Go on from the newest checkpoint, or begin; train; measure the best policy. Returns the exit status."""
        with Stops(self.config.time_limit, self.launched) as stops:
            report.introduce(self.config, self.lm, self.metrics.record["environment"], self.shared)
            ended = self._restore()
            if ended and self._why_done():
                report.already_finished(self.folder, ended)
                draw_all(ended, self.folder)
                return 0
            self._begin()
            try:
                reason = self._why_done() or self._train(stops)
            except ValueError:  # out of memory, a broken reward: what has been done stays known
                self.metrics.write()
                raise
            self._checkpoint()
            if stops.signal is None:
                self._finish(reason)
            else:
                report.interrupted(self.folder, self.done, reason)
            self.metrics.write()
            draw_all(self.metrics.record, self.folder)
            return stops.exit_status

    def _train(self, stops: Stops) -> str:
        """Steps until there is a reason to stop, which is returned."""
        c = self.config
        progress = Progress(self.done, c.num_iterations)
        try:
            while True:
                start = time.monotonic()
                rollout, entry = self.step(self.done + 1)
                self.done += 1
                self.metrics.add_step(entry)
                progress.update(
                    self.done, {"reward": entry["reward_mean"], "accuracy": entry["accuracy"], "kl": entry["kl"]}
                )
                self._stop_if_broken()
                if c.show_every and self.done % c.show_every == 0:
                    report.show_completions(self.done, rollout)
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
        after = self._test(load(str(self.saved_model), self.lm.device), self.best["step"])
        readme = report.model_card(self.config, self.best, self.before, after)
        (self.saved_model / "README.md").write_text(readme, encoding="utf-8")
        self.metrics.record["finished"] = {"step": self.done, "reason": reason}
        self.metrics.write()
        report.conclude(self.folder, self.metrics.record, time.monotonic() - self.launched)

    def _stop_if_broken(self) -> None:
        if self.skipped_in_a_row < MOST_SKIPPED:
            return
        self._checkpoint()
        raise ValueError(
            f"the last {self.skipped_in_a_row} updates had a loss or gradient that is not finite. None was applied: "
            f"the weights are those of the last good one, {self.saved_model} holds the best policy. Start anew with "
            "a smaller --learning-rate or a larger --beta"
        )

    def _checkpoint(self) -> None:
        """Write what the rest of the run depends on; a checkpoint of the same step is already the same."""
        state = {
            "config": self.config.to_dict(),
            "files": self.files,
            "threads": torch.get_num_threads(),
            "before": self.before,
            "best": self.best,
            "skipped_in_a_row": self.skipped_in_a_row,
            "limits": {name: limit.rows for name, limit in self.limits.items()},
        }
        policy = dict(self.lm.model.named_parameters())
        record = {name: self.metrics.record[name] for name in ("steps", "evals", "findings")}
        write_checkpoint(self.folder, Checkpoint(self.done, policy, optimizer_tensors(self.optimizer), record, state))

    def _restore(self) -> dict[str, Any] | None:
        """Go on from the newest checkpoint that verifies; returns the whole record if the run had ended there.

        Raises ValueError where there is a run but none of its checkpoints can be used, or its settings are others.
        """
        checkpoint, problems = newest_checkpoint(self.folder)
        for problem in problems:
            say(f"Warning: {problem}")
        if checkpoint is None:
            if problems:
                raise ValueError(
                    f"none of the checkpoints in {self.folder.resolve()} can be used; --fresh moves the run to "
                    "earlier_runs/ and starts over, --output-dir NEW trains elsewhere"
                )
            return None
        refuse_another_run(self.folder, checkpoint, self.config, self.files)
        with torch.no_grad():
            for name, parameter in self.lm.model.named_parameters():
                parameter.copy_(checkpoint.policy[name])
        restore_optimizer(self.optimizer, checkpoint.optimizer)
        self.done = checkpoint.step
        self.before, self.best = checkpoint.state["before"], checkpoint.state["best"]
        self.skipped_in_a_row = checkpoint.state["skipped_in_a_row"]
        if checkpoint.state["config"]["micro_batch_size"] == self.config.micro_batch_size:
            for name, rows in checkpoint.state.get("limits", {}).items():
                self.limits[name].rows = rows
        self.metrics.restore(checkpoint.metrics)
        if self.best and self.best["step"] == self.done != read_card(str(self.saved_model)).get("step"):
            self._save()  # a kill came between the checkpoint and this
        report.going_on(self.done, checkpoint.state["threads"], torch.get_num_threads())
        try:
            written = load_metrics(self.folder)
        except ValueError:
            return None  # damaged or missing; the checkpoint has all of it but the ending
        return written if (written.get("finished") or {}).get("step") == self.done else None

    def _validate(self, step: int) -> None:
        """Measure on the validation problems; a new best policy goes to saved_model/."""
        start = time.perf_counter()
        problems = self.task.held_out("validation", self.config.eval_problems)
        result = self._evaluate(self.lm, self.task, problems)
        entry = {"step": step, "split": "validation", **result, "time/evaluate": time.perf_counter() - start}
        improved = self.best is None or result["accuracy"] > self.best["accuracy"]
        self.metrics.add_eval(entry)
        if improved:
            self.best = entry
            if step:
                self._checkpoint()  # first, so that saved_model/ is never ahead of what a run can go on from
            self._save()
        report.show_evaluation(entry, improved)

    def _test(self, lm: LanguageModel, step: int) -> dict[str, Any]:
        """Measure a model on the test problems, and on the neighbouring skills that it has."""
        start = time.perf_counter()
        result = self._evaluate(lm, self.task, self.task.held_out("test", TEST_PROBLEMS))
        skills = {
            name: self._evaluate(lm, skill, skill.held_out("test", SKILL_PROBLEMS))
            for name, skill in self.skills.items()
        }
        entry = {"step": step, "split": "test", **result, "skills": skills}
        entry["time/evaluate"] = time.perf_counter() - start
        self.metrics.add_eval(entry)
        self.ending = max(self.ending, entry["time/evaluate"])
        return entry

    def _evaluate(self, lm: LanguageModel, task: Task, problems: Sequence[Problem]) -> dict[str, float | int]:
        return self.limits["evaluate"].fit(evaluate, lm, task, problems, self.config.max_new_tokens).to_dict()

    def _save(self) -> None:
        """Write the policy as it is now to saved_model/, with what a reader and a next run need."""
        c = self.config
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
            "skills": list(self.skills),
            "settings": c.passed_on(),
        }
        save(self.saved_model, self.lm, card, report.model_card(c, self.best, self.before, None))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
