"""A look before the first step: what GRPO will have to work with, from one rollout of the starting model."""

import time
from dataclasses import replace
from typing import Any

from grpo.algorithm.grpo import GRPO
from grpo.algorithm.reference import logprobs_in_passes
from grpo.algorithm.rollout import Rollout
from grpo.config import TrainConfig

GROUPS = 8  # that are looked at, or as many as a step has: it costs no more than the sampling of a step
BACKWARD = 2  # passes forward that a pass backward takes as long as


def outlook(grpo: GRPO, config: TrainConfig) -> tuple[dict[str, Any], float]:
    """Return shares of a rollout on training problems of step 0, which no step takes, and expected seconds a step.

    `teaching` is the share of groups that are not tied. The seconds of a step are those of its sampling, and
    those of a pass forward for each pass of reference and updates. Nothing that follows depends on it.
    """
    num_generations = grpo.schedule.at(1).num_generations
    groups = config.batch_size if config.shard else min(GROUPS, config.batch_size)
    sampler = replace(grpo.sampler, config=replace(config, batch_size=groups, resample_tied=0))
    grpo.clock.reset()
    rollout, _ = sampler.sample(0, num_generations)
    passes = (config.beta > 0) + config.num_inner_updates * (1 + BACKWARD)
    seconds = grpo.clock.seconds["sample"] + passes * _seconds_of_a_pass(grpo, config, rollout)
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


def _seconds_of_a_pass(grpo: GRPO, config: TrainConfig, rollout: Rollout) -> float:
    """Return the seconds of a pass forward over a rollout; the first group goes before it, to warm up."""
    first_group = rollout.tokens.slice_rows(slice(0, rollout.num_generations))
    seconds = 0.0
    for tokens in (first_group, rollout.tokens):
        start = time.perf_counter()
        grpo.update_microbatch.run(
            lambda rows, tokens=tokens: logprobs_in_passes(grpo.scorer, grpo.policy, tokens, config.temperature, rows)
        )
        seconds = time.perf_counter() - start
    return seconds
