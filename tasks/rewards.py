"""The named reward functions. Each is total and returns a number from 0 to 1; a task weighs them.

To try another reward, write a function of (answer, gold) here, name it in REWARDS, and give it a weight
in a task: its mean then appears in the metrics as `reward/<name>`.
"""

from collections.abc import Callable, Mapping

from tasks.base import Reward

CLOSE_ENOUGH = 1  # "close" pays for a number that is off by at most this


def format_reward(answer: int | None, gold: int) -> float:
    """1 for a well-formed completion, whatever number it gives."""
    return float(answer is not None)


def close_reward(answer: int | None, gold: int) -> float:
    """1 for a number within ±1 of the right one, the right one included."""
    return float(answer is not None and abs(answer - gold) <= CLOSE_ENOUGH)


def exact_reward(answer: int | None, gold: int) -> float:
    """1 for the right number."""
    return float(answer == gold)


REWARDS: dict[str, Callable[[int | None, int], float]] = {
    "format": format_reward,
    "close": close_reward,
    "exact": exact_reward,
}


def shaped_reward(answer: int | None, gold: int, weights: Mapping[str, float]) -> Reward:
    """The weighted sum of the named rewards for a parsed answer (None: not well-formed)."""
    parts = {name: weight * REWARDS[name](answer, gold) for name, weight in weights.items()}
    return Reward(sum(parts.values()), parts, correct=answer == gold, well_formed=answer is not None)
