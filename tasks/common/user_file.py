"""Run a user's file: rewards (`--reward FILE.py:FUNCTION=WEIGHT`), a judge (`--correct FILE.py:FUNCTION`) or tasks
(`--task FILE.py:NAME`, see `own_task.py`).

The signature of a reward is TRL's, so that most functions written for TRL work unchanged:

    def mentions_steps(prompts, completions, **columns):
        return [float("step" in completion[0]["content"]) for completion in completions]

Each item of `prompts` is a list of messages, and each item of `completions` is a list of one assistant message.
`columns` are question, answer, the other columns of the data, and completion_ids. A function returns a number for
each completion, or None where the reward does not apply. A judge is called for each answer; see `Judge`.

This is the only place where the project runs code that is not its own, and it runs only files that the command line
or a --config file names. A model's card must not name such a file (grpo/model_card.py).
"""

import asyncio
import hashlib
import importlib
import inspect
import os
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from tasks.base import Answer, Problem, one_line, shown
from tasks.common.judges import JUDGES
from tasks.common.watch import watched

PREFIX = "user_file_"  # Prefix of the module name under which a user's file is put in sys.modules.
_folders: list[str] = []  # the folders of users' files, the newest first; they are at the end of sys.path
_neighbours: set[str] = set()  # names of modules that were imported from the folder of the file that was loaded last


@dataclass(frozen=True)
class UserFile:
    """A user's file that has been run, with the SHA-256 that it and the modules of its folder had then."""

    path: str
    module: ModuleType
    files: Mapping[str, str]  # the SHA-256, by path, of this file and of the modules it imports from its folder

    def function(self, name: str, may_be_async: bool = False) -> Callable[..., Any]:
        """Return a function of the file. With `may_be_async`, an async function is wrapped in a plain one.

        Raises ValueError if the name belongs to a class, to an async generator, or to an async function without
        `may_be_async`.
        """
        function = self.maker(name)
        if inspect.isclass(function):
            raise ValueError(f"{self.path}:{name} is a class, not a function; name a function or an instance")
        calls = (function, getattr(function, "__call__", None))  # noqa: B004, an object's method may be async
        if may_be_async and any(map(inspect.iscoroutinefunction, calls)):
            return partial(_run_async, function)
        if any(inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call) for call in calls):
            raise ValueError(f"{self.path}:{name} is asynchronous and would never run; write def, not async def")
        return function

    def maker(self, name: str) -> Callable[..., Any]:
        """Return a function or a class of the file. Raises ValueError if the file does not define it."""
        maker = getattr(self.module, name, None)
        if not callable(maker):
            names = [n for n, value in vars(self.module).items() if callable(value) and not n.startswith("_")]
            raise ValueError(f"{self.path} has no function {name!r}; it has {', '.join(names) or 'none'}")
        return maker


def _run_async(function: Callable[..., Any], **keywords: Any) -> Any:
    """Run an async function to its end in another thread, because a notebook's main thread runs an event loop.

    The process does not wait for this thread when it exits, because the function may never return.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(asyncio.run(function(**keywords)))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


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
def contained(what: str) -> Iterator[None]:
    """Run a user's code in the block. If the code does not return, a message names it as `what`.

    If the code leaves the process in another folder, change back to the earlier folder and raise RuntimeError.
    """
    folder = os.getcwd()
    try:
        with watched(what):
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


@contextmanager
def _importing_neighbours(folder: str) -> Iterator[None]:
    """Let the block import modules from a user's folder, read anew each time. No bytecode is written there.

    The folder comes last in sys.path, so that its files hide no module of Python, of this project or of a library.
    """
    for name in _neighbours:
        sys.modules.pop(name, None)
    if folder not in sys.path or folder in _folders:
        sys.path[:] = [path for path in sys.path if path not in _folders]
        _folders[:] = [folder, *(path for path in _folders if path != folder)]
        sys.path += _folders
    importlib.invalidate_caches()
    writes_bytecode = not sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = not writes_bytecode


def _find_neighbours(folder: str, before: Collection[str]) -> dict[str, str]:
    """Return the SHA-256, by path, of the modules from a folder that are in sys.modules but not in `before`."""
    _neighbours.clear()
    files = {}
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        of_project = name.partition(".")[0] in ("grpo", "tasks")
        if name in before or of_project or name.startswith(PREFIX) or "site-packages" in path:
            continue
        if path.startswith(folder + os.sep) and path.endswith(".py"):
            _neighbours.add(name)
            files[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return files


def load_file(path: str) -> UserFile:
    """Run a user's file and return it. Raises ValueError, in one line, if it cannot be read or raises an error."""
    try:
        text = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = dangling(path) or getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read the rewards, judge or task in {path!r}: {reason}") from None
    sha256 = hashlib.sha256(text).hexdigest()
    loader = _Source(f"{PREFIX}{sha256}", path, text)
    module = module_from_spec(spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # dataclasses look up their module there
    folder = os.path.dirname(os.path.abspath(path))
    try:
        with contained(f"the import of {path!a}"), _importing_neighbours(folder):
            before = set(sys.modules)
            loader.exec_module(module)
            files = {path: sha256, **_find_neighbours(folder, before)}
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"cannot run the rewards, judge or task in {path!r}: {one_line(error)}") from error
    return UserFile(path, module, files)


def place_of(error: BaseException, path: str) -> str:
    """Return where in the user's file an exception was raised: `file:line`, or the path if the line is unknown.

    Without a path, return the innermost `file:line`.
    """
    frames = traceback.extract_tb(error.__traceback__)
    in_file = [f"{frame.filename}:{frame.lineno}" for frame in frames if frame.filename == path]
    return in_file[-1] if in_file else path or f"{frames[-1].filename}:{frames[-1].lineno}"


@contextmanager
def naming_own_code() -> Iterator[None]:
    """Turn an exception from a user's code into a ValueError of one line, with the file and the line number."""
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
        """Return whether the judge gets all answers as texts, even numbers, as the built-in judges do."""
        return self.file is None

    @classmethod
    def load(cls, spec: str) -> "Judge":
        """Return the judge named `spec`: built in, or FILE.py:FUNCTION. Raises ValueError if it does not exist."""
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
            with contained(f"--correct {self.name!a}" + (f" of {self.file.path!a}" if self.file else "")):
                verdict = self.function(**{**problem.columns, **asked})
            return as_bool(verdict)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            case = f"on {str(given)[:80]!a} for {problem.question[:80]!a}"
            place = place_of(error, self.file.path if self.file else "")
            raise ValueError(f"--correct {self.name!r} raised {one_line(error)} {case} ({place})") from error


def as_bool(verdict: Any) -> bool:
    """Convert a bool of Python or numpy to a bool. Raises TypeError for any other verdict, such as 1.0 or None."""
    if type(verdict).__name__ not in ("bool", "bool_"):
        raise TypeError(f"it returned {shown(verdict)}, not True or False")
    return bool(verdict)
