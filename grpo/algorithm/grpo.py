"""One step of GRPO, as in the algorithm box of the paper (DeepSeekMath, arXiv:2402.03300, algorithm 1).

`GRPO.step` samples a group of completions for each prompt, scores them, compares each with its group, and takes a few
clipped updates against the policy that sampled, with a KL penalty against the frozen reference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grpo.algorithm.reference import Reference, frozen_copy
from grpo.algorithm.rollout import Rollout, RolloutSampler
from grpo.algorithm.schedules import adapted_beta, scheduled
from grpo.algorithm.update import Batch, Updater, UpdateStats, moved_fraction, watched_weights
from grpo.config import TrainConfig
from grpo.generation.capabilities import ModelCapabilities
from grpo.generation.sampling import Generator
from grpo.model.language_model import LanguageModel
from grpo.model.lora import has_adapter, trainable
from grpo.record.step_metrics import StepResult, step_metrics
from grpo.runtime import distributed
from grpo.runtime.checks import check_entries, is_count, is_number
from grpo.runtime.distributed import gather_to_rank0
from grpo.runtime.microbatch import AdaptiveMicrobatch
from grpo.runtime.stopwatch import Stopwatch
from tasks.base import Task
from tasks.rewards.scoring import RewardFunction, rewards_of


class GRPO:
    """A policy with its reference and optimizer, and all else that a step changes."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        lm: LanguageModel,
        rewards: Sequence[RewardFunction] = (),
        device: torch.device | None = None,
    ) -> None:
        """Without `rewards`, use those of the settings. `device` is where a model goes that is to be sharded."""
        self.config, self.policy = config, lm.model
        adapted = has_adapter(lm.model)  # then the reference is the policy without it
        frozen = frozen_copy(lm.model) if config.beta > 0 and not adapted else None
        if config.shard:
            for model in filter(None, (lm.model, frozen)):
                distributed.shard(model, device or lm.device)
        g = max(scheduled(config, step, config.beta).num_generations for step in (1, config.num_iterations))
        prompts = min(config.micro_batch_size or config.batch_size, config.batch_size)
        # a sharded model makes every pass on all processes, so none can take smaller ones than the others
        self.sample_microbatch = AdaptiveMicrobatch("sampling", config.batch_size * g, g, config.shard)
        self.update_microbatch = AdaptiveMicrobatch("the update", prompts * g, g, config.shard)
        self.capabilities = ModelCapabilities.probe(lm, task, config.cuda_graphs)
        packed = self.capabilities.supports_packing
        self.sampler = RolloutSampler(
            lm,
            task,
            rewards or rewards_of(config, task),
            Generator(lm.model, self.capabilities),
            self.sample_microbatch,
            task.training_problem,
        )
        self.reference = Reference(lm.model, frozen, packed, self.update_microbatch)
        self.update = Updater(lm.model, config, packed, self.update_microbatch)
        self.beta = config.beta  # adapted if there is a target for the KL
        self.updating = False  # from the first update of a step on, until the caller has counted it

    def begin_here(self) -> None:
        """Take the policy as it is for the start: it becomes the reference, and its optimizer is a new one."""
        if self.reference.frozen is not None:
            self.reference.sync()
        self.update.forget()

    def step(self, step: int) -> tuple[Rollout, dict[str, Any]]:
        """Take step number `step`, from 1; return its rollout and its metrics."""
        c, clock, updates = scheduled(self.config, step, self.beta), Stopwatch(), []
        weights = watched_weights(self.policy)
        self.update.optimizer.zero_grad(set_to_none=True)  # the memory of the last gradient serves the rollout
        with clock("total"):
            rollout = self.sampler.rollout(step, c, clock)  # o_i ~ π_old, r_i, A_i
            batch = Batch.from_rollout(rollout, c)
            with clock("reference"):
                batch = replace(batch, ref_logprobs=self.reference.logprobs(batch.tokens, c))
            self.updating = True
            with clock("update"):
                for _ in range(c.num_inner_updates):  # μ
                    stats, batch = self.update(batch, c)  # the first one fills old_logprobs
                    updates.append(stats)
        self._after_step(step, updates, c)
        moved = moved_fraction(weights, watched_weights(self.policy))
        result = StepResult(step, c, rollout, updates, sampler_gap(rollout, batch), moved, clock.seconds)
        return rollout, step_metrics(result)

    def _after_step(self, step: int, updates: Sequence[UpdateStats], config: TrainConfig) -> None:
        """Adapt beta to the KL, and renew the reference, if the settings say so."""
        if config.target_kl:
            self.beta = adapted_beta(config.beta, updates[0].kl, config.target_kl)
        if config.ref_model_sync_steps and step % config.ref_model_sync_steps == 0:
            self.reference.sync()

    def state_dict(self) -> dict[str, Any]:
        """Return what later steps depend on: named tensors, those of a reference only if it changes, and numbers.

        All ranks must call this, to put a sharded model together; only rank 0 gets its tensors.
        """
        synced = self.reference.frozen is not None and (self.config.ref_model_sync_steps or self.config.sft_steps)
        return {
            **self.update.state_dict(),
            "reference": gather_to_rank0(self.reference.state_dict()) if synced else None,
            "beta": self.beta,
            "skipped_in_a_row": self.update.skipped_in_a_row,
            "limits": {"sample": self.sample_microbatch.max_rows, "update": self.update_microbatch.max_rows},
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
        self.update.skipped_in_a_row, self.beta = state["skipped_in_a_row"], state.get("beta", self.beta)
        if keep_limits and limits is not None:
            self.sample_microbatch.max_rows, self.update_microbatch.max_rows = limits["sample"], limits["update"]


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


def sampler_gap(rollout: Rollout, batch: Batch) -> float:
    """Return the largest difference between a token's log-probability when sampled and in the first update, nats.

    `batch` has this rank's rows of the rollout, scored; 0 if there is no token.
    """
    mask, scored = batch.tokens.completion_mask, batch.old_logprobs
    local = distributed.local_slice(len(rollout.sample_logprobs))
    sampled = rollout.sample_logprobs[local, : scored.shape[1]]
    return float(distributed.all_reduce_max(torch.where(mask, (sampled - scored).abs(), 0.0).amax()))
