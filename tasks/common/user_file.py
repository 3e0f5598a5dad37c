"""Run a user's file: rewards (`--reward FILE.py:FUNCTION=WEIGHT`), a judge (`--correct FILE.py:FUNCTION`) or tasks
(`--task FILE.py:NAME`, see `own_task.py`).

The signature of a reward is TRL's, so that functions written for TRL work unchanged:

    def mentions_steps(prompts, completions, **columns):
        return [float("step" in completion[0]["content"]) for completion in completions]

Each of `prompts` is a list of messages, each of `completions` a list of one assistant message; `columns` are
question, answer, the other columns of the data, and completion_ids. A function returns a number for each completion,
or None where the reward does not apply. A judge is called for each answer; see `Judge`.

This is the only place where the project runs code that is not its own, and it runs only files that the command line
names. A model's card must not name such a file (grpo/model_card.py).
"""

import hashlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from tasks.base import Answer, Problem, one_line, shown
from tasks.common.judges import JUDGES

PREFIX = "user_file_"  # Prefix of the module name under which a user's file is put in sys.modules.


@dataclass(frozen=True)
class UserFile:
    """A user's file that was run, and the SHA-256 of its text at that moment."""

    path: str
    module: ModuleType
    sha256: str

    def function(self, name: str) -> Callable[..., Any]:
        """Return a function of the file. Raises ValueError if the name belongs to a class or an async function."""
        function = self.maker(name)
        if inspect.isclass(function):
            raise ValueError(f"{self.path}:{name} is a class, not a function; name a function, or an object of it")
        calls = (function, getattr(function, "__call__", None))  # noqa: B004, an object's method may be async
        if any(inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call) for call in calls):
            raise ValueError(f"{self.path}:{name} is asynchronous and would never run; write def, not async def")
        return function

    def maker(self, name: str) -> Callable[..., Any]:
        """Return a function or a class of the file. Raises ValueError if the file has no such name."""
        maker = getattr(self.module, name, None)
        if not callable(maker):
            names = [n for n, value in vars(self.module).items() if callable(value) and not n.startswith("_")]
            raise ValueError(f"{self.path} has no function {name!r}; it has {', '.join(names) or 'none'}")
        return maker


def names_a_file(spec: str) -> bool:
    """Return whether a specification names something in a file, as FILE.py:NAME does."""
    return ":" in spec


class _Source(SourceFileLoader):
    """Load a module from the text that was hashed. Read no bytecode, because it may be stale, and write none."""

    def __init__(self, name: str, path: str, text: bytes) -> None:
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the module."""
        return self.source_to_code(self.text, self.path)


@contextmanager
def contained() -> Iterator[None]:
    """Raise RuntimeError if a user's code leaves the process in another folder; go back to the folder it was in."""
    folder = os.getcwd()
    try:
        yield
    finally:
        folder_after = os.getcwd()
        if folder_after != folder:
            os.chdir(folder)
    if folder_after != folder:
        raise RuntimeError(
            f"it changed the current folder to {folder_after!a} and left it there; change it back before returning"
        )


def dangling(path: str) -> str:
    """Return a sentence about a symbolic link whose target is missing; "" for any other path."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"it is a symbolic link to {os.readlink(path)!a}, which does not exist"
    return ""


def load_file(path: str) -> UserFile:
    """Run a user's file. Raises ValueError, in one line, if the file cannot be read or raises an exception."""
    try:
        text = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = dangling(path) or getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read the rewards, judge or task in {path!r}: {reason}") from None
    sha256 = hashlib.sha256(text).hexdigest()
    loader = _Source(f"{PREFIX}{sha256}", path, text)
    module = module_from_spec(spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # dataclasses look up their module there
    try:
        with contained():
            loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"cannot run the rewards, judge or task in {path!r}: {one_line(error)}") from error
    return UserFile(path, module, sha256)


def place_of(error: BaseException, path: str) -> str:
    """Return where in the user's file an exception was raised: `file:line`, or the path if no line of it is known.

    Without a path, return the innermost `file:line`.
    """
    frames = traceback.extract_tb(error.__traceback__)
    in_file = [f"{frame.filename}:{frame.lineno}" for frame in frames if frame.filename == path]
    return in_file[-1] if in_file else path or f"{frames[-1].filename}:{frames[-1].lineno}"


@contextmanager
def naming_own_code() -> Iterator[None]:
    """Turn an exception from a user's code into a ValueError, in one line with file and line."""
    try:
        yield
    except Exception as error:
        files = {module.__file__ for name, module in list(sys.modules.items()) if name.startswith(PREFIX)}
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
        if not frames:
            raise
        place = f"{frames[-1].filename}:{frames[-1].lineno}"
        raise ValueError(f"your code raised {one_line(error)} ({place})") from error


@dataclass(frozen=True)
class Judge:
    """A user's function that decides whether an answer is right.

        def correct(given, question, answer, **columns):
            return set(given.split()) == set(answer.split())

    `given` is the parsed answer of a completion: an int, a Decimal or a text, by the kind of the problem. `answer` is
    the problem's own answer, a text. `columns` are the other columns of the data.
    """

    name: str
    file: UserFile | None  # None for a built-in judge
    function: Callable[..., Any]

    @property
    def reads_text(self) -> bool:
        """Return whether the judge gets all answers as texts, numbers too, as the built-in judges do."""
        return self.file is None

    @classmethod
    def load(cls, spec: str) -> "Judge":
        """Return the built-in judge of this name, or FILE.py:FUNCTION. Raises ValueError if there is none."""
        if spec in JUDGES:
            return cls(spec, None, JUDGES[spec])
        path, colon, name = spec.rpartition(":")
        if not colon or not path or not name:
            raise ValueError(f"--correct is {spec!r}; write {', '.join(JUDGES)} or FILE.py:FUNCTION")
        file = load_file(path)
        return cls(name, file, file.function(name))

    def __call__(self, problem: Problem, given: Answer) -> bool:
        """Return whether an answer is right. Raises ValueError, in one line, if the function fails."""
        asked = {"given": given, "question": problem.question, "answer": problem.answer}
        try:
            with contained():
                verdict = self.function(**{**problem.columns, **asked})
            return as_bool(verdict)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            case = f"on {str(given)[:80]!a} for {problem.question[:80]!a}"
            place = place_of(error, self.file.path if self.file else "")
            raise ValueError(f"--correct {self.name!r} raised {one_line(error)} {case} ({place})") from error


def as_bool(verdict: Any) -> bool:
    """Return a bool of Python or numpy as a bool. Raises TypeError for any other verdict, such as 1.0 or None."""
    if type(verdict).__name__ not in ("bool", "bool_"):
        raise TypeError(f"it returned {shown(verdict)}, not True or False")
    return bool(verdict)
