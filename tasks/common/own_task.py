"""A task in a user's file: `--task FILE.py:NAME`, a class or a function that makes a `QATask`.

`--task-arg key=value` sets a parameter of the class or function. The task is tried on a few problems before a model
is loaded, so that a mistake in the file is reported at once.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from tasks.base import Attempt, Problem, Task, one_line, shown
from tasks.common.prompts import ideal_completion
from tasks.common.qa_task import QATask
from tasks.common.user_file import as_bool, contained, load_file, place_of

PROBLEMS_TRIED = 8  # problems of each split that are tried before a model is loaded
# Parameters that --task-arg does not set: most of them have an option of their own, such as --prompt-style.
RESERVED = {f.name for f in fields(QATask)}
# Kinds of parameters that cannot be given as KEY=VALUE.
NOT_NAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def load_task(spec: str, given: Sequence[str], style: str, system_prompt: str) -> QATask:
    """Return the task that FILE.py:NAME makes; `given` are the arguments of --task-arg, each `key=value`.

    Raises ValueError, in one line with the place in the file, if the task cannot be made or does not work.
    """
    path, _, name = spec.rpartition(":")
    if not path or not name:
        raise ValueError(f"--task is {spec!r}; write FILE.py:NAME, the name of a class or function in the file")
    file = load_file(path)
    make = file.maker(name)
    try:
        parameters = inspect.signature(make, eval_str=True).parameters
    except Exception as error:  # evaluating the user's annotations may raise anything
        raise ValueError(f"--task {name!r}: {one_line(error)} ({place_of(error, path)})") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    settings = {"style": style, "system_prompt": system_prompt}
    taken = {key: text for key, text in settings.items() if text and (key in parameters or takes_any)}
    taken |= arguments(name, parameters, given)
    try:
        with contained(f"--task {name!a} of {path!a}"):
            task = make(**taken)
            if not isinstance(task, QATask):
                raise TypeError(f"it makes {type(task).__name__}, not a QATask")
            task = replace(task, files={**task.files, **file.files})
            try_out(task)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"--task {name!r} raised {one_line(error)} ({place_of(error, path)})") from error
    return task


def arguments(name: str, parameters: Mapping[str, inspect.Parameter], given: Sequence[str]) -> dict[str, Any]:
    """Convert texts `key=value` to the arguments of a task, by name. Raises ValueError if one is wrong or missing."""
    values: dict[str, Any] = {}
    settable = {key: p for key, p in parameters.items() if key not in RESERVED and p.kind not in NOT_NAMED}
    for spec in given:
        key, equals, text = spec.partition("=")
        if not equals or key not in settable or key in values:
            takes = ", ".join(settable) or "none"
            twice = " twice" if key in values else ""
            raise ValueError(f"--task-arg {spec!r}{twice}: write key=value; the arguments of {name!r} are: {takes}")
        values[key] = _converted(spec, text, settable[key])
    missing = [key for key, p in settable.items() if p.default is p.empty and key not in values]
    if missing:
        raise ValueError(f"--task {name!r} needs " + " ".join(f"--task-arg {key}=..." for key in missing))
    return values


def _converted(spec: str, text: str, parameter: inspect.Parameter) -> Any:
    """Convert an argument's text to the type that the parameter is annotated with, or else to its default's type."""
    kind = getattr(parameter.annotation, "__origin__", parameter.annotation)
    if kind is parameter.empty:
        kind = str if parameter.default in (parameter.empty, None) else type(parameter.default)
    makers: dict[Any, Callable[[str], Any]] = {int: int, float: float, str: str, bool: lambda t: BOOLS[t.lower()]}
    if kind not in makers:
        raise ValueError(f"--task-arg {spec!r}: an argument of type {kind} cannot be given on the command line")
    try:
        return makers[kind](text)
    except (ValueError, KeyError):
        raise ValueError(f"--task-arg {spec!r}: {text!r} is not {kind.__name__}") from None


def try_out(task: Task) -> None:
    """Make a few problems and grade their answers.

    Raises what the task raises, and TypeError or ValueError if a problem or a grade is invalid.
    """
    training = [task.training_problem(0, 1, row) for row in range(PROBLEMS_TRIED)]
    if training != [task.training_problem(0, 1, row) for row in range(PROBLEMS_TRIED)]:
        raise ValueError(
            "training_problem gives another problem when it is called again; a resumed run needs the same problem"
        )
    held_out = []
    for split in ("validation", "test"):
        problems = task.held_out(split, PROBLEMS_TRIED)
        if not isinstance(problems, list) or not problems:
            raise ValueError(f"held_out({split!r}, {PROBLEMS_TRIED}) gives {shown(problems)}, not a list of problems")
        held_out += problems
    for problem in (*training, *held_out):
        _check(task, problem)
    asked = {problem.question for problem in training}
    if both := [problem.question for problem in held_out if problem.question in asked]:
        raise ValueError(f"{both[0][:80]!a} is both a training problem and a held-out problem")


def _check(task: Task, problem: Any) -> None:
    """Raise TypeError if `problem` is not a Problem, or ValueError if the task grades its own answer as wrong."""
    if not isinstance(problem, Problem):
        raise TypeError(f"a problem is {shown(problem)}, not a tasks.base.Problem")
    if not (isinstance(problem.question, str) and problem.question.strip() and isinstance(problem.answer, str)):
        raise TypeError(f"question and answer must be texts in {repr(problem)[:160]}")
    for completion in (ideal_completion(problem.answer, task.style), ""):
        attempt = task.grade(problem, completion)
        right = as_bool(attempt.correct if isinstance(attempt, Attempt) else attempt)
        if completion and not right:
            raise ValueError(f"it grades the answer {problem.answer[:80]!a} of {problem.question[:80]!a} as wrong")
