"""The training loop: rollout, update, log, evaluate, save.

`Trainer.step` is the algorithm (DeepSeekMath, arXiv:2402.03300, algorithm 1): sample a group of completions
for each prompt, score them, compare each with its group, and take a few clipped updates against the policy
that sampled, with a KL penalty against the frozen reference.
"""

import time
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy
import torch
import transformers

from grpo import report
from grpo.config import TrainConfig, model_folder, read_card
from grpo.console import Progress, say
from grpo.evaluate import evaluate
from grpo.logprobs import can_share
from grpo.metrics import Metrics, Stopwatch, environment
from grpo.models import SAVED_MODEL, LanguageModel, choose_device, frozen_copy, load, save
from grpo.plots import draw_all
from grpo.rollout import RolloutBatch, collect
from grpo.update import UpdateStats, inner_update, micro_batches
from tasks.base import Task
from tasks.prompts import SYSTEM_PROMPTS

TEST_PROBLEMS = 1000  # or all there are
SKILL_PROBLEMS = 500
MOST_SKIPPED = 10  # updates in a row that were not finite, before the run ends


class Trainer:
    """A run in a folder: `Trainer(config, task, skills).run()`."""

    def __init__(self, config: TrainConfig, task: Task, skills: dict[str, Task]) -> None:
        self.config, self.task = config, task
        self.folder = Path(config.output_dir)
        self.card = read_card(config.model)
        device = choose_device(config.device)
        self.lm = load(config.model, device)
        self.reference = frozen_copy(self.lm.model) if config.beta > 0 else None
        self.optimizer = torch.optim.AdamW(
            self.lm.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        self.skills = {name: skills[name] for name in self.card.get("skills", []) if name in skills}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        versions["numpy"] = numpy.__version__
        self.metrics = Metrics(
            self.folder,
            config.to_dict(),
            environment(_device_name(device), torch.get_num_threads(), versions),
        )
        self.saved_model = self.folder / SAVED_MODEL
        self.before: dict[str, Any] = {}  # the starting model on the test problems
        self.best: dict[str, Any] | None = None  # the evaluation of the best policy, with its step
        self.skipped_in_a_row = 0
        prompts = task.held_out("validation", 2)
        self.shared = can_share(self.lm.model, *self.lm.encode([task.messages(p.question) for p in prompts]))

    def step(self, step: int) -> tuple[RolloutBatch, dict[str, Any]]:
        """One step of GRPO: one rollout and `num_inner_updates` updates on it."""
        clock = Stopwatch()
        with clock("total"):
            rollout = collect(self.lm, self.task, self.config, step, clock, shared=self.shared)
            with clock("reference"):
                batches = micro_batches(rollout.tokens, rollout.advantages, self.reference, self.config, self.shared)
            with clock("update"):
                updates = [
                    inner_update(self.lm.model, self.optimizer, batches, self.config, self.shared)
                    for _ in range(self.config.num_inner_updates)
                ]
        return rollout, self._entry(step, rollout, updates, clock)

    def run(self) -> None:
        """Evaluate, train, keep the best, measure it on the test problems, draw the plots.

        Ctrl-C ends the run after writing what there is, and is raised again.
        """
        started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        report.introduce(self.config, self.lm, self.metrics.record["environment"], self.shared)
        self.before = self._test(self.lm, 0)
        self._validate(0)
        try:
            self._train()
        except KeyboardInterrupt:
            say("\nInterrupted: writing metrics and plots; the best policy so far is in saved_model/.")
            self._write_up()
            raise
        after = self._test(load(str(self.saved_model), self.lm.device), self.best["step"])
        readme = report.model_card(self.config, self.best, self.before, after)
        (self.saved_model / "README.md").write_text(readme, encoding="utf-8")
        self._write_up()
        report.conclude(self.folder, self.metrics.record, time.monotonic() - started)

    def _train(self) -> None:
        c = self.config
        progress = Progress(0, c.num_iterations)
        for step in range(1, c.num_iterations + 1):
            rollout, entry = self.step(step)
            self.metrics.add_step(entry)
            progress.update(step, {"reward": entry["reward_mean"], "accuracy": entry["accuracy"], "kl": entry["kl"]})
            self._stop_if_broken()
            if c.show_every and step % c.show_every == 0:
                report.show_completions(step, rollout)
            if step % c.eval_every == 0 or step == c.num_iterations:
                self._validate(step)
        progress.close()

    def _entry(
        self, step: int, rollout: RolloutBatch, updates: list[UpdateStats], clock: Stopwatch
    ) -> dict[str, Any]:
        """The step's line in the metrics file; the README defines each name."""
        totals = rollout.totals()  # (N, G)
        applied = [u for u in updates if u.applied]
        self.skipped_in_a_row = 0 if updates[-1].applied else self.skipped_in_a_row + len(updates) - len(applied)
        tied = totals.amax(1) == totals.amin(1)
        right = torch.tensor([r.correct for r in rollout.rewards]).view_as(totals)
        parts = {f"reward/{name}": fmean(r.parts[name] for r in rollout.rewards) for name in self.task.reward_parts}
        mask = rollout.tokens.completion_mask
        return {
            "step": step,
            "reward_mean": float(totals.mean()),
            "reward_std": float(totals.std(1).mean()),
            **parts,
            "accuracy": fmean(r.correct for r in rollout.rewards),
            "kl": updates[0].kl,
            "loss": fmean(u.loss for u in updates),
            "clip_fraction": max(u.clip_fraction for u in updates),
            "ratio_max": max(u.ratio_max for u in updates),
            "entropy": updates[0].entropy,
            "grad_norm": fmean(u.grad_norm for u in updates),
            "learning_rate": self.config.learning_rate,
            "completion_length": float(mask.sum(-1).float().mean()),
            "truncated_fraction": float(rollout.truncated.float().mean()),
            "tied_groups_fraction": float(tied.float().mean()),
            "tied_all_right_fraction": float((tied & right.all(1)).float().mean()),
            "tied_all_wrong_fraction": float((tied & ~right.any(1)).float().mean()),
            "skipped_updates": len(updates) - len(applied),
            "tokens": int(mask.sum()) + int(rollout.tokens.prompt_mask.sum()),
            **{f"time/{phase}": seconds for phase, seconds in clock.seconds.items()},
        }

    def _stop_if_broken(self) -> None:
        if self.skipped_in_a_row >= MOST_SKIPPED:
            self.metrics.write()
            raise ValueError(
                f"the last {self.skipped_in_a_row} updates had a loss or gradient that is not finite and were not "
                "applied; the best policy is in saved_model/. Try a smaller --learning-rate or a larger --beta"
            )

    def _validate(self, step: int) -> None:
        """Measure on the validation problems; a new best policy goes to saved_model/."""
        start = time.perf_counter()
        problems = self.task.held_out("validation", self.config.eval_problems)
        result = evaluate(self.lm, self.task, problems, self.config.max_new_tokens).to_dict()
        entry = {"step": step, "split": "validation", **result, "time/evaluate": time.perf_counter() - start}
        improved = self.best is None or result["accuracy"] > self.best["accuracy"]
        if improved:
            self.best = entry
            self._save()
        self.metrics.add_eval(entry)
        report.show_evaluation(entry, improved)

    def _test(self, lm: LanguageModel, step: int) -> dict[str, Any]:
        """Measure a model on the test problems, and on the neighbouring skills that it has."""
        start = time.perf_counter()
        limit = self.config.max_new_tokens
        result = evaluate(lm, self.task, self.task.held_out("test", TEST_PROBLEMS), limit).to_dict()
        skills = {
            name: evaluate(lm, skill, skill.held_out("test", SKILL_PROBLEMS), limit).to_dict()
            for name, skill in self.skills.items()
        }
        entry = {"step": step, "split": "test", **result, "skills": skills}
        entry["time/evaluate"] = time.perf_counter() - start
        self.metrics.add_eval(entry)
        return entry

    def _save(self) -> None:
        """Write the policy as it is now to saved_model/, with what a reader and a next run need."""
        c = self.config
        folder = model_folder(c.model)
        base = str(folder.resolve()) if folder and c.model != "starter" else c.model
        card = {
            "task": self.task.name,
            "prompt_style": c.prompt_style,
            "system_prompt": SYSTEM_PROMPTS[c.prompt_style],
            "max_new_tokens": c.max_new_tokens,
            "base_model": base,
            "skills": list(self.skills),
            "settings": c.passed_on(),
        }
        save(self.saved_model, self.lm, card, report.model_card(c, self.best, self.before, None))

    def _write_up(self) -> None:
        self.metrics.write()
        draw_all(self.metrics.record, self.folder)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
