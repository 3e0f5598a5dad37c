"""One step of GRPO, as in the algorithm box of the paper (DeepSeekMath, arXiv:2402.03300, algorithm 1).

`Learner.step` samples a group of completions for each prompt, scores them, compares each with its group, and takes a
few clipped updates against the policy that sampled, with a KL penalty against the frozen reference.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from grpo import ranks
from grpo.checkpoint import Checkpoint, optimizer_tensors, restore_optimizer, see_that_it_fits
from grpo.config import TrainConfig
from grpo.logprobs import can_share
from grpo.lora import has_adapter, quiet, trainable
from grpo.memory import PassLimit, keep_what_is_freed
from grpo.metrics import Stopwatch
from grpo.models import LanguageModel, frozen_copy
from grpo.rollout import RolloutBatch, collect
from grpo.sampling import can_repeat
from grpo.schedule import adapted_beta
from grpo.sharding import for_the_first, like, part, shard
from grpo.update import Batch, inner_update, reference_logprobs, summary
from tasks.base import Task
from tasks.rewards import RewardFunction

WATCHED = 10_000  # weights, to see whether a step moves them


class Learner:
    """A policy with its reference and its optimizer, and all that a step changes."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        lm: LanguageModel,
        rewards: Sequence[RewardFunction] = (),
        device: torch.device | None = None,
    ) -> None:
        """Without `rewards`, those of the task are taken. `device` is where a model that is to be sharded goes."""
        self.config, self.task, self.lm, self.rewards = config, task, lm, rewards
        if lm.device.type == "cpu":
            keep_what_is_freed()
        adapted = has_adapter(lm.model)  # then the reference is the policy without it
        self.reference = frozen_copy(lm.model) if config.beta > 0 and not adapted else None
        if config.shard:
            for model in filter(None, (lm.model, self.reference)):
                shard(model, device or lm.device)
        self.optimizer = torch.optim.AdamW(
            trainable(lm.model).values(), lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True
        )
        self.beta = config.beta  # moves where there is a target for the KL
        self.skipped_in_a_row = 0  # updates
        prompts = config.micro_batch_size or config.batch_size
        g = max(config.at(step, config.beta).num_generations for step in (1, config.num_iterations))
        together = config.shard  # then no process can take smaller passes than the others
        self.sample_limit = PassLimit("sampling", config.batch_size * g, g, together)
        self.update_limit = PassLimit("the update", min(prompts, config.batch_size) * g, g, together)
        probes = [task.messages(problem.question) for problem in task.held_out("validation", 2)]
        prompts = lm.encode(probes)
        self.shared, self.repeated = can_share(lm.model, *prompts), can_repeat(lm.model, *prompts)

    def step(self, step: int) -> tuple[RolloutBatch, dict[str, Any]]:
        """One rollout and `num_inner_updates` updates on it; returns the rollout and the step's metrics."""
        c, clock, updates = self.config.at(step, self.beta), Stopwatch(), []
        self._set_learning_rate(c.learning_rate)
        weights = self._some_weights()
        with clock("total"):
            how = {"rewards": self.rewards, "shared": self.repeated, "limit": self.sample_limit}
            rollout = collect(self.lm, self.task, c, step, clock, **how)
            batch, fit = Batch.of_step(rollout.learned_tokens(c), rollout.advantages), self.update_limit.fit
            batch = batch.part(ranks.own(batch.num_completions))
            with clock("reference"), self._reference() as reference:
                if reference is not None:
                    ref_logprobs = fit(reference_logprobs, reference, batch.tokens, c, shared=self.shared)
                    batch = replace(batch, ref_logprobs=ref_logprobs)
            with clock("update"), self._saving_activations():
                for _ in range(c.num_inner_updates):
                    stats, logprobs = fit(inner_update, self.lm.model, self.optimizer, batch, c, shared=self.shared)
                    updates.append(stats)
                    if batch.old_logprobs is None:  # the policy was still the one that sampled
                        batch = replace(batch, old_logprobs=logprobs)
        for update in updates:
            self.skipped_in_a_row = 0 if update.applied else self.skipped_in_a_row + 1
        of_updates = summary(updates)
        if c.target_kl:
            self.beta = adapted_beta(c.beta, of_updates["kl"], c.target_kl)
        if c.refresh_reference_every and step % c.refresh_reference_every == 0:
            self.reference.load_state_dict(self.lm.model.state_dict())
        times = {f"time/{phase}": seconds for phase, seconds in clock.seconds.items()}
        settings = {"learning_rate": c.learning_rate, "beta": c.beta, "num_generations": c.num_generations}
        return rollout, {
            "step": step,
            **rollout.summary(),
            **of_updates,
            "sampler_gap": sampler_gap(rollout, batch),
            "weights_moved": self._moved(weights),
            **settings,
            **times,
        }

    def checkpoint(self, step: int, metrics: Mapping[str, Any], state: Mapping[str, Any]) -> Checkpoint:
        """All that the steps after this one depend on, with what the run adds to it.

        All processes have to ask for it, to put a sharded model together; only the first gets its tensors.
        """
        limits = {"sample": self.sample_limit.rows, "update": self.update_limit.rows}
        own = {"beta": self.beta, "skipped_in_a_row": self.skipped_in_a_row, "limits": limits}
        refreshed = self.reference is not None and self.config.refresh_reference_every
        return Checkpoint(
            step,
            for_the_first(trainable(self.lm.model)),
            for_the_first(optimizer_tensors(self.optimizer)),
            metrics,
            {**state, **own},
            for_the_first(dict(self.reference.named_parameters())) if refreshed else None,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put back what `checkpoint` took; the sizes of passes only if the same one was asked for."""
        see_that_it_fits(checkpoint, trainable(self.lm.model))
        _copy(checkpoint.policy, trainable(self.lm.model))
        if checkpoint.reference is not None:
            _copy(checkpoint.reference, dict(self.reference.named_parameters()))
        restore_optimizer(self.optimizer, checkpoint.optimizer, list(trainable(self.lm.model).values()))
        state = checkpoint.state
        self.skipped_in_a_row, self.beta = state["skipped_in_a_row"], state.get("beta", self.beta)
        if state["config"]["micro_batch_size"] == self.config.micro_batch_size and "limits" in state:
            self.sample_limit.rows, self.update_limit.rows = state["limits"]["sample"], state["limits"]["update"]

    def _moved(self, before: torch.Tensor) -> float:
        """The share of the weights of `_some_weights` that are not what they were."""
        moved = (before != self._some_weights()).float()
        counts = ranks.total(torch.stack([moved.sum(), torch.ones_like(moved).sum()])).tolist()
        return counts[0] / max(1.0, counts[1])

    def _some_weights(self) -> torch.Tensor:
        """A copy of some WATCHED of the trainable weights, spread evenly over them, always the same ones."""
        parameters = list(map(part, trainable(self.lm.model).values()))
        stride = max(1, sum(p.numel() for p in parameters) // WATCHED) | 1  # odd, so that it meets every column
        return torch.cat([p.detach().flatten()[::stride] for p in parameters])

    @contextmanager
    def _reference(self) -> Iterator[nn.Module | None]:
        """The model that the KL is measured against, or None where beta is 0."""
        if self.config.beta == 0:
            yield None
        elif self.reference is not None:
            yield self.reference
        else:
            with self.lm.model.disable_adapter():
                yield self.lm.model

    @contextmanager
    def _saving_activations(self) -> Iterator[None]:
        """Gradient checkpointing, if it is asked for: it works in train mode only, and sampling in eval mode only."""
        model = self.lm.model
        if not self.config.gradient_checkpointing:
            yield
            return
        with quiet():  # the name that replaces this one from 5.23 on is not in 5.21
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        try:
            yield
        finally:
            model.eval()

    def _set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def sampler_gap(rollout: RolloutBatch, batch: Batch) -> float:
    """How far a token's log-probability in the first update is from what the sampler had, at most, in nats.

    `batch` has this process's rows of the rollout, scored; 0 where there is no token.
    """
    mask, scored = batch.tokens.completion_mask, batch.old_logprobs
    sampled = rollout.sample_logprobs[ranks.own(batch.num_completions), : scored.shape[1]]
    return float(ranks.largest(torch.where(mask, (sampled - scored).abs(), 0.0).amax()))


@torch.no_grad()
def _copy(tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(like(tensors[name], parameter))
