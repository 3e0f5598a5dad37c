"""Train from the first step to the end, with evaluations and checkpoints. `algorithm/grpo.py` takes the steps."""

import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from grpo.algorithm.grpo import GRPO
from grpo.config import TrainConfig
from grpo.evaluation.evaluator import Evaluator
from grpo.interrupts import TIME_LIMIT, Interrupted, InterruptHandler
from grpo.launch.device_look import check_device
from grpo.launch.outlook import NothingToLearn, is_hopeless, look_closer, outlook, try_settings, way_out
from grpo.launch.run_folder import free_folder
from grpo.measurer import Measurer
from grpo.model.chat_template import task_for
from grpo.model.language_model import fitting_task, limit_note
from grpo.model.loading import load, load_policy
from grpo.model.lora import ADAPTER, read_adapter
from grpo.model.saving import SAVED_MODEL
from grpo.model_card import read_card
from grpo.plots.figures import draw_all
from grpo.record.metrics import Metrics, ended_with
from grpo.report.ending import conclude, show_already_finished, show_interruption
from grpo.report.opening import (
    introduce,
    show_choice_by_reward,
    show_fine_tuning,
    show_outlook,
    show_stop,
    show_trials,
)
from grpo.report.progress import show_completions, show_evaluation, show_reward_error
from grpo.report.saved_readme import saved_readme
from grpo.resume import Progress, RunState
from grpo.runtime.atomic_io import check_room, name_in_errors
from grpo.runtime.console import ProgressBar
from grpo.runtime.device import (
    TRAITS,
    choose_device,
    environment,
    keep_freed_memory,
    set_deterministic,
    use_large_pages,
)
from grpo.runtime.precision import precision
from grpo.runtime.ranks import ONE, Ranks
from grpo.runtime.sharding import shard
from grpo.sft import SupervisedTrainer
from grpo.step_probe import measured_step
from tasks.base import Reward, Task
from tasks.rewards.scoring import RewardFunction, decides_by_reward, decides_until_right, rewards_of

QUICK_STEP_SECONDS = 1.0  # After a signal, a step is finished if it takes at most this long, else thrown away.
MAX_SKIPPED_IN_A_ROW = 10  # The run ends after this many updates in a row whose loss or gradient was not finite.
TIME_MARGIN = 1.5  # Expected times are multiplied by this, because a step may be slower than all before it.
RECENT_STEPS = 10  # A run ends if, in its last 10 steps, rewards failed more often than a step has completions.


class Trainer:
    """Runs the training in an output folder: `Trainer(config, task, skills).run()`."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        skills: dict[str, Task],
        rewards: Sequence[RewardFunction] = (),
        launched: float | None = None,
        ranks: Ranks = ONE,
        train_anyway: bool = False,
        accept_changed_files: bool = False,
        trust_device: bool = False,
    ) -> None:
        """Load the model and make the parts of the run.

        `skills` are tasks by name; those on the model's card are measured, but not trained on. Without `rewards`, the
        run has those that `config` names. A time limit counts from `launched`, a value of `time.monotonic()`, by
        default now. With `train_anyway`, train even if the outlook finds hardly any learning signal. With
        `accept_changed_files`, continue even if files of rewards, tasks or problems changed. With `trust_device`,
        continue even if the device computes other results than the CPU.
        """
        self.config, self.ranks, self.train_anyway = config, ranks, train_anyway
        self.folder = Path(config.output_dir)
        self.saved_model = self.folder / SAVED_MODEL
        rewards = rewards or rewards_of(config, task)
        files = dict(task.files)
        for reward in rewards:
            files |= reward.files
        set_deterministic(config.deterministic)
        device = ranks.own_device(choose_device(config.device))
        if device.type == "cpu":
            use_large_pages()
        ranks.check_divisible(config.batch_size, config.shard)
        if config.sft_steps:
            ranks.check_divisible(config.sft_batch_size, config.shard, "--sft-batch-size")
        self.lm = load_policy(config, device, ranks)
        parameters = self.lm.model.num_parameters()
        if device.type == "cpu":
            keep_freed_memory(parameters)
        self.end_step = partial(TRAITS[device.type].end_step, parameters)
        task = fitting_task(self.lm, task_for(self.lm, task), config)
        if note := limit_note(self.lm, task, config):
            task = replace(task, notes=[*task.notes, note])
        self.task = task
        self.grpo = GRPO(config, task, self.lm, rewards, device, ranks)
        if not TRAITS[device.type].is_reference:
            check_device(device, precision(self.lm.model), self.grpo.scorer, self.grpo.decoder, trust_device)
        model_skills = {name: skills[name] for name in read_card(config.model).get("skills", []) if name in skills}
        choosing_rewards = rewards if decides_until_right(rewards, task) else ()
        always = decides_by_reward(rewards, task)
        self.evaluator = Evaluator(config, task, model_skills, self.grpo.decoder, choosing_rewards, ranks, always)
        folder = self.folder if ranks.is_main else None  # the other ranks write nothing
        self.metrics = Metrics(folder, config.to_dict(), environment(device, precision(self.lm.model), ranks.size))
        self.progress = Progress()
        self.measurer = Measurer(config, task, self.evaluator, self.metrics, self.progress, ranks)
        parts = (self.progress, self.grpo, self.evaluator, self.metrics)
        self.state = RunState(config, files, *parts, ranks, accept_changed_files=accept_changed_files)
        self.reward_errors_shown: set[str] = set()
        self.launched = time.monotonic() if launched is None else launched

    def run(self) -> int:
        """Start, or continue from the newest checkpoint; train; measure the best policy; return the exit status."""
        with InterruptHandler(self.config.time_limit, self.launched, self.ranks) as interrupts:
            machine = self.metrics.record["environment"]
            introduce(self.config, self.lm, machine, self.task.notes)
            ended = self._restore()
            if ended and self.state.why_done():
                show_already_finished(self.folder, ended)
                self._draw(ended)
                return interrupts.exit_status
            if self.ranks.is_main:
                check_room(self.folder, self.state.bytes_to_come(), "two checkpoints and the model")
            try:
                has_logged = self.progress.before or self.progress.sft_step
                last_step = self.progress.total if has_logged else None
                with self.measurer.tracker.tracking(self.folder, self.config.to_dict(), last_step):
                    self._continue(interrupts)
            except NothingToLearn:
                return 1
            except OSError as error:
                raise OSError(self.state.what_is_lost(self.folder, error)) from error
            return interrupts.exit_status

    def _continue(self, interrupts: InterruptHandler) -> None:
        """Train until the end of the run, or until there is a reason to stop."""
        try:
            reason = self._begin(interrupts) or self.state.why_done() or self._train(interrupts)
            if interrupts.interrupted() or self.progress.best is None:
                self._stop(interrupts, reason)
            else:
                if not self.measurer.is_validated(self.progress.step):
                    self._validate(interrupts)  # because the last policy may be the best
                self.state.save(self.folder)
                self._finish(interrupts, reason)
                self._draw(self.metrics.record)
        except Interrupted:
            self._stop(interrupts, interrupts.name)
        except ValueError:  # too little memory or a broken reward, for example; keep the metrics
            self.metrics.write()
            raise

    def _stop(self, interrupts: InterruptHandler, reason: str) -> None:
        """Save after an early end, and say how to continue. A policy that a step has partly changed is not saved."""
        interrupts.stop_listening()
        place = self.progress.named()
        if self.grpo is not None:  # it is None during the last test, when everything has been saved
            if self.grpo.update.has_begun:
                place += f"; the newest checkpoint is from step {self.state.saved_step}"
            else:
                self.state.save(self.folder)
        self.metrics.write()
        if interrupts.signal != signal.SIGTERM:  # the sender of SIGTERM may kill the process a few seconds later
            self._draw(self.metrics.record)
        show_interruption(self.folder, place, reason)

    def _train(self, interrupts: InterruptHandler) -> str:
        """Take steps until there is a reason to stop; return the reason."""
        c, progress = self.config, self.progress
        last_test = progress.before.get("time/evaluate") or 0.0  # expected seconds of the last test
        slowest = math.inf  # seconds of the slowest step so far, without its evaluation
        bar = ProgressBar(progress.step, c.num_iterations)
        try:
            while True:
                start = time.monotonic()
                grace = QUICK_STEP_SECONDS if slowest <= QUICK_STEP_SECONDS else 0.0
                to_finish = TIME_MARGIN * (self.measurer.slowest_validation() + last_test)
                with interrupts.abandonable(grace, to_finish):
                    outcome, entry = measured_step(self.grpo, progress.step + 1)
                progress.step += 1
                self.grpo.update.has_begun = False
                seconds = time.monotonic() - start
                slowest = seconds if slowest == math.inf else max(seconds, slowest)
                self.measurer.record(outcome.rollout, entry)
                shown = {"reward": entry["reward_mean"], "accuracy": entry["accuracy"], "kl": entry["kl"]}
                bar.update(progress.step, shown)
                self.end_step()
                self._stop_if_broken()
                self._stop_if_rewards_fail(outcome.drawn.rewards)
                if c.show_every and progress.step % c.show_every == 0:
                    show_completions(progress.step, outcome.rollout)
                if progress.step % c.eval_every == 0 or progress.step == c.num_iterations:
                    self._validate(interrupts)
                needed = slowest + self.measurer.slowest_validation() + last_test
                if reason := self.state.why_done() or interrupts.reason(TIME_MARGIN * needed):
                    return reason
                if progress.step % c.save_every == 0 or self.state.saved_long_ago():
                    self.state.save(self.folder)
        except Interrupted:
            if interrupts.interrupted():
                raise
            return TIME_LIMIT
        finally:
            bar.close()

    def _begin(self, interrupts: InterruptHandler) -> str | None:
        """Do what comes before step 1: fine-tune if asked to, forecast, measure. Return a reason to stop, or None."""
        progress = self.progress
        if progress.before:
            if progress.step % self.config.eval_every == 0 and not self.measurer.is_validated(progress.step):
                self._validate(interrupts)  # a signal interrupted this validation in an earlier launch
            return None
        if self.config.sft_steps and not progress.sft_step:
            self._remember_start(interrupts)
        if not progress.sft_step:
            self.state.save(self.folder)  # so that the run can continue even if a user's reward fails
        if self.config.sft_steps and (reason := self._fine_tune(interrupts)):
            return reason
        with interrupts.abandonable():
            forecast, seconds = outlook(self.grpo, self.config)
        self.metrics.record["outlook"] = forecast
        peak_memory = TRAITS[self.lm.model.device.type].peak_memory(self.lm.model.device)
        show_outlook(forecast, seconds, self.config.num_iterations, peak_memory)
        self.measurer.diagnose()  # says at once if there is nothing to learn from
        if is_hopeless(forecast) and not self.train_anyway:
            with interrupts.abandonable():
                self._look_for_a_way_out(forecast)
        if not self.config.sft_steps:  # Not earlier, because a run that would learn nothing ends above.
            self._remember_start(interrupts)
        if self.evaluator.rewards:
            show_choice_by_reward(self.evaluator.always_by_reward)
        progress.before = self.measurer.measure(self.lm, "test", 0, interrupts.abandonable())
        if self.config.sft_steps:
            show_fine_tuning(progress.before, "after")
        self._validate(interrupts)
        return None

    def _remember_start(self, interrupts: InterruptHandler) -> None:
        with interrupts.abandonable():
            self.evaluator.remember_start(self.lm)

    def _look_for_a_way_out(self, forecast: Mapping[str, Any]) -> None:
        """Sample more groups. If hardly any has mixed rewards, try other settings, and raise NothingToLearn.

        A table of these trials is printed. The run's files are kept only if the model was fine-tuned.
        """
        look = look_closer(self.grpo, forecast)
        if not is_hopeless(look):
            return
        trials = try_settings(self.grpo, look)
        is_tuned = self.progress.sft_step > 0
        options = way_out(self.config, trials)
        if options and is_tuned:
            options.append("--fresh")
        show_trials(trials, options, self.ranks.script)
        if self.ranks.is_main and not is_tuned:
            free_folder(self.folder)
        show_stop(str(self.folder), is_tuned)
        raise NothingToLearn

    def _fine_tune(self, interrupts: InterruptHandler) -> str | None:
        """Take the remaining supervised steps, then begin GRPO from the result; return a reason to stop, or None."""
        c, progress, record = self.config, self.progress, self.metrics.record
        trainer = SupervisedTrainer(c, self.lm, self.task, self.grpo.update)
        if record["before_sft"] is None:
            with interrupts.abandonable():
                tested = self.evaluator.test(self.lm)
            record["before_sft"] = {"step": 0, "split": "test", **tested}
        show_fine_tuning(record["before_sft"], "before", trainer.teaches_working)
        bar = ProgressBar(progress.sft_step, c.sft_steps, "fine-tuning")
        try:
            while progress.sft_step < c.sft_steps:
                start = time.monotonic()
                entry = trainer.step(progress.sft_step + 1)
                progress.sft_step += 1
                self.metrics.add_step(entry, "sft")
                self.measurer.tracker.log(progress.total, entry, "sft/")
                bar.update(progress.sft_step, {"loss": entry["loss"]})
                self.end_step()
                self._stop_if_broken()
                if progress.sft_step % c.save_every == 0 or progress.sft_step == c.sft_steps:
                    self.state.save(self.folder)
                if reason := interrupts.reason(TIME_MARGIN * (time.monotonic() - start)):
                    return reason
        finally:
            bar.close()
        self.grpo.begin_here()
        return None

    def _finish(self, interrupts: InterruptHandler, reason: str) -> None:
        """Measure the saved policy on the test problems, and print the result of the run."""
        device, progress = self.lm.model.device, self.progress
        best = self.saved_model / ADAPTER if self.config.load_in_4bit else self.saved_model
        if not best.is_dir():
            raise ValueError(
                f"{best} was deleted or moved during the run. It held the best policy, of step "
                f"{progress.best['step']}: put it back and repeat the command, or start over with --fresh"
            )
        self.grpo = self.state.grpo = None  # free the memory of reference and optimizer
        with interrupts.abandonable():
            c = self.config
            if c.load_in_4bit:  # the device may have no room for the merged weights in float32
                read_adapter(self.lm.model, best)
            else:
                self.lm = None  # free the memory of the policy
                self.lm = load(str(best), device, c.precision, c.shard, c.chat_template_arg)
            if c.shard:
                shard(self.lm.model, device, self.ranks)
        after = self.measurer.measure(self.lm, "test", progress.best["step"], interrupts.abandonable())
        if self.ranks.is_main:
            readme = saved_readme(self.config, self.task, progress.best, progress.before, after)
            with name_in_errors(self.saved_model / "README.md"):
                (self.saved_model / "README.md").write_text(readme, encoding="utf-8")
        finished = {"step": progress.step, "reason": reason, "peak_memory": TRAITS[device.type].peak_memory(device)}
        self.metrics.record["finished"] = finished
        self.metrics.write()
        conclude(self.folder, self.metrics.record, time.monotonic() - self.launched, self.task.example)

    def _stop_if_broken(self) -> None:
        """Save, and raise ValueError, if too many updates in a row were not finite."""
        skipped = self.grpo.update.skipped_in_a_row
        if skipped < MAX_SKIPPED_IN_A_ROW:
            return
        self.state.save(self.folder)
        raise ValueError(
            f"the last {skipped} updates had a loss or gradient that is not finite. None was applied: the checkpoint "
            f"and {self.saved_model} are intact. Start over with a smaller --learning-rate or a larger --beta"
        )

    def _stop_if_rewards_fail(self, rewards: Sequence[Reward]) -> None:
        """Print the new errors of users' rewards in a step. Raise ValueError if rewards have failed too often."""
        errors = [error for reward in rewards for error in reward.errors]
        if not errors:
            return
        step, record = self.progress.step, self.metrics.record
        for error in dict.fromkeys(errors):
            if error not in self.reward_errors_shown:
                show_reward_error(step, error, errors.count(error), len(rewards))
        self.reward_errors_shown |= set(errors)
        corrected = max((change["step"] for change in record["changed_files"]), default=0)
        rows = [row for row in record["steps"][-RECENT_STEPS:] if row["step"] > corrected]
        failures = sum(row.get("reward_errors", 0) for row in rows)
        if failures > len(rewards):
            self.state.save(self.folder)
            raise ValueError(
                f"{errors[0]}; rewards failed {failures} times in the last {len(rows)} steps, which is too often. "
                "Correct the file, and repeat the command with --accept-changed-files"
            )

    def _restore(self) -> dict[str, Any] | None:
        """Continue from a checkpoint, if there is one. Return the run's record if the run has ended, else None."""
        if not self.state.restore(self.folder, self.measurer.samples):
            return None
        step, best = self.progress.step, self.progress.best
        is_unsaved = best and best["step"] == step != read_card(str(self.saved_model)).get("step")
        if self.ranks.from_main(is_unsaved):  # the process ended before it saved the model
            self.measurer.save(self.lm)
        return self.ranks.from_main(ended_with(self.folder, step, self.metrics.record))

    def _draw(self, record: dict[str, Any]) -> None:
        if self.ranks.is_main:
            draw_all(record, self.folder)

    def _validate(self, interrupts: InterruptHandler) -> None:
        """Measure the policy on the validation problems, and save it to saved_model/ if it is the best so far."""
        progress = self.progress
        entry = self.measurer.measure(self.lm, "validation", progress.step, interrupts.abandonable())
        improved = progress.is_better(entry)
        if improved:
            progress.best = entry
            if progress.step:
                self.state.save(self.folder)  # before saved_model/, which must not be ahead of the checkpoints
            self.measurer.save(self.lm)
        show_evaluation(entry, improved)
