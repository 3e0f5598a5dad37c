"""Make the rewards of a run from --reward or the task's defaults, and score a batch with them."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from tasks.base import Attempt, Reward, Task, one_line, shown
from tasks.common.prompts import ideal_completion
from tasks.common.user_file import UserFile, contained, load_file, place_of
from tasks.rewards.functions import REWARDS

OVERLONG = "overlong"  # the name of the part that --overlong-buffer adds
PROBLEMS_TRIED = 4  # problems that are tried before a model is loaded, with three completions each
READ_A_MESSAGE = 'a completion is a list of one message, so read its text as completion[0]["content"]'
WRONG_COMPLETION = "It is 1, I think."  # a completion for the trial that does not have the required form
MESSAGE_TYPES = re.compile(r"\b(list|dict)\b")  # An error names one of these if a message was taken for a text.
LARGEST_REWARD = 1e12  # largest reward times weight; float32 and a group's variance overflow only far above it

Columns = Mapping[str, Sequence[Any]]  # for each name, one value per completion
Values = Sequence[float | None]


class RewardSettings(Protocol):
    """The settings that define the rewards of a run; `grpo.config.TrainConfig` has them."""

    reward: Sequence[str]
    overlong_buffer: int
    max_new_tokens: int


@dataclass(frozen=True)
class RewardFunction:
    """A named reward with its weight."""

    name: str
    weight: float
    function: Callable[[Sequence[Attempt], Columns], Values]  # scores a batch
    path: str = ""  # the user's file that has the function; "" for a function of the project
    # The SHA-256, by path, of that file and of the modules it imports from its folder; {} if there is no such file.
    files: Mapping[str, str] = field(default_factory=dict)
    # The same function, called with plain texts instead of messages; None if there is no file.
    plain: Callable[[Sequence[Attempt], Columns], Values] | None = None
    reads_texts: bool = False  # True: `function` is `plain`


def parse_rewards(specs: Sequence[str], defaults: Mapping[str, float]) -> list[RewardFunction]:
    """Return the rewards that `specs` name, as NAME=WEIGHT or FILE.py:FUNCTION=WEIGHT; without specs, the defaults.

    Raises ValueError, in one line, if a reward is malformed, unknown, missing in its file, or given twice.
    """
    rewards: dict[str, RewardFunction] = {}
    files: dict[str, UserFile] = {}  # users' files by path, so that each file is run once
    for spec in specs or [f"{name}={weight}" for name, weight in defaults.items()]:
        what, _, weight_text = spec.rpartition("=")
        try:
            weight = float(weight_text)
        except ValueError:
            weight = math.nan
        if not what or not abs(weight) <= LARGEST_REWARD:
            raise ValueError(
                f"--reward {spec!r}: write NAME=WEIGHT or FILE.py:FUNCTION=WEIGHT, with a number as weight"
            )
        path, colon, name = what.rpartition(":")
        if name in rewards:
            raise ValueError(f"--reward {name!r} is given twice; the metrics would have two means of this name")
        if colon:
            files[path] = files.get(path) or load_file(path)
            what = f"reward function {name!a} of {path!a}"
            function = partial(_of_user, what, files[path].function(name, may_be_async=True))
            plain = partial(function, as_texts=True)
            rewards[name] = RewardFunction(name, weight, function, path, files[path].files, plain)
        elif name in REWARDS:
            rewards[name] = RewardFunction(name, weight, partial(_of_each, REWARDS[name]))
        else:
            known = ", ".join(REWARDS)
            raise ValueError(f"there is no --reward {name!r}; choose from {known}, or FILE.py:FUNCTION for your own")
    return list(rewards.values())


def overlong(limit: int, buffer: int, attempts: Sequence[Attempt], columns: Columns) -> Values:
    """Return 0 for completions of at most `limit` − `buffer` tokens, falling to −1 at `limit` in a straight line.

    This is the soft overlong punishment of DAPO, arXiv:2503.14476, equation 13.
    """
    over = (len(ids) - (limit - buffer) for ids in columns["completion_ids"])
    return [-min(max(0, tokens), buffer) / buffer for tokens in over]


def rewards_of(settings: RewardSettings, task: Task) -> list[RewardFunction]:
    """Return the rewards of a run. Raises ValueError, in one line, if a specification is wrong."""
    if task.parts and not settings.reward:
        rewards = join_rewards({name: parse_rewards((), part.default_rewards) for name, part in task.parts.items()})
    else:
        rewards = parse_rewards(settings.reward, task.default_rewards)
    if settings.overlong_buffer:
        penalty = partial(overlong, settings.max_new_tokens, settings.overlong_buffer)
        rewards.append(RewardFunction(OVERLONG, 1.0, penalty))
    if not any(reward.weight for reward in rewards):
        names = ", ".join(reward.name for reward in rewards)
        raise ValueError(f"--reward: the weights are all 0 ({names}), so nothing would be learned")
    return rewards


def join_rewards(by_task: Mapping[str, Sequence[RewardFunction]]) -> list[RewardFunction]:
    """Return the rewards of a mixture, joined from the rewards of its tasks; the keys of `by_task` are task names.

    A reward applies only to problems of the tasks that have it. If a reward has the same weight and file in all tasks
    that have it, it is one shared reward. If weight or file differ, the mixture has a reward NAME/TASK for each task.
    """
    versions: dict[str, set[tuple[float, str]]] = {}  # the pairs of weight and file, by the reward's name
    for rewards in by_task.values():
        for reward in rewards:
            versions.setdefault(reward.name, set()).add((reward.weight, reward.path))
    tasks_of: dict[str, set[str]] = {}  # the tasks that a reward of the mixture applies to
    joined: dict[str, RewardFunction] = {}
    for task, rewards in by_task.items():
        for reward in rewards:
            name = reward.name if len(versions[reward.name]) == 1 else f"{reward.name}/{task}"
            tasks = tasks_of.setdefault(name, set())
            tasks.add(task)
            joined.setdefault(name, replace(reward, name=name, function=partial(_in_tasks, reward, tasks)))
    return list(joined.values())


def _in_tasks(reward: RewardFunction, tasks: Set[str], attempts: Sequence[Attempt], columns: Columns) -> Values:
    """Return a reward's values for the problems of `tasks`; the value for problems of other tasks is None."""
    rows = [row for row, attempt in enumerate(attempts) if attempt.problem.category in tasks]
    values: list[float | None] = [None] * len(attempts)
    if rows:
        columns = {name: [column[row] for row in rows] for name, column in columns.items()}
        numbers = list(reward.function([attempts[row] for row in rows], columns))
        if len(numbers) != len(rows):
            raise ValueError(f"it gave {len(numbers)} numbers for {len(rows)} completions")
        for row, number in zip(rows, numbers, strict=True):
            values[row] = number
    return values


def decides_by_reward(rewards: Sequence[RewardFunction], task: Task) -> bool:
    """Return whether the mean reward, instead of accuracy, chooses the best policy.

    This is the case if all rewards are a user's functions, and the task only compares answers with reference answers
    in the user's data although other answers may be right too.
    """
    return all(reward.path for reward in rewards if reward.name != OVERLONG) and not task.knows_right


def decides_until_right(rewards: Sequence[RewardFunction], task: Task) -> bool:
    """Return whether the mean reward chooses the best policy at least until a validation answer is right.

    This is the case if any reward is a user's function, and the task only compares answers with reference answers.
    """
    return any(reward.path for reward in rewards) and not task.knows_right


def _of_each(function: Callable[[Attempt], float], attempts: Sequence[Attempt], columns: Columns) -> Values:
    return [function(attempt) for attempt in attempts]


def _of_user(
    what: str, function: Callable[..., Any], attempts: Sequence[Attempt], columns: Columns, as_texts: bool = False
) -> Any:
    """Call a user's function as TRL does: with keywords, and with prompts and completions as messages.

    `what` names the function and its file in the message that is printed while it does not return. With `as_texts`,
    completions are plain texts instead, and prompts are the texts of their last messages.
    """
    names = {name for attempt in attempts for name in attempt.problem.columns}
    keywords = {name: [attempt.problem.columns.get(name) for attempt in attempts] for name in sorted(names)}
    keywords |= {name: list(values) for name, values in columns.items()}
    keywords["question"] = [attempt.problem.question for attempt in attempts]
    keywords["answer"] = [attempt.problem.answer for attempt in attempts]
    keywords["prompts"] = [[dict(message) for message in attempt.prompt] for attempt in attempts]
    keywords["completions"] = [[{"role": "assistant", "content": attempt.completion}] for attempt in attempts]
    if as_texts:
        keywords["prompts"] = [attempt.prompt[-1]["content"] for attempt in attempts]
        keywords["completions"] = [attempt.completion for attempt in attempts]
    with contained(what):
        return list(function(**keywords))  # `list` runs the function here if it is a generator


def score(
    rewards: Sequence[RewardFunction],
    attempts: Sequence[Attempt],
    columns: Columns,
    clock: Callable[[str], AbstractContextManager[None]] = nullcontext,
    tolerant: bool = False,
) -> list[Reward]:
    """Return the reward of each attempt. Each function runs over the whole batch, timed as `reward/<name>`.

    `columns` are passed on to users' functions. Raises ValueError, in one line that names the function, if a function
    raises an exception, or does not return one finite number or None for each attempt. If `tolerant`, a user's
    function may fail: a completion on which it fails has no reward, and `errors` gives the reason.
    """
    parts: list[dict[str, float | None]] = [{} for _ in attempts]
    errors: list[list[str]] = [[] for _ in attempts]
    for reward in rewards:
        with clock(f"reward/{reward.name}"):
            if tolerant and reward.path:
                values, failed = _values_and_errors(reward, attempts, columns)
            else:
                values, failed = _values(reward, attempts, columns), {}
        for part, value in zip(parts, values, strict=True):
            part[reward.name] = None if value is None else reward.weight * value
        for row, error in failed.items():
            errors[row].append(error)
    return [
        Reward(None if error else _total(part.values()), part, attempt.correct, attempt.well_formed, error)
        for part, attempt, error in zip(parts, attempts, errors, strict=True)
    ]


def _total(parts: Iterable[float | None]) -> float | None:
    """Return the sum of the parts that apply; None if no part applies."""
    applied = [value for value in parts if value is not None]
    return sum(applied, 0.0) if applied else None


def _values(reward: RewardFunction, attempts: Sequence[Attempt], columns: Columns) -> Values:
    """Call a reward on a batch, check its values and return them. Raises ValueError if the function fails."""
    try:
        values = list(reward.function(attempts, columns))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        place = place_of(error, reward.path)
        raised = f"{one_line(error)} ({place})"
        if reward.path and isinstance(error, (TypeError, AttributeError)) and MESSAGE_TYPES.search(str(error)):
            raised += f"; {READ_A_MESSAGE}"
        raise ValueError(f"reward function {reward.name!r} raised {raised}") from error
    if len(values) != len(attempts):
        raise ValueError(f"{_named(reward)} gave {len(values)} numbers for {len(attempts)} completions")
    return [_number(reward, value, attempt) for value, attempt in zip(values, attempts, strict=True)]


def _values_and_errors(
    reward: RewardFunction, attempts: Sequence[Attempt], columns: Columns
) -> tuple[Values, dict[int, str]]:
    """Call a user's function on a batch. Return its values, and its errors by the row of the completion.

    If the function fails on the batch, it is called on each completion alone to find those on which it fails. Then it
    is called on all other completions together, because its values may depend on the whole batch.
    """

    def values_of(rows: Sequence[int]) -> Values:
        chosen = {name: [column[row] for row in rows] for name, column in columns.items()}
        return _values(reward, [attempts[row] for row in rows], chosen)

    rows = list(range(len(attempts)))
    values: list[float | None] = [None] * len(attempts)
    errors: dict[int, str] = {}
    try:
        return values_of(rows), errors
    except ValueError:
        for row in rows:
            try:
                values_of([row])
            except ValueError as error:
                errors[row] = str(error)
    good = [row for row in rows if row not in errors]
    try:
        for row, value in zip(good, values_of(good) if good else (), strict=True):
            values[row] = value
    except ValueError as error:  # The function fails only on several completions together.
        errors |= dict.fromkeys(good, str(error))
    return values, errors


def _number(reward: RewardFunction, value: Any, attempt: Attempt) -> float | None:
    if value is None:
        return None
    try:  # `float`, because numbers of numpy and torch are allowed
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception:  # `__float__` of a user's object may raise anything
        number = math.nan
    if not abs(number) <= LARGEST_REWARD or not abs(reward.weight * number) <= LARGEST_REWARD:
        raise ValueError(
            f"{_named(reward)} gave {shown(value)} for the completion {attempt.completion[:80]!a} "
            f"of {attempt.problem.question[:80]!a}; it must return a finite number, or None if it does not apply"
        )
    return number


def try_out(rewards: Sequence[RewardFunction], task: Task) -> tuple[list[RewardFunction], list[str]]:
    """Score a few made-up completions of training problems, and make a few held-out problems.

    This finds a mistake in a user's function in a second, before the model is loaded. Return the rewards to train
    with, and remarks for the user. A user's function that fails on messages, or gives all of them the same value, is
    called with plain texts from now on if it works with them. Raises ValueError, in one line, for a mistake. The
    problems belong to step 0, which no run trains on: the steps of a run begin at 1.
    """
    for split in ("validation", "test"):
        if not task.held_out(split, PROBLEMS_TRIED):
            raise ValueError(f"the task has no {split} problems; it needs more distinct problems")
    attempts = []
    for row in range(PROBLEMS_TRIED):
        problem = task.training_problem(0, 0, row)
        for text in (ideal_completion(problem.answer, task.style), WRONG_COMPLETION, ""):
            attempts.append(task.grade(problem, text))
    columns = {"completion_ids": [list(range(len(attempt.completion))) for attempt in attempts]}
    chosen, remarks = [], []
    for reward in rewards:
        reward, values = _try_out_one(reward, attempts, columns)
        chosen.append(reward)
        if reward.reads_texts:
            remarks.append(
                f"{_named(reward)} does not read messages, so it gets prompts and completions as plain texts"
            )
        if reward.path and reward.weight and len(set(values)) == 1:
            same = f"{_named(reward)} gave all {len(attempts)} made-up completions the same value"
            remarks.append(f"{same}; if it does so in training too, nothing is learned from it")
    return chosen, remarks


def _try_out_one(
    reward: RewardFunction, attempts: Sequence[Attempt], columns: Columns
) -> tuple[RewardFunction, Values]:
    """Return a reward and its values; a user's function is changed to plain texts if it works only with them."""
    failure = None
    values: Values = ()
    try:
        values = _values(reward, attempts, columns)
    except ValueError as error:
        failure = error
    if reward.plain and len(set(values)) < 2:
        with_texts = replace(reward, function=reward.plain, reads_texts=True)
        with suppress(ValueError):
            text_values = _values(with_texts, attempts, columns)
            if failure or len(set(text_values)) > 1:
                return with_texts, text_values
    if failure:
        raise failure
    return reward, values


def _named(reward: RewardFunction) -> str:
    return f"reward function {reward.name!r}" + (f" of {reward.path}" if reward.path else "")
