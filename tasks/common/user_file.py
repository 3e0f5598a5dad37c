"""Reward functions in a user's file: `--reward FILE.py:FUNCTION=WEIGHT`.

The signature is TRL's, so that functions written for TRL work unchanged:

    def mentions_steps(prompts, completions, **columns):
        return [float("step" in completion[0]["content"]) for completion in completions]

`prompts` are lists of messages, `completions` lists of one assistant message; `columns` are question, answer, the
other columns of the data, and completion_ids. A function returns a number, or None if it does not apply,
for each completion.

This is the only place where the project runs code that is not its own, and only a file that the command line names:
a model's folder can name none (grpo/config.py).
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from tasks.base import one_line


@dataclass(frozen=True)
class UserFile:
    """A file that was run, and the SHA-256 of what was run."""

    path: str
    module: ModuleType
    sha256: str

    def function(self, name: str) -> Callable[..., Any]:
        """Return a function of the file. Raises ValueError if there is none of that name."""
        found = getattr(self.module, name, None)
        if not callable(found):
            there = [n for n, value in vars(self.module).items() if callable(value) and not n.startswith("_")]
            raise ValueError(f"{self.path} has no function {name!r}; it has {', '.join(there) or 'none'}")
        return found


class _Source(SourceFileLoader):
    """A loader that runs the text that was hashed: it neither reads bytecode, which may be stale, nor writes any."""

    def __init__(self, name: str, path: str, text: bytes) -> None:
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the module."""
        return self.source_to_code(self.text, self.path)


def load_file(path: str) -> UserFile:
    """Run a user's file. Raises ValueError, in one line, if the file cannot be read or raises an exception."""
    try:
        text = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read the rewards in {path!r}: {getattr(error, 'strerror', None) or error}"
        ) from None
    sha256 = hashlib.sha256(text).hexdigest()
    loader = _Source(f"user_rewards_{sha256}", path, text)
    module = module_from_spec(spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # dataclasses look up their module there
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"cannot run the rewards in {path!r}: {one_line(error)}") from error
    return UserFile(path, module, sha256)
