"""Write checkpoints, which are never half written, and verify them before use. README.md lists their files."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo.runtime.atomic_io import check_room, fsync
from grpo.runtime.checks import is_count

FOLDER = "checkpoints"
KEPT = 2  # Only the last two checkpoints are kept.
# Raise the format when the files change, and also when problems are split or graded differently, because an older run
# cannot continue then.
FORMAT = 2
POLICY = "policy.safetensors"
OPTIMIZER = "optimizer.safetensors"
METRICS = "metrics.json"
STATE = "state.json"
PAYLOAD = (POLICY, OPTIMIZER, METRICS, STATE)
REFERENCE = "reference.safetensors"
MANIFEST = "manifest.json"
RECOVERY_HINT = "--fresh moves the run to earlier_runs/ and starts over, --output-dir NEW trains elsewhere"


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to continue after `step` steps."""

    step: int
    policy: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    metrics: Mapping[str, Any]
    state: Mapping[str, Any]
    reference: Mapping[str, Tensor] | None = None


class IncompatibleCheckpoint(ValueError):
    """Raised if a checkpoint is intact but cannot be used: it has another format, or reading it is not permitted."""


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint of the run in `folder`, then remove all but the last two; return its folder.

    An intact checkpoint of the same step is kept, because equal settings give equal checkpoints. It is replaced only
    if the step has been evaluated since. If writing fails, raises OSError and keeps the last earlier checkpoint.
    """
    parent = folder / FOLDER
    parent.mkdir(exist_ok=True)
    final = parent / f"step-{checkpoint.step:08d}"
    if final.exists():
        if not _is_whole(final):
            _set_aside(final)
        elif not checkpoint.step or _evaluations(final) >= len(checkpoint.metrics.get("evals", ())):
            return final
    temporary = parent / f".{final.name}.new"
    shutil.rmtree(temporary, ignore_errors=True)
    _make_room(parent, final, checkpoint)
    temporary.mkdir()
    try:
        save_file(dict(checkpoint.policy), temporary / POLICY)
        save_file(dict(checkpoint.optimizer), temporary / OPTIMIZER)
        _write_json(temporary / METRICS, checkpoint.metrics)
        _write_json(temporary / STATE, {"format": FORMAT, "step": checkpoint.step, **checkpoint.state})
        if checkpoint.reference is not None:
            save_file(dict(checkpoint.reference), temporary / REFERENCE)
        (temporary / MANIFEST).write_bytes(_manifest(temporary))
        for path in sorted(temporary.iterdir()):
            fsync(path)
        fsync(temporary)
        if final.exists():  # If the process is killed between the two renames, the run has an earlier checkpoint.
            final.rename(parent / f".{final.name}.old")
        temporary.rename(final)
        fsync(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write checkpoint {final}: {_reason(error)}") from None
    for path in [*_checkpoints(parent)[:-KEPT], *parent.glob(".step-*")]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest intact checkpoint, None if there is none, and a line about each damaged newer checkpoint.

    A damaged checkpoint is renamed to `<name>.damaged-<n>`, never deleted. Raises IncompatibleCheckpoint
    if a checkpoint is intact but cannot be used; older checkpoints are then left as they are.
    """
    problems = []
    for path in reversed(_checkpoints(folder / FOLDER)):
        try:
            return read_checkpoint(path), problems
        except IncompatibleCheckpoint:
            raise
        except ValueError as error:
            problems.append(f"{error}; set aside as {_set_aside(path).name}")
    return None, problems


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify every byte of a checkpoint and load it. Raises ValueError, with a one-line message, if it is damaged."""
    try:
        if not _is_whole(path):
            raise ValueError("its content does not match its SHA-256 sums")
        state = json.loads((path / STATE).read_bytes())
        metrics = json.loads((path / METRICS).read_bytes())
        if not isinstance(state, dict) or not isinstance(metrics, dict):
            raise ValueError("it was not written by this program")
        if state.get("format") != FORMAT:
            raise IncompatibleCheckpoint(f"it has format {state.get('format')!a}, this version reads format {FORMAT}")
        if not is_count(state.get("step")) or path.name != f"step-{state['step']:08d}":
            raise ValueError("its step differs from the step in its name")
        policy, optimizer = load_file(path / POLICY), load_file(path / OPTIMIZER)
        reference = load_file(path / REFERENCE) if (path / REFERENCE).exists() else None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        message = f"checkpoint {path.name} cannot be used: {_reason(error)}"
        if isinstance(error, IncompatibleCheckpoint | PermissionError):
            raise IncompatibleCheckpoint(f"{message}; {RECOVERY_HINT}") from None
        raise ValueError(message) from None
    return Checkpoint(state["step"], policy, optimizer, metrics, state, reference)


def _checkpoints(parent: Path) -> list[Path]:
    """Return the folders of checkpoints, the newest last."""
    return sorted(path for path in parent.glob("step-????????") if path.is_dir())


def _reason(error: Exception) -> str:
    """Return the operating system's text for an error, without the path; else the error's own text."""
    return str(getattr(error, "strerror", None) or error)


def _manifest(path: Path) -> bytes:
    """Return the manifest of the files in a folder; equal files give equal bytes."""
    names = (*PAYLOAD, REFERENCE) if (path / REFERENCE).exists() else PAYLOAD
    files = {name: {"bytes": (path / name).stat().st_size, "sha256": _sha256(path / name)} for name in names}
    return (json.dumps(files, indent=2, sort_keys=True) + "\n").encode()


def _is_whole(path: Path) -> bool:
    """Return whether all files match the sizes and SHA-256 in the manifest. Raises OSError if a file is missing."""
    return (path / MANIFEST).read_bytes() == _manifest(path)


def _evaluations(path: Path) -> int:
    """Return the number of evaluations in an intact checkpoint."""
    return len(json.loads((path / METRICS).read_bytes()).get("evals", ()))


def _make_room(parent: Path, final: Path, checkpoint: Checkpoint) -> None:
    """Remove all checkpoints but the last if the disk is too full. Raises OSError if it is still too full."""
    tensors = [*checkpoint.policy.values(), *checkpoint.optimizer.values(), *(checkpoint.reference or {}).values()]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if shutil.disk_usage(parent).free < needed:
        for path in _checkpoints(parent)[:-1]:
            shutil.rmtree(path, ignore_errors=True)
    check_room(parent, needed, f"checkpoint {final}")


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint; return its new path."""
    aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.damaged-{n}")).exists())
    return path.rename(aside)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, allow_nan=False) + "\n", encoding="utf-8")
