"""Tokenizers of strangers: what they and their chat templates make of a text is computed in a process with limits.

A template is a program, and so is a tokenizer's chain of replacements: a few bytes of either can take all time and
memory, and may do so only for some question of the data. The process is `child.py`. The files of the bundled starter,
and copies of them in a `saved_model/`, need none.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from transformers import PreTrainedTokenizerBase

from grpo.model_card import CARD, STARTER
from grpo.runtime.console import printable
from tasks.base import Message

SECONDS, SECONDS_PER_MB = 5, 4  # of computing, to load a tokenizer, and more for each MB of its files or of a text
SECONDS_PER_TEXT = 2
MEMORY, MEMORY_PER_BYTE = 600 * 2**20, 12  # bytes, and more for each byte of the files
MOST_BYTES = 512 * 2**20  # of all files of a tokenizer; that of Gemma 3 has 33 MB
UNKNOWN_BYTES = 40 * 2**20  # taken for those of a Hub model, before they are downloaded
KEPT = 2  # processes that are kept for a next load
NOT_OF_TOKENIZER = {"config.json", "generation_config.json", CARD, "README.md"}
# a thread more would take address space, which is what is limited
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
ONE_THREAD |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Child:
    """The process of a tokenizer."""

    def __init__(self, source: str, local_files_only: bool, size: int) -> None:
        """Start it. `source` is a folder or a Hub model, whose tokenizer has files of `size` bytes."""
        self.memory = MEMORY + MEMORY_PER_BYTE * size
        self.seconds = SECONDS + SECONDS_PER_MB * size / 1e6
        self.arguments = [source, str(int(local_files_only)), str(self.memory), str(self.seconds)]
        self.ended = ""  # why it ended, if it has
        self.loaded = False
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("child.py")), *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **ONE_THREAD},
            text=True,
            encoding="utf-8",
            start_new_session=True,  # or Ctrl-C would end it before the step that the run finishes
        )

    def check(self) -> None:
        """Wait until the tokenizer is loaded and tried. Raises ValueError, in one line, if it cannot be."""
        if self.ended:
            raise ValueError(self.ended)
        if not self.loaded:
            self.loaded = self._read("tokenizer", self.seconds)

    def __del__(self) -> None:
        if hasattr(self, "process") and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()

    def ask(self, work: str, value: Any, **options: Any) -> Any:
        """Return what the tokenizer makes of a value; `work` is chat, encode or decode.

        Raises ValueError, in one printable line, if it fails or reaches a limit.
        """
        self.check()
        what = "chat template or tokenizer" if work == "chat" else "tokenizer"
        request = {"work": work, "value": value, "options": options}
        line = json.dumps(request)
        seconds = SECONDS_PER_TEXT + SECONDS_PER_MB * len(line) / 1e6
        try:
            self.process.stdin.write(json.dumps(request | {"seconds": seconds}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `_read` says why
        return self._read(what, seconds)

    def _read(self, what: str, seconds: float) -> Any:
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            self.ended = f"the model's {what} {self._ending(self.process.wait(), seconds)}"
            raise ValueError(self.ended)
        found = json.loads(line)
        if "result" in found:
            return found["result"]
        if found["kind"] == "MemoryError":
            raise ValueError(f"the model's {what} {self._ending(0, seconds)}")
        kind, reason = found["kind"], printable(" ".join(found["error"].split()))[:300]
        refused = kind in ("TemplateError", "TemplateSyntaxError", "UndefinedError", "SecurityError")
        if refused:
            raise ValueError(f"the model's chat template refuses the prompt: {reason}")
        raise ValueError(f"the model's {what} fails: {kind}{': ' * bool(reason)}{reason}")

    def _ending(self, status: int, seconds: float) -> str:
        """Return why the process ended."""
        if status == -getattr(signal, "SIGPROF", 0):
            return f"takes more than {seconds:.2g} s for one text, so it was stopped"
        return f"needs more than {self.memory / 2**20:.0f} MB of memory, or crashes, so it was stopped"


class SandboxedTokenizer:
    """A tokenizer that works on texts in a process with limits; everything else is that of `tokenizer` itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, child: Child) -> None:
        """`child` has the same tokenizer."""
        vars(self).update(_tokenizer=tokenizer, _child=child)

    def __getattr__(self, name: str) -> Any:
        if "_tokenizer" not in vars(self):  # of a copy that is being made
            raise AttributeError(name)
        return getattr(vars(self)["_tokenizer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tokenizer, name, value)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """Return the `input_ids` of a text. Raises ValueError, in one line, at a limit."""
        return self._child.ask("encode", text, **options)

    def apply_chat_template(self, chat: Sequence[Message], **options: Any) -> Any:
        """Render a chat as a text, or as `input_ids`. Raises ValueError, in one line, at a limit."""
        return self._child.ask("chat", list(chat), chat_template=self.get_chat_template(), **options)

    def batch_decode(self, rows: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """Return the text of each row of token ids. Raises ValueError, in one line, at a limit."""
        return self._child.ask("decode", [list(map(int, row)) for row in rows], **options)


# the children that are in use, by content, and some to use again; by process, for a fork must leave them alone
_children: dict[int, WeakValueDictionary[str, Child]] = {}
_latest: dict[int, deque[Child]] = {}


def child_of(source: str, local_files_only: bool = True) -> Child | None:
    """Start the process of a tokenizer, or return that of an earlier load; None if its files are the starter's own.

    It has to be checked before the tokenizer is loaded elsewhere. Raises ValueError if there are too many files.
    """
    folder = Path(source)
    files = _files(folder) if os.path.isdir(source) else []
    if files and _are_the_starters(files) and not (folder / "additional_chat_templates").exists():
        return None
    size = sum(path.stat().st_size for path in files)
    if size > MOST_BYTES:
        raise ValueError(f"the tokenizer's files have {size / 2**20:,.0f} MB, more than {MOST_BYTES / 2**20:.0f}")
    key = _digest([*files, folder / "config.json"]) if files else source
    children = _children.setdefault(os.getpid(), WeakValueDictionary())
    child = children.get(key)
    if child is None or child.ended:
        child = Child(source, local_files_only, size or UNKNOWN_BYTES)
        children[key] = child
        _latest.setdefault(os.getpid(), deque(maxlen=KEPT)).append(child)
    return child


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{path.name}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    """Return what a tokenizer may read in a folder."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix != ".safetensors" and path.name not in NOT_OF_TOKENIZER
    ]


def _are_the_starters(files: Sequence[Path]) -> bool:
    own = {path.name: path for path in _files(STARTER)}
    names = {path.name for path in files}
    return names == set(own) and all(
        path.stat().st_size == own[path.name].stat().st_size and path.read_bytes() == own[path.name].read_bytes()
        for path in files
    )
