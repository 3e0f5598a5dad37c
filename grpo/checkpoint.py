"""Checkpoints: whole or not there, verified before they are used, the last two kept.

    checkpoints/step-00000050/
        policy.safetensors      float32 weights
        optimizer.safetensors   AdamW's moments, `<parameter>.<name>`
        reference.safetensors   only where the reference is not the model that the run started from
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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo.config import TrainConfig
from grpo.files import fsync

FOLDER = "checkpoints"
KEPT = 2
FORMAT = 1
PAYLOAD = ("policy.safetensors", "optimizer.safetensors", "metrics.json", "state.json")
REFERENCE = "reference.safetensors"
MANIFEST = "manifest.json"
BLOCK = 2**20


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the rest of a run depends on, after `step` steps."""

    step: int
    policy: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    metrics: Mapping[str, Any]
    state: Mapping[str, Any]
    reference: Mapping[str, Tensor] | None = None


def refuse_another_run(folder: Path, checkpoint: Checkpoint, config: TrainConfig, files: Mapping[str, str]) -> None:
    """Raise ValueError where a launch with these settings and files (SHA-256 by path) is not of the same run."""
    ways_on = "to go on, --fresh to start over, or --output-dir NEW"
    if differences := config.differences(checkpoint.state["config"]):
        raise ValueError(
            f"{folder.resolve()} holds a run with other settings: {', '.join(differences)}; give the same {ways_on}"
        )
    earlier = checkpoint.state.get("files", {})
    if changed := [path for path, sha256 in files.items() if earlier.get(path, sha256) != sha256]:
        raise ValueError(
            f"{', '.join(changed)} changed since the run in {folder.resolve()} began; put it back {ways_on}"
        )


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint of the run in `folder`, then remove all but the last two; OSError leaves those intact.

    Where there is a sound one of this step already, that one is kept: a run is a function of its settings.
    """
    parent = folder / FOLDER
    parent.mkdir(exist_ok=True)
    final = parent / f"step-{checkpoint.step:08d}"
    if final.exists():
        if _is_sound(final):
            return final
        _set_aside(final)
    temporary = parent / f".{final.name}.new"
    shutil.rmtree(temporary, ignore_errors=True)
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
        temporary.rename(final)
        fsync(parent)
    except SafetensorError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write checkpoint {final}: {error}") from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _prune(parent)
    return final


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with those that do not.

    A damaged one is set aside under its name with `.damaged`, never deleted.
    """
    parent, problems = folder / FOLDER, []
    names = sorted((p.name for p in parent.glob("step-????????") if p.is_dir()), reverse=True)
    for name in names:
        try:
            return read_checkpoint(parent / name), problems
        except ValueError as error:
            problems.append(f"{error}; set aside as {_set_aside(parent / name).name}")
    return None, problems


def read_checkpoint(path: Path) -> Checkpoint:
    """Verify every byte of a checkpoint and load it; raises ValueError, in one line, where one is not as written."""
    try:
        if not _is_sound(path):
            raise ValueError("its content does not match its SHA-256 sums")
        state = json.loads((path / PAYLOAD[3]).read_bytes())
        metrics = json.loads((path / PAYLOAD[2]).read_bytes())
        if state.get("format") != FORMAT:
            raise ValueError(f"it has format {state.get('format')}, this version reads {FORMAT}")
        policy, optimizer = load_file(path / PAYLOAD[0]), load_file(path / PAYLOAD[1])
        reference = load_file(path / REFERENCE) if (path / REFERENCE).exists() else None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"checkpoint {path.name} cannot be used: {reason}") from None
    return Checkpoint(state["step"], policy, optimizer, metrics, state, reference)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat named tensors, which safetensors can hold."""
    return {
        f"{index}.{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took; hyperparameters stay those of the optimizer."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _manifest(path: Path) -> bytes:
    """The manifest that the files in a folder should have, in one spelling, so that bytes can be compared."""
    names = (*PAYLOAD, REFERENCE) if (path / REFERENCE).exists() else PAYLOAD
    files = {name: {"bytes": (path / name).stat().st_size, "sha256": _sha256(path / name)} for name in names}
    return (json.dumps(files, indent=2, sort_keys=True) + "\n").encode()


def _is_sound(path: Path) -> bool:
    """Whether the files of a checkpoint have the sizes and sums of its manifest; OSError where one is missing."""
    return (path / MANIFEST).read_bytes() == _manifest(path)


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
