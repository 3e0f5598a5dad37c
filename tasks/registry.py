"""List the tasks of --task with their options, and make the task of a run."""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tasks import gsm8k, jsonl
from tasks.arithmetic import Arithmetic
from tasks.base import Option, Task
from tasks.common.own_task import load_task
from tasks.common.prompts import system_prompt
from tasks.common.shots import with_shots
from tasks.common.user_file import names_a_file
from tasks.countdown import Countdown
from tasks.reverse import Reverse
from tasks.selection.mixture import Share, mixture_of, parse_shares

# The class or function that makes each task. Its parameters with a `tasks.base.Option` become command-line options.
TASKS: dict[str, Callable[..., Task]] = {
    "arithmetic": Arithmetic,
    "countdown": Countdown,
    "gsm8k": gsm8k.load,
    "jsonl": jsonl.load,
    "reverse": Reverse,
}
DEFAULT_TASK = "arithmetic"
TASK_TOKENS = {"gsm8k": gsm8k.MAX_NEW_TOKENS}  # the lowest default of --max-new-tokens, for tasks with long workings


class TaskSettings(Protocol):
    """The settings that are common to all tasks; `grpo.config.TrainConfig` has them and the options of all tasks."""

    task: Sequence[str]
    task_arg: Sequence[str]
    prompt_style: str
    prompt_wording: str
    system_prompt: str
    shots: int


@dataclass(frozen=True, kw_only=True)
class TaskOption(Option):
    """An option of one or more tasks; its text in --help begins with the tasks' names."""

    tasks: tuple[str, ...]
    type: type
    default: Any


def task_options() -> dict[str, TaskOption]:
    """Return the options of all tasks by name. If tasks share an option, the first of them describes it."""
    declared = {task: _declared_options(make) for task, make in TASKS.items()}
    options = {}
    for name in dict.fromkeys(name for parameters in declared.values() for name in parameters):
        tasks = tuple(task for task, parameters in declared.items() if name in parameters)
        parameter = declared[tasks[0]][name]
        [option] = parameter.annotation.__metadata__
        known = vars(option) | {"meaning": f"{', '.join(tasks)}: {option.meaning}"}
        options[name] = TaskOption(
            **known, tasks=tasks, type=parameter.annotation.__origin__, default=parameter.default
        )
    return options


def task_shares(specs: str | Sequence[str]) -> list[Share]:
    """Return the tasks that --task names. Raises ValueError if one is unknown, or if two cannot be in one mixture."""
    shares = parse_shares(specs)
    for share in shares:
        if share.spec not in TASKS and not names_a_file(share.spec):
            raise ValueError(f"--task is {share.spec!r}; it must be one of {', '.join(TASKS)}, or FILE.py:NAME")
    for name, option in task_options().items():
        sharing = [share.spec for share in shares if share.spec in option.tasks]
        if len(sharing) > 1 and not option.inheritable:  # Both tasks would read the file that the option names.
            raise ValueError(f"tasks {' and '.join(sharing)} share {_flag(name)}, so they cannot be in one mixture")
    return shares


def unused_options(specs: Sequence[str], given: Collection[str]) -> list[str]:
    """Return the options in `given` that none of these tasks has, as they are typed: --data for data."""
    names = {share.spec for share in parse_shares(specs)}
    return [_flag(name) for name, option in task_options().items() if name in given and not names & set(option.tasks)]


def make_task(settings: TaskSettings) -> Task:
    """Make the task that the settings name. Raises ValueError, in one line, if its data are missing or malformed."""
    shares = task_shares(settings.task)
    specs = {share.spec for share in shares}
    for name, option in task_options().items():
        given = getattr(settings, name) != option.default
        # An inheritable option may come from the card of a model that was trained on another task.
        if given and not specs & set(option.tasks) and not option.inheritable:
            raise ValueError(
                f"--task {' --task '.join(map(str, shares))} does not use {_flag(name)}, which is for --task "
                f"{' and '.join(option.tasks)}"
            )
    if len(shares) == 1:
        return _make(shares[0].spec, settings)
    parts = {share.name: _make(share.spec, settings) for share in shares}
    return mixture_of(parts, {share.name: share.weight for share in shares})


def _make(spec: str, settings: TaskSettings) -> Task:
    if names_a_file(spec):
        task = load_task(spec, settings.task_arg, settings.prompt_style, settings.system_prompt)
    else:
        options = {name: getattr(settings, name) for name, option in task_options().items() if spec in option.tasks}
        task = TASKS[spec](**options, style=settings.prompt_style, system_prompt=settings.system_prompt)
    if task.system_prompt == system_prompt(task.style, task.kind):  # the task has the default prompt of its style
        task = replace(task, system_prompt=system_prompt(task.style, task.kind, settings.prompt_wording))
    return with_shots(task, settings.shots) if settings.shots else task


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _declared_options(make: Callable[..., Task]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(make, eval_str=True).parameters.values()
    return {p.name: p for p in parameters if hasattr(p.annotation, "__metadata__")}
