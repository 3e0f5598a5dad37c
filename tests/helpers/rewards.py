"""The reward of a completion."""

from contextlib import nullcontext

from tasks.rewards import parse_rewards, score


def reward_of(task, problem, completion):
    """Return the reward of one completion, by the task's own weights."""
    rewards = parse_rewards((), task.default_rewards)
    [reward] = score(rewards, [task.grade(problem, completion)], {}, lambda name: nullcontext())
    return reward
