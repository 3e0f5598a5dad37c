"""The tasks of --task, one line each, their options as settings of a run, and the way to a task in a file."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tasks import gsm8k, jsonl
from tasks.arithmetic import Arithmetic
from tasks.base import Task
from tasks.common.own_task import load_task
from tasks.common.shots import with_shots
from tasks.common.user_file import names_a_file
from tasks.countdown import Countdown
from tasks.reverse import Reverse

# what makes each task, by name; its parameters that are annotated with a `tasks.base.Option` become options
TASKS: dict[str, Callable[..., Task]] = {
    "arithmetic": Arithmetic,
    "countdown": Countdown,
    "gsm8k": gsm8k.load,
    "jsonl": jsonl.load,
    "reverse": Reverse,
}
DEFAULT_TASK = "arithmetic"


class TaskSettings(Protocol):
    """The settings that every task is made from; `grpo.config.TrainConfig` has them and the options of all tasks."""

    task: str
    task_arg: Sequence[str]
    prompt_style: str
    system_prompt: str
    shots: int


@dataclass(frozen=True)
class TaskOption:
    """An option of one or more tasks."""

    tasks: tuple[str, ...]
    type: type
    default: Any
    meaning: str
    least: float | None
    inheritable: bool


def task_options() -> dict[str, TaskOption]:
    """Return the options of all tasks by name. Tasks may share one, which the first of them describes."""
    declared = {task: _declared_options(make) for task, make in TASKS.items()}
    found = {}
    for name in dict.fromkeys(name for options in declared.values() for name in options):
        tasks = tuple(task for task, options in declared.items() if name in options)
        parameter = declared[tasks[0]][name]
        option = parameter.annotation.__metadata__[0]
        meaning = f"{', '.join(tasks)}: {option.meaning}"
        kind = parameter.annotation.__origin__
        found[name] = TaskOption(tasks, kind, parameter.default, meaning, option.least, option.inheritable)
    return found


def make_task(settings: TaskSettings) -> Task:
    """Make the task of the settings. Raises ValueError, in one line, if its data are missing or malformed."""
    options = task_options()
    for name, option in options.items():
        given = getattr(settings, name) != option.default
        # a model's card may have inheritable options of another task; any other option was typed for this task
        if given and settings.task not in option.tasks and not option.inheritable:
            raise ValueError(
                f"--task {settings.task} has no use for --{name.replace('_', '-')}, which is for --task "
                f"{' and '.join(option.tasks)}"
            )
    if names_a_file(settings.task):
        task = load_task(settings.task, settings.task_arg, settings.prompt_style, settings.system_prompt)
    else:
        own = {name: getattr(settings, name) for name, option in options.items() if settings.task in option.tasks}
        task = TASKS[settings.task](**own, style=settings.prompt_style, system_prompt=settings.system_prompt)
    return with_shots(task, settings.shots) if settings.shots else task


def _declared_options(make: Callable[..., Task]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(make, eval_str=True).parameters.values()
    return {p.name: p for p in parameters if hasattr(p.annotation, "__metadata__")}
