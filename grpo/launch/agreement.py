"""Check that the processes of one run have the same settings, files, program and output folder.

This happens before anything is computed or written: processes that differ would otherwise train together without a
message, or wait for each other forever.
"""

import hashlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from grpo.config import TrainConfig
from grpo.launch.rendezvous import Meeting, meet
from grpo.launch.run_folder import claim_folder
from grpo.runtime.console import printable
from grpo.runtime.device import choose_device
from grpo.runtime.ranks import Ranks
from grpo.setting import as_typed
from tasks.base import Task
from tasks.registry import make_task

ROOT = Path(__file__).parents[2]
TOKEN_FILE = ".grpo.shared"  # rank 0 writes this file, and the other processes look for it
LOCK_PATIENCE = 10.0  # seconds to wait for the lock: after a restart, the previous process may take a moment to exit
SIGHT_PATIENCE = 5.0  # seconds to look for the token file: a network disk may show a new file late
MAX_DIFFERENCES_SHOWN = 5


def agree(settle: Callable[[], TrainConfig], ranks: Ranks) -> tuple[TrainConfig, Task, Meeting]:
    """Return the settings, the task, and the meeting with the other processes, once all processes agree.

    `settle` returns the settings of this process. Raises the same ValueError on all processes if they differ, if a
    process reports an error, or if a process does not join in time.
    """
    statement = {"host": socket.gethostname()}
    try:
        config = settle()
        device = ranks.own_device(choose_device(config.device))
        task = make_task(config)
        statement["content"] = _content(config, task, device.type)
    except (ValueError, OSError) as error:
        statement["error"] = str(error)
    meeting = meet(statement, ranks)
    _refuse_errors(meeting.statements)
    _refuse_differences(meeting.statements)
    return config, task, meeting


@contextmanager
def claim_shared_folder(config: TrainConfig, meeting: Meeting, ranks: Ranks, fresh: bool) -> Iterator[None]:
    """Lock the output folder on rank 0, as `claim_folder` does, and check that all processes see the same folder.

    Raises ValueError on all processes if the folder cannot be locked or is not shared.
    """
    folder = Path(config.output_dir)
    error = ""
    token = uuid4().hex
    with ExitStack() as stack:
        if ranks.is_main:
            try:
                stack.enter_context(claim_folder(config, fresh, LOCK_PATIENCE))
                (folder / TOKEN_FILE).write_text(token, encoding="utf-8")
            except (ValueError, OSError) as problem:
                error = str(problem)
        error, token, place = ranks.from_main((error, token, str(folder.resolve())))
        if error:
            raise ValueError(error)
        shared = ranks.gather(ranks.is_main or _has_token(folder / TOKEN_FILE, token))
        if ranks.is_main:
            (folder / TOKEN_FILE).unlink(missing_ok=True)
        if apart := [rank for rank, is_shared in enumerate(shared) if not is_shared]:
            raise ValueError(
                f"--output-dir {printable(place)} of {_processes([0], meeting.statements)} is not the folder that "
                f"{_processes(apart, meeting.statements)} sees; give a folder that all machines share"
            )
        yield


def _has_token(path: Path, token: str) -> bool:
    """Wait up to `SIGHT_PATIENCE` seconds until the file holds the token; return whether it does."""
    end = time.monotonic() + SIGHT_PATIENCE
    while time.monotonic() < end:
        with suppress(OSError):
            if path.read_text(encoding="utf-8") == token:
                return True
        time.sleep(0.1)
    return False


def _content(config: TrainConfig, task: Task, device: str) -> dict[str, str]:
    """Return what determines the result of a run, as texts. The keys are the labels that error messages show."""
    settings = config.to_dict()
    del settings["output_dir"]  # the path of the shared folder may differ between machines
    # A reward file is read but not run here, because running it may load a model.
    paths = [spec.rpartition("=")[0].rpartition(":")[0] for spec in config.reward]
    hashes = {**task.files, **{path: _sha256(path) for path in paths if path}}
    hashes |= {f"the version of {name}": version(name) for name in ("torch", "transformers")}
    for path in (ROOT / "train_grpo.py", *sorted(ROOT.glob("grpo/**/*.py")), *sorted(ROOT.glob("tasks/**/*.py"))):
        hashes[str(path.relative_to(ROOT))] = _sha256(path)
    return {
        **{as_typed(name): " ".join(v) if isinstance(v, list) else str(v) for name, v in settings.items()},
        "the device": device,
        **{name: f"SHA-256 {value[:12]}" if len(value) == 64 else value for name, value in hashes.items()},
    }


def _sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raises ValueError if the file cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _refuse_errors(statements: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError with the first error that a process reports; name the processes unless all report it."""
    errors = {rank: statement["error"] for rank, statement in enumerate(statements) if "error" in statement}
    if errors:
        first = next(iter(errors.values()))
        ranks = [rank for rank, error in errors.items() if error == first]
        raise ValueError(first if len(ranks) == len(statements) else f"{_processes(ranks, statements)}: {first}")


def _refuse_differences(statements: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if the statements differ; the message shows the first differences."""
    contents = [statement["content"] for statement in statements]
    differences = []
    for label in dict.fromkeys(label for content in contents for label in content):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, content in enumerate(contents):
            ranks_by_value.setdefault(content.get(label, "missing"), []).append(rank)
        if len(ranks_by_value) > 1:
            values = (f"{printable(value)} on {_processes(r, statements)}" for value, r in ranks_by_value.items())
            differences.append(f"{printable(label)} is {' and '.join(values)}")
    if differences:
        left_out = len(differences) - MAX_DIFFERENCES_SHOWN
        raise ValueError(
            f"the processes differ: {'; '.join(differences[:MAX_DIFFERENCES_SHOWN])}"
            f"{f'; and {left_out} more' if left_out > 0 else ''}. Start all processes with the same command, files "
            "and version of this program"
        )


def _processes(ranks: Sequence[int], statements: Sequence[Mapping[str, Any]]) -> str:
    """Return a text that names processes and their machines: "process 1, 2 (host)"."""
    hosts = dict.fromkeys(printable(statements[rank]["host"]) for rank in ranks)
    return f"process {', '.join(map(str, ranks))} ({', '.join(hosts)})"
