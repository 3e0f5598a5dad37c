"""Checkpoint files: whole or absent, verified before they are used, the last two kept.

    checkpoints/step-00000050/
        policy.safetensors      float32 weights
        optimizer.safetensors   AdamW's moments, `<parameter>.<name>`
        reference.safetensors   only if the reference is not the model that the run started from
        metrics.json            the metrics up to this step
        state.json              step, settings, best so far, …
        manifest.json           SHA-256 and size of each of the others

Written to a temporary folder, every file fsynced, renamed into place, the parent fsynced. safetensors and JSON
only. No random state either: problems and token noise are functions of seed and step.
"""

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
KEPT = 2
FORMAT = 2  # another number also where problems are split or graded otherwise: such a run cannot continue
PAYLOAD = ("policy.safetensors", "optimizer.safetensors", "metrics.json", "state.json")
REFERENCE = "reference.safetensors"
MANIFEST = "manifest.json"
BLOCK = 2**20
RECOVERY_HINT = "--fresh moves the run to earlier_runs/ and starts over, --output-dir NEW trains elsewhere"


@dataclass(frozen=True)
class Checkpoint:
    """All that the rest of a run depends on, after `step` steps."""

    step: int
    policy: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    metrics: Mapping[str, Any]
    state: Mapping[str, Any]
    reference: Mapping[str, Tensor] | None = None


class IncompatibleCheckpoint(ValueError):
    """A sound checkpoint that cannot be used here: of another format, or without permission to read it."""


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint of the run in `folder`, then remove all but the last two; OSError leaves those intact.

    A sound checkpoint of the same step is kept instead: a run is a function of its settings. It is replaced if the
    step has been evaluated since.
    """
    parent = folder / FOLDER
    parent.mkdir(exist_ok=True)
    final = parent / f"step-{checkpoint.step:08d}"
    if final.exists():
        if not _is_sound(final):
            _set_aside(final)
        elif not checkpoint.step or _evaluations(final) >= len(checkpoint.metrics.get("evals", ())):
            return final
    temporary = parent / f".{final.name}.new"
    shutil.rmtree(temporary, ignore_errors=True)
    _make_room(parent, final, checkpoint)
    temporary.mkdir()
    try:
        save_file(dict(checkpoint.policy), temporary / PAYLOAD[0])
        save_file(dict(checkpoint.optimizer), temporary / PAYLOAD[1])
        _write_json(temporary / PAYLOAD[2], checkpoint.metrics)
        _write_json(temporary / PAYLOAD[3], {"format": FORMAT, "step": checkpoint.step, **checkpoint.state})
        if checkpoint.reference is not None:
            save_file(dict(checkpoint.reference), temporary / REFERENCE)
        (temporary / MANIFEST).write_bytes(_manifest(temporary))
        for path in sorted(temporary.iterdir()):
            fsync(path)
        fsync(temporary)
        if final.exists():  # a kill between the two leaves the checkpoint before it
            final.rename(parent / f".{final.name}.old")
        temporary.rename(final)
        fsync(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OSError(f"cannot write checkpoint {final}: {reason}") from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _prune(parent)
    return final


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that verifies, and what is wrong with newer ones.

    A damaged one is set aside under its name with `.damaged`, never deleted. Raises IncompatibleCheckpoint, and
    touches nothing, if the newest is sound but cannot be used here.
    """
    parent, problems = folder / FOLDER, []
    names = sorted((p.name for p in parent.glob("step-????????") if p.is_dir()), reverse=True)
    for name in names:
        try:
            return read_checkpoint(parent / name), problems
        except IncompatibleCheckpoint:
            raise
        except ValueError as error:
            problems.append(f"{error}; set aside as {_set_aside(parent / name).name}")
    return None, problems


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify every byte of a checkpoint and load it. Raises ValueError, in one line, if it is not as written."""
    try:
        if not _is_sound(path):
            raise ValueError("its content does not match its SHA-256 sums")
        state = json.loads((path / PAYLOAD[3]).read_bytes())
        metrics = json.loads((path / PAYLOAD[2]).read_bytes())
        if not isinstance(state, dict) or not isinstance(metrics, dict):
            raise ValueError("it was not written by this program")
        if state.get("format") != FORMAT:
            raise IncompatibleCheckpoint(f"it has format {state.get('format')}, this version continues {FORMAT}")
        if not is_count(state.get("step")) or path.name != f"step-{state['step']:08d}":
            raise ValueError("it is not of the step in its name")
        policy, optimizer = load_file(path / PAYLOAD[0]), load_file(path / PAYLOAD[1])
        reference = load_file(path / REFERENCE) if (path / REFERENCE).exists() else None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        said = f"checkpoint {path.name} cannot be used: {reason}"
        if isinstance(error, IncompatibleCheckpoint | PermissionError):
            raise IncompatibleCheckpoint(f"{said}; {RECOVERY_HINT}") from None
        raise ValueError(said) from None
    return Checkpoint(state["step"], policy, optimizer, metrics, state, reference)


def _manifest(path: Path) -> bytes:
    """Return the manifest of the files in a folder, in one spelling, so that bytes can be compared."""
    names = (*PAYLOAD, REFERENCE) if (path / REFERENCE).exists() else PAYLOAD
    files = {name: {"bytes": (path / name).stat().st_size, "sha256": _sha256(path / name)} for name in names}
    return (json.dumps(files, indent=2, sort_keys=True) + "\n").encode()


def _is_sound(path: Path) -> bool:
    """Return whether the files of a checkpoint have the sizes and sums of its manifest; OSError if one is missing."""
    return (path / MANIFEST).read_bytes() == _manifest(path)


def _make_room(parent: Path, final: Path, checkpoint: Checkpoint) -> None:
    """Remove all checkpoints but the last if the disk has no room for another. Raises OSError if there is none."""
    tensors = [*checkpoint.policy.values(), *checkpoint.optimizer.values(), *(checkpoint.reference or {}).values()]
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if shutil.disk_usage(parent).free < needed:
        for name in sorted(path.name for path in parent.glob("step-????????") if path.is_dir())[:-1]:
            shutil.rmtree(parent / name, ignore_errors=True)
    check_room(parent, needed, f"checkpoint {final}")


def _evaluations(path: Path) -> int:
    """Return how many evaluations a sound checkpoint knows of."""
    return len(json.loads((path / PAYLOAD[2]).read_bytes()).get("evals", ()))


def _set_aside(path: Path) -> Path:
    aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.damaged-{n}")).exists())
    return path.rename(aside)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, allow_nan=False) + "\n", encoding="utf-8")


def _prune(parent: Path) -> None:
    names = sorted(p.name for p in parent.glob("step-????????") if p.is_dir())
    stale = [parent / name for name in names[:-KEPT]] + list(parent.glob(".step-*"))
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
