"""The rewards of a run, from what --reward says, and the score of a batch."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from tasks.base import Attempt, Reward, Task, one_line, shown
from tasks.common.prompts import ideal_completion
from tasks.common.user_file import UserFile, contained, load_file, place_of
from tasks.rewards.functions import REWARDS

OVERLONG = "overlong"  # the name of the part that --overlong-buffer adds
TRIED = 4  # problems, with three completions each
MADE_UP = "It is 1, I think."  # what a model may say that was never told the form
LARGEST = 1e12  # the largest weighted reward: float32 and the variance of a group overflow far above it

Columns = Mapping[str, Sequence[Any]]  # one value for each completion, by name
Values = Sequence[float | None]


class RewardSettings(Protocol):
    """The settings that the rewards of a run are made from; `grpo.config.TrainConfig` has them."""

    reward: Sequence[str]
    overlong_buffer: int
    max_new_tokens: int


@dataclass(frozen=True)
class RewardFunction:
    """A reward with its weight; `function` scores a batch, `path` and `sha256` are those of a user's file."""

    name: str
    weight: float
    function: Callable[[Sequence[Attempt], Columns], Values]
    path: str = ""
    sha256: str = ""


def parse_rewards(specs: Sequence[str], defaults: Mapping[str, float]) -> list[RewardFunction]:
    """Return the rewards of `NAME=WEIGHT` and `FILE.py:FUNCTION=WEIGHT`; the defaults if there are none.

    Raises ValueError, in one line, if one is malformed, unknown, missing or given twice.
    """
    rewards: dict[str, RewardFunction] = {}
    files: dict[str, UserFile] = {}  # by path, so that each is run once
    for spec in specs or [f"{name}={weight}" for name, weight in defaults.items()]:
        what, _, weight_text = spec.rpartition("=")
        try:
            weight = float(weight_text)
        except ValueError:
            weight = math.nan
        if not what or not abs(weight) <= LARGEST:
            raise ValueError(
                f"--reward {spec!r}: write NAME=WEIGHT or FILE.py:FUNCTION=WEIGHT, with a number as weight"
            )
        path, colon, name = what.rpartition(":")
        if name in rewards:
            raise ValueError(f"--reward {name!r} is given twice; both means would have this name in the metrics")
        if colon:
            files[path] = files.get(path) or load_file(path)
            function = partial(_of_user, files[path].function(name))
            rewards[name] = RewardFunction(name, weight, function, path, files[path].sha256)
        elif name in REWARDS:
            rewards[name] = RewardFunction(name, weight, partial(_of_each, REWARDS[name]))
        else:
            known = ", ".join(REWARDS)
            raise ValueError(f"there is no --reward {name!r}; there are {known}, and FILE.py:FUNCTION for your own")
    return list(rewards.values())


def overlong(limit: int, buffer: int, attempts: Sequence[Attempt], columns: Columns) -> Values:
    """Return 0 for completions of at most `limit` − `buffer` tokens, falling to −1 at `limit` in a straight line.

    The soft overlong punishment of DAPO, arXiv:2503.14476, equation 13.
    """
    over = (len(ids) - (limit - buffer) for ids in columns["completion_ids"])
    return [-min(max(0, tokens), buffer) / buffer for tokens in over]


def rewards_of(settings: RewardSettings, task: Task) -> list[RewardFunction]:
    """Return the rewards of a run. Raises ValueError, in one line, if a specification is wrong."""
    if task.parts and not settings.reward:
        rewards = of_mixture({name: parse_rewards((), part.default_rewards) for name, part in task.parts.items()})
    else:
        rewards = parse_rewards(settings.reward, task.default_rewards)
    if settings.overlong_buffer:
        penalty = partial(overlong, settings.max_new_tokens, settings.overlong_buffer)
        rewards.append(RewardFunction(OVERLONG, 1.0, penalty))
    if not any(reward.weight for reward in rewards):
        names = ", ".join(reward.name for reward in rewards)
        raise ValueError(f"--reward: the weights are all 0 ({names}), so nothing would be learned")
    return rewards


def of_mixture(by_task: Mapping[str, Sequence[RewardFunction]]) -> list[RewardFunction]:
    """Return the rewards of a mixture, from those of each task; one does not apply to problems of other tasks.

    A reward that several tasks have is one, unless they differ in its weight or its function: then it is one for
    each, NAME/TASK.
    """
    meant: dict[str, dict[tuple[float, str], list[str]]] = {}  # by name: the tasks of each weight and file
    for task, rewards in by_task.items():
        for reward in rewards:
            meant.setdefault(reward.name, {}).setdefault((reward.weight, reward.path), []).append(task)
    found: dict[str, RewardFunction] = {}
    for task, rewards in by_task.items():
        for reward in rewards:
            tasks = meant[reward.name][reward.weight, reward.path]
            name = reward.name if len(meant[reward.name]) == 1 else f"{reward.name}/{task}"
            one = tasks if name == reward.name else [task]
            found.setdefault(name, replace(reward, name=name, function=partial(_of_tasks, reward, frozenset(one))))
    return list(found.values())


def _of_tasks(reward: RewardFunction, tasks: frozenset[str], attempts: Sequence[Attempt], columns: Columns) -> Values:
    """Call a reward for the problems of some tasks only."""
    rows = [row for row, attempt in enumerate(attempts) if attempt.problem.category in tasks]
    values: list[float | None] = [None] * len(attempts)
    if rows:
        own = {name: [of_row[row] for row in rows] for name, of_row in columns.items()}
        found = list(reward.function([attempts[row] for row in rows], own))
        if len(found) != len(rows):
            raise ValueError(f"it gave {len(found)} numbers for {len(rows)} completions")
        for row, value in zip(rows, found, strict=True):
            values[row] = value
    return values


def decides_by_reward(rewards: Sequence[RewardFunction], task: Task) -> bool:
    """Return whether the mean reward chooses the best policy, and not accuracy.

    That is so where all rewards are a user's own functions, and nothing says what is right but equality with an
    answer in the user's data, which may be one of many.
    """
    return all(reward.path for reward in rewards if reward.name != OVERLONG) and not task.knows_right


def _of_each(function: Callable[[Attempt], float], attempts: Sequence[Attempt], columns: Columns) -> Values:
    return [function(attempt) for attempt in attempts]


def _of_user(function: Callable[..., Any], attempts: Sequence[Attempt], columns: Columns) -> Any:
    """Call a function written for TRL, with keywords and in TRL's conversational form."""
    names = {name for attempt in attempts for name in attempt.problem.columns}
    of_row = {name: [attempt.problem.columns.get(name) for attempt in attempts] for name in sorted(names)}
    of_row |= {name: list(values) for name, values in columns.items()}
    of_row["question"] = [attempt.problem.question for attempt in attempts]
    of_row["answer"] = [attempt.problem.answer for attempt in attempts]
    of_row["prompts"] = [[dict(message) for message in attempt.prompt] for attempt in attempts]
    of_row["completions"] = [[{"role": "assistant", "content": attempt.completion}] for attempt in attempts]
    with contained():
        return list(function(**of_row))  # a generator of the user's runs here


def score(
    rewards: Sequence[RewardFunction],
    attempts: Sequence[Attempt],
    columns: Columns,
    clock: Callable[[str], AbstractContextManager[None]] = nullcontext,
) -> list[Reward]:
    """Return the reward of each attempt; each function runs over the whole batch, timed as `reward/<name>`.

    `columns` are passed on to users' functions. Raises ValueError, in one line that names the function, if a function
    raises or does not return a finite number, or None if it does not apply, for each attempt.
    """
    parts: list[dict[str, float | None]] = [{} for _ in attempts]
    for reward in rewards:
        with clock(f"reward/{reward.name}"):
            values = _values(reward, attempts, columns)
        for part, value in zip(parts, values, strict=True):
            part[reward.name] = None if value is None else reward.weight * value
    return [
        Reward(_total(part.values()), part, attempt.correct, attempt.well_formed)
        for part, attempt in zip(parts, attempts, strict=True)
    ]


def _total(parts: Iterable[float | None]) -> float | None:
    """Return the sum of the parts that apply; None if none does."""
    applied = [value for value in parts if value is not None]
    return sum(applied, 0.0) if applied else None


def _values(reward: RewardFunction, attempts: Sequence[Attempt], columns: Columns) -> Values:
    """Call a function on a batch and check what it returns."""
    try:
        values = list(reward.function(attempts, columns))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(_what_happened(reward, error)) from error
    if len(values) != len(attempts):
        raise ValueError(f"{_named(reward)} gave {len(values)} numbers for {len(attempts)} completions")
    return [_number(reward, value, attempt) for value, attempt in zip(values, attempts, strict=True)]


def _number(reward: RewardFunction, value: Any, attempt: Attempt) -> float | None:
    if value is None:
        return None
    try:  # numbers of numpy and torch are allowed
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception:  # whatever its __float__ raises
        number = math.nan
    if not abs(number) <= LARGEST or not abs(reward.weight * number) <= LARGEST:
        raise ValueError(
            f"{_named(reward)} gave {shown(value)} for the completion {attempt.completion[:80]!a} "
            f"of {attempt.problem.question[:80]!a}; it must return a finite number, or None if it does not apply"
        )
    return number


def try_out(rewards: Sequence[RewardFunction], task: Task) -> None:
    """Score a few made-up completions of training problems, and ask for held-out ones.

    So a mistake in a user's function is found in a second, and not after the model is loaded. Raises ValueError, in
    one line. The problems are those of step 0, which no step takes.
    """
    for split in ("validation", "test"):
        if not task.held_out(split, TRIED):
            raise ValueError(f"the task has no {split} problems; it needs more different ones")
    problems = [task.training_problem(0, 0, row) for row in range(TRIED)]
    texts = (ideal_completion(problem.answer, task.style) for problem in problems)
    pairs = [(problem, text) for problem, ideal in zip(problems, texts, strict=True) for text in (ideal, MADE_UP, "")]
    attempts = [task.grade(problem, text) for problem, text in pairs]
    columns = {"completion_ids": [list(range(len(text))) for _, text in pairs]}
    score(rewards, attempts, columns)


def _named(reward: RewardFunction) -> str:
    return f"reward function {reward.name!r}" + (f" of {reward.path}" if reward.path else "")


def _what_happened(reward: RewardFunction, error: BaseException) -> str:
    """Describe the exception of a reward function in one line, with the line of the user's file it came from."""
    return f"reward function {reward.name!r} raised {one_line(error)} ({place_of(error, reward.path)})"
