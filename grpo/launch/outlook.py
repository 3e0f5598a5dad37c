"""Estimate, from one rollout of the starting model, how much signal GRPO would have and how long a step takes.

If hardly any group has a learning signal, `try_settings` looks for settings under which more groups have one.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from grpo.algorithm.grpo import GRPO
from grpo.algorithm.reference import logprobs_in_passes
from grpo.algorithm.rollout import Rollout
from grpo.config import TrainConfig
from grpo.launch.seeds import as_arguments
from grpo.model.chat_template import task_for
from grpo.model.language_model import LanguageModel, fitting_task, longest_example
from grpo.model_card import resolve
from grpo.setting import parse_template_args
from tasks.base import Task, asked, task_of
from tasks.common.prompts import THINK, WORDINGS
from tasks.registry import make_task

GROUPS = 8  # The rollout has this many groups, or as many as a step if these are fewer, or with --shard.
FORWARDS_PER_BACKWARD = 2  # A backward pass takes about as long as two forward passes.
MIN_TEACHING = 0.1  # Below this share of groups with mixed rewards, a run stops before its first step.
MAX_TRYING_SECONDS = 40.0  # A trial is left out if it would probably end more than 40 s after the first one began.
TRIED_SHOTS = (2, 4)
TRIED_TOKENS = (2, 4)  # multiples of --max-new-tokens
THINKING_OFF = "enable_thinking=false"  # The templates of Qwen3 and SmolLM3, for example, have this variable.
MIN_THINKING = 0.5  # THINKING_OFF is tried if at least this share of completions begins with <think>.
MIN_TRUNCATED = 0.1  # Larger token limits are tried if at least this share of the completions was cut off.


class NothingToLearn(Exception):
    """Hardly any group of the starting model has mixed rewards, so the run ends before its first step."""


# A pair: the settings that differ from the run's ({} for the run's own settings), and the shares measured with them.
Trial = tuple[Mapping[str, Any], Mapping[str, Any]]


def outlook(grpo: GRPO, config: TrainConfig) -> tuple[dict[str, Any], float]:
    """Sample a rollout; return its shares by name (see `_shares`), and the expected seconds of a step.

    The problems belong to step 0, which no run trains on, and the training does not depend on the outlook. `teaching`
    is the share of groups with mixed rewards. A step is expected to take the time of sampling, one forward pass for
    the reference, and three for each update, because a backward pass takes about as long as two forward passes.
    """
    groups = config.batch_size if config.shard else min(GROUPS, config.batch_size)
    grpo.clock.seconds = {}
    rollout = _look(grpo, config, grpo.sampler.task, groups)
    passes = (config.beta > 0) + config.num_inner_updates * (1 + FORWARDS_PER_BACKWARD)
    seconds = grpo.clock.seconds["sample"] + passes * _forward_seconds(grpo, config, rollout)
    return _shares(rollout, grpo.sampler.task), seconds * config.batch_size / groups


def is_hopeless(shares: Mapping[str, Any]) -> bool:
    """Return whether hardly any group has mixed rewards."""
    return shares["teaching"] < MIN_TEACHING


def look_closer(grpo: GRPO, look: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `look` if it has GROUPS groups or the model is sharded; else the shares of GROUPS new groups."""
    if look["groups"] >= GROUPS or grpo.config.shard:
        return look
    return _shares(_look(grpo, grpo.config, grpo.sampler.task, GROUPS), grpo.sampler.task)


def try_settings(grpo: GRPO, look: Mapping[str, Any]) -> list[Trial]:
    """Sample the problems of `look` under other settings, for about MAX_TRYING_SECONDS; return the trials.

    The first trial has the run's own settings, and the shares in `look`. Settings that are impossible for the task or
    the model are left out.
    """
    config, lm, start = grpo.config, grpo.sampler.lm, time.monotonic()
    seconds_per_token = grpo.clock.seconds["sample"] / config.max_new_tokens
    trials: list[Trial] = [({}, look)]
    seen = [(asked(grpo.sampler.task), config.max_new_tokens, config.chat_template_arg)]
    for changes in _changes(config, look, lm):
        try:
            changed = replace(config, **changes)
            asking = replace(lm, template_args=parse_template_args(changed.chat_template_arg))
            task = fitting_task(asking, task_for(asking, make_task(changed)), changed)
            if (needed := longest_example(asking, task)) > changed.max_new_tokens:
                # A completion like the examples would be cut off. The limit becomes the next power of two.
                limit = 2 ** (needed - 1).bit_length()
                changes = {**changes, "max_new_tokens": limit}
                changed = replace(changed, max_new_tokens=limit)
                task = fitting_task(asking, task, changed)
        except ValueError:  # too few problems for the examples, or no room for a longer prompt or completion
            continue
        expected_end = time.monotonic() - start + seconds_per_token * changed.max_new_tokens
        key = (asked(task), changed.max_new_tokens, changed.chat_template_arg)
        if key in seen or grpo.ranks.any(expected_end > MAX_TRYING_SECONDS):
            continue
        seen.append(key)
        trials.append((changes, _shares(_look(grpo, changed, task, look["groups"], asking), task)))
    return trials


def way_out(config: TrainConfig, trials: Sequence[Trial]) -> list[str]:
    """Return the command-line options of the trial with the most mixed groups; [] if no trial has enough of them."""
    changes, shares = max(trials, key=lambda trial: trial[1]["teaching"])  # if several are equal, the first
    return [] if is_hopeless(shares) else typed(replace(config, **changes))


def typed(config: TrainConfig) -> list[str]:
    """Return the options of `train_grpo.py` that give these settings, without settings that the model implies."""
    given = {name: getattr(config, name) for name in ("model", "task", "prompt_style")}
    defaults = resolve(given)
    given |= {name: value for name, value in vars(config).items() if value != getattr(defaults, name)}
    for name in ("task", "prompt_style", "model"):
        fewer = {other: value for other, value in given.items() if other != name}
        try:
            if resolve(fewer) == config:
                given = fewer
        except ValueError:  # the model was trained on a task in a file, so --task is needed
            continue
    return [word for argument in as_arguments(given) for word in argument.split("=", 1)]


def _changes(config: TrainConfig, look: Mapping[str, Any], lm: LanguageModel) -> Iterator[dict[str, Any]]:
    """Yield each alternative to try, as a dict of the settings that it changes."""
    has_switch = THINKING_OFF.partition("=")[0] in lm.tokenizer.get_chat_template()
    if has_switch and look["thinking"] >= MIN_THINKING and config.prompt_style != "think":
        yield {"chat_template_arg": (*config.chat_template_arg, THINKING_OFF)}
    for wording in WORDINGS:
        yield {"prompt_wording": wording, "system_prompt": ""}
    for shots in TRIED_SHOTS:
        yield {"shots": shots}
    if look["truncated"] >= MIN_TRUNCATED:
        for factor in TRIED_TOKENS:
            yield {"max_new_tokens": factor * config.max_new_tokens}


def _look(grpo: GRPO, config: TrainConfig, task: Task, groups: int, lm: LanguageModel | None = None) -> Rollout:
    """Return a rollout of `groups` groups with the settings of `config`, on problems that no run trains on."""
    config = replace(config, batch_size=groups, resample_tied=0)
    sampler = replace(grpo.sampler, config=config, task=task, lm=lm or grpo.sampler.lm)
    rollout, _ = sampler.sample(0, grpo.schedule.at(1).num_generations)
    return rollout


def _shares(rollout: Rollout, task: Task) -> dict[str, Any]:
    """Return, by name, the number and size of a rollout's groups, and shares of the groups and completions."""
    correct = rollout.correct
    texts = [task_of(task, rollout.problems[0]).opening + text for text in rollout.completion_texts]
    return {
        "groups": len(rollout.problems),
        "num_generations": rollout.num_generations,
        "teaching": 1 - float(rollout.tied.float().mean()),
        "all_right": float(correct.all(-1).float().mean()),
        "pass_at_1": float(correct.float().mean()),
        "pass_at_g": float(correct.any(-1).float().mean()),
        "well_formed": sum(reward.well_formed for reward in rollout.rewards) / len(rollout.rewards),
        "truncated": float(rollout.truncated.float().mean()),
        "thinking": sum(text.lstrip().startswith(THINK) for text in texts) / len(texts),
    }


def _forward_seconds(grpo: GRPO, config: TrainConfig, rollout: Rollout) -> float:
    """Return the seconds of a forward pass over a rollout, after a pass over the first group as warm-up."""
    first_group = rollout.tokens.slice_rows(slice(0, rollout.num_generations))
    for phase, host_tokens in (("warm-up", first_group), ("forward", rollout.tokens)):
        tokens = host_tokens.to(grpo.policy.device)
        with grpo.clock(phase):
            grpo.update_microbatch.run(
                lambda rows, tokens=tokens: logprobs_in_passes(
                    grpo.scorer, grpo.policy, tokens, config.temperature, rows
                )
            )
    return grpo.clock.seconds["forward"]
