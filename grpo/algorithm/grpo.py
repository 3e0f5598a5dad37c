"""One step of GRPO, as in the algorithm box of the paper (DeepSeekMath, arXiv:2402.03300, algorithm 1).

`GRPO.step` samples a group of completions for each prompt, scores them, compares each with its group, and takes a few
clipped updates against the policy that sampled, with a KL penalty against the frozen reference. `grpo/plain.py` takes
the same step without a shortcut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo.algorithm.reference import Reference, frozen_copy
from grpo.algorithm.rollout import Rollout, RolloutSampler
from grpo.algorithm.schedules import Schedule, StepSettings
from grpo.algorithm.update import Batch, Updater, UpdateStats
from grpo.config import TrainConfig
from grpo.generation.probe import probe
from grpo.generation.sampling import Generator
from grpo.model.language_model import LanguageModel
from grpo.model.lora import has_adapter, trainable
from grpo.runtime.checks import check_entries, is_count, is_number
from grpo.runtime.microbatch import AdaptiveMicrobatch
from grpo.runtime.ranks import ONE, Ranks
from grpo.runtime.sharding import own_machine_size, shard
from grpo.runtime.stopwatch import Stopwatch
from tasks.base import Task
from tasks.rewards.scoring import RewardFunction, rewards_of


@dataclass(frozen=True)
class StepOutcome:
    """What happened in a step."""

    step: int
    settings: StepSettings
    drawn: Rollout  # all groups that were sampled
    rollout: Rollout  # those that were trained on
    batch: Batch  # this rank's rows of the rollout, with the log-probabilities of policy and reference
    updates: Sequence[UpdateStats]


class GRPO:
    """A policy with its reference and optimizer, and all else that a step changes."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        lm: LanguageModel,
        rewards: Sequence[RewardFunction] = (),
        device: torch.device | None = None,
        ranks: Ranks = ONE,
    ) -> None:
        """Without `rewards`, use those of the settings. `device` is where a model goes that is to be sharded."""
        self.config, self.policy, self.ranks = config, lm.model, ranks
        self.clock = Stopwatch()  # of the phases of a step
        adapted = has_adapter(lm.model)  # then the reference is the policy without it
        frozen = frozen_copy(lm.model) if config.beta > 0 and not adapted else None
        if config.shard:
            machine_sizes = ranks.gather(own_machine_size(ranks.size))
            for model in filter(None, (lm.model, frozen)):
                shard(model, device or lm.device, machine_sizes)
        self.schedule = Schedule(config)
        g = self.schedule.largest_group
        prompts = min(config.micro_batch_size or config.batch_size, config.batch_size)
        # a sharded model makes every pass on all processes, so none can take smaller ones than the others
        self.sample_microbatch = AdaptiveMicrobatch("sampling", config.batch_size * g, g, config.shard)
        self.update_microbatch = AdaptiveMicrobatch("the update", prompts * g, g, config.shard)
        self.scorer, self.decoder = probe(lm, task, config.cuda_graphs, ranks)
        self.sampler = RolloutSampler(
            config,
            lm,
            task,
            rewards or rewards_of(config, task),
            Generator(lm.model, self.decoder),
            self.sample_microbatch,
            self.clock,
            ranks,
        )
        self.reference = Reference(lm.model, frozen, config, self.scorer, self.update_microbatch, self.clock)
        self.update = Updater(lm.model, config, self.scorer, self.update_microbatch, self.clock, ranks)

    def begin_here(self) -> None:
        """Take the policy as it is for the start: it becomes the reference, and its optimizer is a new one."""
        if self.reference.frozen is not None:
            self.reference.sync()
        self.update.forget()

    def step(self, step: int) -> StepOutcome:
        """Take step number `step`, from 1."""
        settings = self.schedule.at(step)
        drawn, rollout = self.sampler.sample(step, settings.num_generations)  # o_i ~ π_old, r_i, A_i
        batch = Batch.from_rollout(rollout, self.config, self.ranks)
        batch = replace(batch, ref_logprobs=self.reference.logprobs(batch.tokens))  # log π_ref
        updates = []
        for _ in range(self.config.num_inner_updates):  # μ
            stats, batch = self.update(batch, settings)  # the first one fills in log π_old
            updates.append(stats)
        self.schedule.adapt(updates[0].kl)
        self.reference.sync_if_due(step)  # π_ref ← π
        return StepOutcome(step, settings, drawn, rollout, batch, updates)

    def state_dict(self) -> dict[str, Any]:
        """Return what later steps depend on: named tensors, those of a reference only if it changes, and numbers.

        All ranks must call this, to put a sharded model together; only rank 0 gets its tensors.
        """
        synced = self.reference.frozen is not None and (self.config.ref_model_sync_steps or self.config.sft_steps)
        return {
            **self.update.state_dict(),
            "reference": self.ranks.collect(self.reference.state_dict()) if synced else None,
            "beta": self.schedule.beta,
            "skipped_in_a_row": self.update.skipped_in_a_row,
            "limits": {"sample": self.sample_microbatch.rows, "update": self.update_microbatch.rows},
        }

    def load_state_dict(self, state: Mapping[str, Any], keep_limits: bool) -> None:
        """Restore what `state_dict` returned; the limits of passes only with `keep_limits`.

        Raises ValueError if it is not of this model.
        """
        limits = state.get("limits")  # the first version had none
        check_entries(
            {
                "beta": is_number(state.get("beta", 0.0)),
                "skipped_in_a_row": is_count(state.get("skipped_in_a_row")),
                "limits": limits is None
                or (isinstance(limits, dict) and all(is_count(limits.get(n)) for n in ("sample", "update"))),
            }
        )
        check_tensor_shapes(state, trainable(self.policy))
        if state["reference"] is not None:
            self.reference.load_state_dict(state["reference"])
        self.update.load_state_dict(state["policy"], state["optimizer"])
        self.update.skipped_in_a_row = state["skipped_in_a_row"]
        self.schedule.beta = state.get("beta", self.schedule.beta)
        if keep_limits and limits is not None:
            self.sample_microbatch.rows = limits["sample"]
            self.update_microbatch.rows = limits["update"]


def check_tensor_shapes(state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the tensors of a state are not of a model with these parameters."""
    expected, types = {name: p.shape for name, p in parameters.items()}, {p.dtype for p in parameters.values()}
    of_reference = {*types, torch.bfloat16}  # it is held in the precision of passes
    for kind, tensors, allowed in (
        ("weights", state["policy"], types),
        ("reference", state["reference"], of_reference),
    ):
        if tensors is None:
            continue
        found = {tensor.dtype for tensor in tensors.values()}  # one type
        if (
            len(found) > 1
            or not found <= allowed
            or {name: tensor.shape for name, tensor in tensors.items()} != expected
        ):
            raise ValueError(f"its {kind} cannot be of this model")
    shapes = [p.shape for p in parameters.values()]
    found = {key: tensor.shape for key, tensor in state["optimizer"].items()}
    touched = [i for i in range(len(shapes)) if f"{i}.step" in found]  # a parameter without a gradient has no moments
    moments = {f"{i}.{name}": shapes[i] for i in touched for name in ("exp_avg", "exp_avg_sq")}
    if found != moments | {f"{i}.step": torch.Size() for i in touched}:
        raise ValueError("its optimizer state cannot be of this model")
