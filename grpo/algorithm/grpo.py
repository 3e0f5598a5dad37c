"""One step of GRPO, as in the algorithm box of the paper (DeepSeekMath, arXiv:2402.03300, algorithm 1).

`GRPO.step` samples a group of completions for each prompt, scores them, and compares each with its group. Then it
takes a few updates, with a clipped ratio to the policy that sampled and a KL penalty against the frozen reference.
`grpo/plain.py` takes the same step without shortcuts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo.algorithm.reference import Reference, frozen_copy
from grpo.algorithm.rollout import Rollout, RolloutSampler
from grpo.algorithm.schedules import Schedule, StepSettings
from grpo.algorithm.update import Batch, Update, Updater
from grpo.config import TrainConfig
from grpo.generation.probe import probe
from grpo.generation.sampling import Generator
from grpo.model.language_model import LanguageModel
from grpo.model.lora import has_adapter, trainable
from grpo.runtime.checks import check_entries, is_count, is_number
from grpo.runtime.microbatch import AdaptiveMicrobatch
from grpo.runtime.ranks import ONE, Ranks
from grpo.runtime.sharding import shard
from grpo.runtime.stopwatch import Stopwatch
from tasks.base import Task
from tasks.rewards.scoring import RewardFunction, rewards_of


@dataclass(frozen=True)
class StepOutcome:
    """The result of a step: its settings, its rollouts, its batch, and its updates."""

    step: int
    settings: StepSettings
    drawn: Rollout  # all groups that were sampled, including tied groups that were replaced
    rollout: Rollout  # the groups that were trained on, with their advantages
    batch: Batch  # this rank's rows of `rollout`, with the log-probabilities of policy and reference
    updates: Sequence[Update]  # one for each inner update


class GRPO:
    """A policy with its reference, its optimizer, and everything else that a step changes."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        lm: LanguageModel,
        rewards: Sequence[RewardFunction] = (),
        device: torch.device | None = None,
        ranks: Ranks = ONE,
    ) -> None:
        """Make the reference, the sampler and the optimizer.

        If `rewards` is empty, `config` defines the rewards. The weights of a sharded model are moved to `device`.
        """
        self.config, self.policy, self.ranks = config, lm.model, ranks
        self.clock = Stopwatch(device or lm.model.device)  # seconds per phase of a step
        needs_copy = config.beta > 0 and not has_adapter(lm.model)  # with an adapter, the base model is the reference
        frozen = frozen_copy(lm.model) if needs_copy else None
        if config.shard:
            for model in filter(None, (lm.model, frozen)):
                shard(model, device or lm.model.device, ranks)
        self.schedule = Schedule(config)
        g = max(self.schedule.at(step).num_generations for step in (1, config.num_iterations))  # the largest group
        prompts = min(config.micro_batch_size or config.batch_size, config.batch_size)
        # The processes of a sharded model run every pass together, so a single process cannot halve its passes.
        self.sample_microbatch = AdaptiveMicrobatch("sampling", config.batch_size * g, g, config.shard)
        self.update_microbatch = AdaptiveMicrobatch("the update", prompts * g, g, config.shard)
        self.scorer, self.decoder = probe(lm, task, config.cuda_graphs, ranks)
        self.scorer.check_gradient(lm.model)
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
        self.update = Updater(lm.model, config, self.scorer, self.update_microbatch, ranks)

    def begin_here(self) -> None:
        """Begin GRPO from the policy as it is now: copy it to the reference, and reset the optimizer."""
        if self.reference.frozen is not None:
            self.reference.sync()
        self.update.reset()

    def step(self, step: int) -> StepOutcome:
        """Take step number `step`, counted from 1; return its settings, rollouts, batch and updates."""
        settings = self.schedule.at(step)
        drawn, rollout = self.sampler.sample(step, settings.num_generations)  # o_i ~ π_old, r_i, A_i
        batch = Batch.from_rollout(rollout, self.config, self.ranks, self.policy.device)
        batch = replace(batch, ref_logprobs=self.reference.logprobs(batch.tokens))  # log π_ref
        updates = []
        with self.clock("update"):
            for _ in range(self.config.num_inner_updates):  # μ
                update, batch = self.update(batch, settings)  # the first update fills in log π_old
                updates.append(update)
        if self.config.target_kl:
            self.schedule.adapt(batch.kl(self.ranks))
        self.reference.sync_if_due(step)  # π_ref ← π
        return StepOutcome(step, settings, drawn, rollout, batch, updates)

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors and numbers that later steps depend on. The reference is included only if it can change.

        All ranks must call this, because each sends its shards of the weights. Only rank 0 gets tensors.
        """
        changes = self.reference.frozen is not None and (self.config.ref_model_sync_steps or self.config.sft_steps)
        return {
            **self.update.state_dict(),
            "reference": self.ranks.collect(self.reference.frozen.named_parameters()) if changes else None,
            "beta": self.schedule.beta,
            "skipped_in_a_row": self.update.skipped_in_a_row,
            "limits": {"sample": self.sample_microbatch.rows, "update": self.update_microbatch.rows},
        }

    def load_state_dict(self, state: Mapping[str, Any], keep_limits: bool) -> None:
        """Restore what `state_dict` returned. With `keep_limits`, restore the numbers of rows in a pass too.

        Raises ValueError if the state does not fit this model.
        """
        limits = state.get("limits")  # None in checkpoints of the first version
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
    """Raise ValueError if the tensors of a state do not fit a model with these parameters."""
    shapes = {name: p.shape for name, p in parameters.items()}
    weight_dtypes = {p.dtype for p in parameters.values()}
    reference_dtypes = {*weight_dtypes, torch.bfloat16}  # a reference may be held in bfloat16
    _check_weights("weights", state["policy"], shapes, weight_dtypes)
    if state["reference"] is not None:
        _check_weights("reference", state["reference"], shapes, reference_dtypes)
    optimizer = {key: tensor.shape for key, tensor in state["optimizer"].items()}
    expected = {}
    for index, shape in enumerate(shapes.values()):
        if f"{index}.step" in optimizer:  # parameters that had no gradient have no moments
            expected |= {f"{index}.step": torch.Size(), f"{index}.exp_avg": shape, f"{index}.exp_avg_sq": shape}
    if optimizer != expected:
        raise ValueError("its optimizer state cannot belong to this model")


def _check_weights(
    kind: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], dtypes: set[torch.dtype]
) -> None:
    """Raise ValueError unless `tensors` have these shapes, by name, and share a data type that is one of `dtypes`."""
    present = {tensor.dtype for tensor in tensors.values()}
    if len(present) > 1 or not present <= dtypes or {name: x.shape for name, x in tensors.items()} != shapes:
        raise ValueError(f"its {kind} cannot belong to this model")
