"""What the processes of one run must have in common: settings, files, this program, and the output folder.

They are compared before anything is computed or written: processes that differ would train together in silence, or
wait for each other.
"""

import hashlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from tasks.base import Task
from tasks.registry import make_task

ROOT = Path(__file__).parents[2]
SHARED = ".grpo.shared"  # there for a moment, while the others look for it
LOCK_PATIENCE = 10.0  # seconds: a predecessor that was killed may take a moment to end
SIGHT_PATIENCE = 5.0  # seconds: a network disk may show a new file late
SHOWN = 5  # differences


def agree(settle: Callable[[], TrainConfig], ranks: Ranks) -> tuple[TrainConfig, Task, Meeting]:
    """Settle the settings of this process, make the task, meet the others, and return all three if they agree.

    Raises ValueError, the same on all processes, if they differ, or if one has a mistake or does not come.
    """
    config, task, statement = None, None, {"host": socket.gethostname()}
    try:
        config = settle()
        device = ranks.own_device(choose_device(config.device))
        task = make_task(config)
        statement |= {"device": device.type, **_content(config, task)}
    except (ValueError, OSError) as error:
        statement["error"] = str(error)
    meeting = meet(statement, ranks)
    _refuse_errors(meeting.statements)
    _refuse_differences(meeting.statements)
    return config, task, meeting


@contextmanager
def claim_shared_folder(config: TrainConfig, meeting: Meeting, ranks: Ranks, fresh: bool) -> Iterator[None]:
    """Lock the output folder on rank 0, as `claim_folder` does, and check that all processes see it.

    Raises ValueError on all processes otherwise.
    """
    folder, error, token = Path(config.output_dir), "", uuid4().hex
    with ExitStack() as held:
        if ranks.is_main:
            try:
                held.enter_context(claim_folder(config, fresh, LOCK_PATIENCE))
                (folder / SHARED).write_text(token, encoding="utf-8")
            except (ValueError, OSError) as problem:
                error = str(problem)
        error, token, place = ranks.from_main((error, token, str(folder.resolve())))
        if error:
            raise ValueError(error)
        sees = ranks.gather(ranks.is_main or _has_token(folder / SHARED, token))
        if ranks.is_main:
            (folder / SHARED).unlink(missing_ok=True)
        if blind := [rank for rank, seen in enumerate(sees) if not seen]:
            raise ValueError(
                f"--output-dir {printable(place)} of {_named([0], meeting.statements)} is not what "
                f"{_named(blind, meeting.statements)} has there; give a folder that all machines share"
            )
        yield


def _has_token(path: Path, token: str) -> bool:
    end = time.monotonic() + SIGHT_PATIENCE
    while True:
        try:
            if path.read_text(encoding="utf-8") == token:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _content(config: TrainConfig, task: Task) -> dict[str, Any]:
    """Return what decides the result of a run: value by name, in three groups."""
    # reward files are only read here: to run one may load a model
    paths = [spec.rpartition("=")[0].rpartition(":")[0] for spec in config.reward]
    files = {**task.files, **{path: _sha256(path) for path in paths if path}}
    settings = config.to_dict()
    del settings["output_dir"]  # another machine may have the folder in another place
    program = {f"the version of {name}": version(name) for name in ("torch", "transformers")}
    for path in (
        ROOT / "train_grpo.py",
        *sorted((ROOT / "grpo").rglob("*.py")),
        *sorted((ROOT / "tasks").rglob("*.py")),
    ):
        program[str(path.relative_to(ROOT))] = _sha256(path)
    return {"settings": settings, "files": files, "program": program}


def _sha256(path: str | Path) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _refuse_errors(statements: Sequence[Mapping[str, Any]]) -> None:
    errors = [statement.get("error") for statement in statements]
    wrong = [rank for rank, error in enumerate(errors) if error is not None]
    if len(wrong) == len(errors) and len(set(errors)) == 1:
        raise ValueError(errors[0])
    if wrong:
        same = [rank for rank in wrong if errors[rank] == errors[wrong[0]]]
        raise ValueError(f"{_named(same, statements)}: {errors[wrong[0]]}")


def _refuse_differences(statements: Sequence[Mapping[str, Any]]) -> None:
    seen = [_by_label(statement) for statement in statements]
    found = []
    for label in dict.fromkeys(label for one in seen for label in one):
        values = [one.get(label, "missing") for one in seen]
        if len(set(values)) > 1:
            ranks = {value: [r for r, other in enumerate(values) if other == value] for value in values}
            shown = (f"{printable(value)} on {_named(some, statements)}" for value, some in ranks.items())
            found.append(f"{printable(label)} is {' and '.join(shown)}")
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(
            f"the processes differ: {'; '.join(found[:SHOWN])}{more}. Start all with the same command, files and "
            "version of this program"
        )


def _by_label(statement: Mapping[str, Any]) -> dict[str, str]:
    """Return the values of a statement as they are compared and shown."""
    settings = {f"--{name.replace('_', '-')}": value for name, value in statement["settings"].items()}
    hashes = {**statement["files"], **statement["program"]}
    return {
        **{name: " ".join(map(str, v)) if isinstance(v, list) else str(v) for name, v in settings.items()},
        "the device": statement["device"],
        **{name: f"SHA-256 {value[:12]}" if len(value) == 64 else value for name, value in hashes.items()},
    }


def _named(ranks: Sequence[int], statements: Sequence[Mapping[str, Any]]) -> str:
    """Return processes in words, with their machines."""
    hosts = dict.fromkeys(printable(statements[rank]["host"]) for rank in ranks)
    return f"process {', '.join(map(str, ranks))} ({', '.join(hosts)})"
