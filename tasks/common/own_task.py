"""A task in a user's file: `--task FILE.py:NAME`, a class or a function that makes a `QATask`.

Its parameters are set by `--task-arg key=value`. It is tried on a few problems before a model is loaded, so that a
mistake in it is reported at once.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from tasks.base import Attempt, Problem, Task, one_line, shown
from tasks.common.prompts import ideal_completion
from tasks.common.qa_task import QATask
from tasks.common.user_file import as_bool, contained, load_file, place_of

TRIED = 8  # problems of each split
RESERVED = {f.name for f in fields(QATask)} | {"name"}  # parameters with settings of their own, or of no use
NOT_NAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def load_task(spec: str, given: Sequence[str], style: str, system_prompt: str) -> QATask:
    """Return the task that FILE.py:NAME makes of the `key=value` in `given`.

    Raises ValueError, in one line with the place in the file, if it cannot be made or does not work.
    """
    path, _, name = spec.rpartition(":")
    if not path or not name:
        raise ValueError(f"--task is {spec!r}; write FILE.py:NAME, the name of a class or function that makes it")
    file = load_file(path)
    make = file.maker(name)
    try:
        parameters = inspect.signature(make, eval_str=True).parameters
        known = {"style": style, "system_prompt": system_prompt}
        known = {key: value for key, value in known.items() if value and _takes(parameters, key)}
    except Exception as error:  # an annotation of the user's is evaluated
        raise ValueError(f"--task {name!r}: {one_line(error)} ({place_of(error, path)})") from error
    known |= arguments(name, parameters, given)
    try:
        with contained():
            task = make(**known)
            if not isinstance(task, QATask):
                raise TypeError(f"it makes {type(task).__name__}, not a QATask")
            task = replace(task, files={**task.files, path: file.sha256})
            try_out(task)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"--task {name!r} raised {one_line(error)} ({place_of(error, path)})") from error
    return task


def arguments(name: str, parameters: Mapping[str, inspect.Parameter], given: Sequence[str]) -> dict[str, Any]:
    """Return the `key=value` in `given` as arguments of a task. Raises ValueError for one that it does not take."""
    found: dict[str, Any] = {}
    settable = {key: p for key, p in parameters.items() if key not in RESERVED and p.kind not in NOT_NAMED}
    for spec in given:
        key, equals, text = spec.partition("=")
        if not equals or key not in settable or key in found:
            takes = ", ".join(settable) or "none"
            twice = " twice" if key in found else ""
            raise ValueError(f"--task-arg {spec!r}{twice}: write key=value; the arguments of {name!r} are: {takes}")
        found[key] = _converted(spec, text, settable[key])
    missing = [key for key, p in settable.items() if p.default is p.empty and key not in found]
    if missing:
        raise ValueError(f"--task {name!r} needs " + " ".join(f"--task-arg {key}=..." for key in missing))
    return found


def _converted(spec: str, text: str, parameter: inspect.Parameter) -> Any:
    """Return a value in the type of its parameter: that of its annotation, else of its default."""
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


def _takes(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def try_out(task: Task) -> None:
    """Ask a task for a few problems and grade their answers. Raises what it raises, or TypeError or ValueError."""
    training = [task.training_problem(0, 1, row) for row in range(TRIED)]
    if training != [task.training_problem(0, 1, row) for row in range(TRIED)]:
        raise ValueError(
            "training_problem gives another problem when it is called again; a resumed run needs the same"
        )
    held_out = [problem for split in ("validation", "test") for problem in _some(task, split)]
    for problem in (*training, *held_out):
        _check(task, problem)
    asked = {problem.question for problem in training}
    if both := [problem.question for problem in held_out if problem.question in asked]:
        raise ValueError(f"{both[0][:80]!a} is a training problem and held out")


def _some(task: Task, split: str) -> list[Problem]:
    problems = task.held_out(split, TRIED)
    if not isinstance(problems, list) or not problems:
        raise ValueError(f"held_out({split!r}, {TRIED}) gives {shown(problems)}, not a list of problems")
    return problems


def _check(task: Task, problem: Any) -> None:
    """Raise TypeError or ValueError if this is no problem, or if the task does not call its own answer right."""
    if not isinstance(problem, Problem):
        raise TypeError(f"a problem is {shown(problem)}, not a tasks.base.Problem")
    if not (isinstance(problem.question, str) and problem.question.strip() and isinstance(problem.answer, str)):
        raise TypeError(f"question and answer must be texts, of {repr(problem)[:160]}")
    for completion in (ideal_completion(problem.answer, task.style), ""):
        attempt = task.grade(problem, completion)
        right = as_bool(attempt.correct if isinstance(attempt, Attempt) else attempt)
        if completion and not right:
            raise ValueError(f"its own answer {problem.answer[:80]!a} to {problem.question[:80]!a} is not right")
