"""The worker of TRL's GRPOTrainer, set up to do the same work as fast as it can. It runs in a separate environment.

One step of this project, a rollout and μ updates on all of it, is μ optimizer steps on one generation batch in TRL.
TRL samples by transformers: vLLM needs a GPU, and transformers' continuous batching was a hundred times slower on a
CPU (22 s instead of 0.2 s for 64 completions).
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from grpo.model.saving import save
from grpo.runtime.precision import precision, set_precision
from tasks.base import Problem
from tasks.rewards.scoring import score
from tests.benchmarks.work import NEVER, Channel, Spec, record


def settings(spec: Spec, folder: str, half: bool) -> GRPOConfig:
    """Return settings for the same algorithm (objective, sizes, optimizer), without extras that cost time."""
    c, size = spec.config, spec.size
    passes = size.prompts * size.group // spec.rows if spec.rows else 1
    return GRPOConfig(
        output_dir=folder,
        # the work
        per_device_train_batch_size=spec.rows or size.prompts * size.group,
        gradient_accumulation_steps=passes,
        steps_per_generation=passes,
        num_generations=size.group,
        num_iterations=c.num_inner_updates,
        max_completion_length=size.completion,
        max_steps=spec.max_steps * c.num_inner_updates,
        shuffle_dataset=False,
        # the algorithm
        loss_type="grpo",
        scale_rewards="group",
        beta=c.beta,
        epsilon=c.epsilon,
        use_bias_correction_kl=False,  # its default multiplies the KL by the ratio; the paper does not
        temperature=c.temperature,
        top_p=1.0,
        top_k=0,
        learning_rate=c.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=c.clip_grad_norm,
        optim="adamw_torch_fused",
        seed=c.seed,
        # the speed
        bf16=half,
        fp16=False,
        gradient_checkpointing=False,  # on by default
        use_cpu=spec.device == "cpu",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        disable_dropout=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        logging_steps=c.num_inner_updates,  # one record a step, as here
        log_completions=False,
    )


class Turns(transformers.TrainerCallback):
    """Times steps, and waits at the end of each turn."""

    def __init__(self, spec: Spec, channel: Channel) -> None:
        self._channel, self._inner, self._group = channel, spec.config.num_inner_updates, spec.size.group
        self._order: dict[str, Any] = {"steps": 0}
        self._start, self._updates, self._all_tokens = 0.0, 0, 0
        self.phases: dict[str, float] = {}
        self.rewards: list[float] = []
        self.problems: list[str] = []
        self.tokens: tuple[Any, Any] = ((), ())

    def timed(self, phase: str, function: Callable, when: Callable[[], bool] = lambda: True) -> Callable:
        """Return `function` wrapped so that its seconds count as `phase`."""

        def run(*args: Any, **more: Any) -> Any:
            if not when():
                return function(*args, **more)
            start = time.perf_counter()
            result = function(*args, **more)
            self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - start
            if phase == "sampling":
                self.tokens = result[:2]
            return result

        return run

    def on_train_begin(self, args: GRPOConfig, *_: Any, **more: Any) -> None:
        """Wait for the first turn."""
        self._channel.ready(loss_type=args.loss_type)
        self._wait()

    def on_optimizer_step(self, *args: Any, **more: Any) -> None:
        """Count an update."""
        self._updates += 1

    def on_step_end(self, args: GRPOConfig, state: transformers.TrainerState, *_: Any, **more: Any) -> None:
        """Record a step after μ optimizer steps."""
        if state.global_step % self._inner:
            return
        now = time.perf_counter()
        prompts, completions = ([len(ids) for ids in rows] for rows in self.tokens)
        self._all_tokens += sum(prompts) + sum(completions)
        self._channel.records.append(
            record(
                now - self._start,
                self.phases,
                prompts[:: self._group],
                completions,
                updates=self._updates,
                reward=fmean(self.rewards),
                problems=self.problems[:: self._group],
            )
        )
        self._start, self._updates, self.phases = now, 0, {}
        if len(self._channel.records) == self._order["steps"]:
            self._channel.answer(self._order)
            self._wait()

    def on_log(self, args: GRPOConfig, state: transformers.TrainerState, *_: Any, logs: dict, **more: Any) -> None:
        """Compare the counts of tokens and steps with TRL's counts."""
        if "num_tokens" in logs:
            assert logs["num_tokens"] == self._all_tokens, (logs, self._all_tokens)
            assert state.global_step % self._inner == 0

    def _wait(self) -> None:
        while (order := self._channel.receive()) is not None:
            if order["steps"]:
                self._order, self._start = order, time.perf_counter()
                return
            self._channel.answer(order)  # an evaluation alone
        raise SystemExit  # ends TRL's training loop, which has nothing to save


def main() -> None:
    """Train until there are no more turns."""
    spec = Spec.of_arguments()
    c, task, rewards = spec.config, spec.task, spec.rewards
    lm = spec.language_model("float32")  # with the layers of transformers
    set_precision(lm.model, c.precision, lm.model.device)
    places = [(step, row) for step in range(1, spec.max_steps + 1) for row in range(c.batch_size)]
    problems = [task.training_problem(c.seed, *place) for place in places]
    rows = [{"prompt": task.messages(p.question), "question": p.question, "answer": p.answer} for p in problems]

    def reward(completions: list, completion_ids: list, question: list, answer: list, **_: Any) -> list[float]:
        attempts = [
            task.grade(Problem(q, a), completion[0]["content"])
            for q, a, completion in zip(question, answer, completions, strict=True)
        ]
        scores = score(rewards, attempts, {"completion_ids": completion_ids}, lambda _: nullcontext())
        turns.problems, turns.rewards = question, [reward.total for reward in scores]
        return turns.rewards

    with TemporaryDirectory() as folder:
        if c.beta:  # TRL reads the model again for its reference, and cannot read a package's GGUF file
            save(Path(folder, "model"), lm, {}, "")
            lm.model.config._name_or_path = str(Path(folder, "model"))
        trainer = GRPOTrainer(
            model=lm.model,  # in float32; TRL loads its reference in the same type
            reward_funcs=reward,
            args=settings(spec, folder, half=precision(lm.model) == "bfloat16"),
            train_dataset=Dataset.from_list(rows),
            processing_class=lm.tokenizer,
        )
        if spec.size.prompt:  # completions of full length, without the cost of a logits processor
            trainer.eos_token_ids = trainer.generation_config.eos_token_id = [NEVER]
            trainer.generation_kwargs["eos_token_id"] = [NEVER]
        turns = Turns(spec, Channel(spec, lm))
        trainer.add_callback(turns)
        trainer._generate = turns.timed("sampling", trainer._generate)
        trainer._calculate_rewards = turns.timed("reward", trainer._calculate_rewards)
        trainer._get_per_token_logps_and_entropies = turns.timed(  # without gradient: for reference and sampler
            "scoring", trainer._get_per_token_logps_and_entropies, lambda: not torch.is_grad_enabled()
        )
        trainer.train()


if __name__ == "__main__":
    main()
