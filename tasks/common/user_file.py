"""What is in a user's file: rewards (`--reward FILE.py:FUNCTION=WEIGHT`), a judge (`--correct FILE.py:FUNCTION`), and
tasks (`--task FILE.py:NAME`, see `own_task.py`).

The signature of a reward is TRL's, so that functions written for TRL work unchanged:

    def mentions_steps(prompts, completions, **columns):
        return [float("step" in completion[0]["content"]) for completion in completions]

`prompts` are lists of messages, `completions` lists of one assistant message; `columns` are question, answer, the
other columns of the data, and completion_ids. A function returns a number, or None if it does not apply,
for each completion. A judge of what is right is called for each answer; see `Judge`.

This is the only place where the project runs code that is not its own, and only a file that the command line names:
a model's folder can name none (grpo/config.py).
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

PREFIX = "user_file_"  # of the names of the modules


@dataclass(frozen=True)
class UserFile:
    """A file that was run, and the SHA-256 of what was run."""

    path: str
    module: ModuleType
    sha256: str

    def function(self, name: str) -> Callable[..., Any]:
        """Return a function of the file that takes arguments and returns at once. Raises ValueError if it is none."""
        found = self.maker(name)
        if inspect.isclass(found):
            raise ValueError(f"{self.path}:{name} is a class, not a function; name a function, or an object of it")
        if any(map(_is_asynchronous, (found, getattr(found, "__call__", None)))):  # noqa: B004, an object may have one
            raise ValueError(f"{self.path}:{name} is asynchronous and would never run; write def, not async def")
        return found

    def maker(self, name: str) -> Callable[..., Any]:
        """Return a function or a class of the file. Raises ValueError if there is none of that name."""
        found = getattr(self.module, name, None)
        if not callable(found):
            there = [n for n, value in vars(self.module).items() if callable(value) and not n.startswith("_")]
            raise ValueError(f"{self.path} has no function {name!r}; it has {', '.join(there) or 'none'}")
        return found


def names_a_file(spec: str) -> bool:
    """Return whether a task or a reward is one in a file."""
    return ":" in spec


class _Source(SourceFileLoader):
    """A loader that runs the text that was hashed: it neither reads bytecode, which may be stale, nor writes any."""

    def __init__(self, name: str, path: str, text: bytes) -> None:
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the module."""
        return self.source_to_code(self.text, self.path)


def _is_asynchronous(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


class _Exited(SystemExit):
    """What `os._exit` raises in a user's code."""


@contextmanager
def contained() -> Iterator[None]:
    """Turn what a user's code does to the whole process into an exception: `os._exit`, and `os.chdir` for good.

    A process that the code forks may end as it likes.
    """
    folder, process, leave = _current_folder(), os.getpid(), os._exit

    def exited(status: int) -> None:
        if os.getpid() != process:
            leave(status)
        raise _Exited(f"it called os._exit({status}), which would end the run without a word")

    os._exit = exited
    try:
        yield
    finally:
        os._exit = leave
        now = _current_folder()
        if folder and now != folder:
            os.chdir(folder)
    if folder and now != folder:
        raise RuntimeError(f"it changed the current folder to {now!a}, where the run would go on; change it back")


def _current_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def dangling(path: str) -> str:
    """Return where a symbolic link leads, in words, if nothing is there; "" for anything else."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"it is a symbolic link to {os.readlink(path)!a}, and nothing is there"
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
    """Return `file:line` of an exception in the user's code, that of the last of its lines; else of the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f"{frame.filename}:{frame.lineno}" for frame in frames if frame.filename == path]
    return own[-1] if own else path or f"{frames[-1].filename}:{frames[-1].lineno}"


@contextmanager
def naming_own_code() -> Iterator[None]:
    """Turn an exception that comes through a user's code into a ValueError, in one line with its place."""
    try:
        yield
    except Exception as error:
        loaded = {module.__file__ for name, module in list(sys.modules.items()) if name.startswith(PREFIX)}
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in loaded]
        if not own:
            raise
        raise ValueError(f"your code raised {one_line(error)} ({own[-1].filename}:{own[-1].lineno})") from error


@dataclass(frozen=True)
class Judge:
    """A user's function that decides whether an answer is right.

        def correct(given, question, answer, **columns):
            return set(given.split()) == set(answer.split())

    `given` is the parsed answer of a completion: an int, a Decimal or a text, as the kind of the problem is. `answer`
    is the problem's own, a text; `columns` are the other columns of the data.
    """

    name: str
    file: UserFile
    function: Callable[..., Any]

    @classmethod
    def load(cls, spec: str) -> "Judge":
        """Return the judge that FILE.py:FUNCTION names. Raises ValueError, in one line, if there is none."""
        path, colon, name = spec.rpartition(":")
        if not colon or not path or not name:
            raise ValueError(f"--correct is {spec!r}; write FILE.py:FUNCTION")
        file = load_file(path)
        return cls(name, file, file.function(name))

    def __call__(self, problem: Problem, given: Answer) -> bool:
        """Return whether an answer is right. Raises ValueError, in one line, if the function does not say so."""
        known = {"given": given, "question": problem.question, "answer": problem.answer}
        try:
            with contained():
                verdict = self.function(**{**problem.columns, **known})
            return as_bool(verdict)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            what = f"on {str(given)[:80]!a} for {problem.question[:80]!a}"
            place = place_of(error, self.file.path)
            raise ValueError(f"--correct {self.name!r} raised {one_line(error)} {what} ({place})") from error


def as_bool(verdict: Any) -> bool:
    """Return True or False, of numpy too. Raises TypeError for anything else: a number or None may mean anything."""
    if type(verdict).__name__ not in ("bool", "bool_"):
        raise TypeError(f"it returned {shown(verdict)}, not True or False")
    return bool(verdict)
