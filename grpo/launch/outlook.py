"""Estimate from one rollout of the starting model how many groups have mixed rewards, and the time of a step."""

import time
from dataclasses import replace
from typing import Any

from grpo.algorithm.grpo import GRPO
from grpo.algorithm.reference import logprobs_in_passes
from grpo.algorithm.rollout import Rollout
from grpo.config import TrainConfig

GROUPS = 8  # The rollout has this many groups, but never more groups than a step.
FORWARDS_PER_BACKWARD = 2  # A backward pass takes about as long as two forward passes.


def outlook(grpo: GRPO, config: TrainConfig) -> tuple[dict[str, Any], float]:
    """Return shares of a rollout by name, and the expected seconds of a step.

    The problems belong to step 0, which no run trains on, and the training does not depend on the outlook. `teaching`
    is the share of groups with mixed rewards. The seconds are those of sampling, plus those of a forward pass times
    the number of passes that the reference and the updates of a step take.
    """
    num_generations = grpo.schedule.at(1).num_generations
    groups = config.batch_size if config.shard else min(GROUPS, config.batch_size)
    sampler = replace(grpo.sampler, config=replace(config, batch_size=groups, resample_tied=0))
    grpo.clock.seconds = {}
    rollout, _ = sampler.sample(0, num_generations)
    passes = (config.beta > 0) + config.num_inner_updates * (1 + FORWARDS_PER_BACKWARD)
    seconds = grpo.clock.seconds["sample"] + passes * _forward_seconds(grpo, config, rollout)
    correct = rollout.correct
    shares = {
        "groups": groups,
        "num_generations": num_generations,
        "teaching": 1 - float(rollout.tied.float().mean()),
        "all_right": float(correct.all(-1).float().mean()),
        "pass_at_1": float(correct.float().mean()),
        "pass_at_g": float(correct.any(-1).float().mean()),
        "well_formed": sum(reward.well_formed for reward in rollout.rewards) / len(rollout.rewards),
        "truncated": float(rollout.truncated.float().mean()),
    }
    return shares, seconds * config.batch_size / groups


def _forward_seconds(grpo: GRPO, config: TrainConfig, rollout: Rollout) -> float:
    """Return the seconds of a forward pass over a rollout, after a pass over the first group as warm-up."""
    first_group = rollout.tokens.slice_rows(slice(0, rollout.num_generations))
    seconds = 0.0
    for tokens in (first_group, rollout.tokens):
        start = time.perf_counter()
        grpo.update_microbatch.run(
            lambda rows, tokens=tokens: logprobs_in_passes(grpo.scorer, grpo.policy, tokens, config.temperature, rows)
        )
        seconds = time.perf_counter() - start
    return seconds
