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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo.config import TrainConfig
from grpo.files import fsync
from grpo.forgetting import are_answers
from grpo.metrics import is_count, is_entry, is_evaluation, is_finding, is_list_of
from grpo.sharding import like

FOLDER = "checkpoints"
KEPT = 2
PASSES = ("sample", "update")  # what has a limit of rows
FORMAT = 1
PAYLOAD = ("policy.safetensors", "optimizer.safetensors", "metrics.json", "state.json")
REFERENCE = "reference.safetensors"
MANIFEST = "manifest.json"
BLOCK = 2**20
WAYS_ON = "--fresh moves the run to earlier_runs/ and starts over, --output-dir NEW trains elsewhere"


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the rest of a run depends on, after `step` steps."""

    step: int
    policy: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    metrics: Mapping[str, Any]
    state: Mapping[str, Any]
    reference: Mapping[str, Tensor] | None = None


class NotForUs(ValueError):
    """A checkpoint that nothing is wrong with: of another format, or without permission to read it."""


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
    """The newest checkpoint that verifies, and what is wrong with those that do not.

    A damaged one is set aside under its name with `.damaged`, never deleted. Raises NotForUs, and touches nothing,
    where the newest is sound but cannot be used here.
    """
    parent, problems = folder / FOLDER, []
    names = sorted((p.name for p in parent.glob("step-????????") if p.is_dir()), reverse=True)
    for name in names:
        try:
            return read_checkpoint(parent / name), problems
        except NotForUs:
            raise
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
        if not isinstance(state, dict) or not isinstance(metrics, dict):
            raise ValueError("it was not written by this program")
        if state.get("format") != FORMAT:
            raise NotForUs(f"it has format {state.get('format')}, this version reads {FORMAT}")
        if not is_count(state.get("step")) or path.name != f"step-{state['step']:08d}":
            raise ValueError("it is not of the step in its name")
        policy, optimizer = load_file(path / PAYLOAD[0]), load_file(path / PAYLOAD[1])
        reference = load_file(path / REFERENCE) if (path / REFERENCE).exists() else None
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        said = f"checkpoint {path.name} cannot be used: {reason}"
        if isinstance(error, NotForUs | PermissionError):
            raise NotForUs(f"{said}; {WAYS_ON}") from None
        raise ValueError(said) from None
    return Checkpoint(state["step"], policy, optimizer, metrics, state, reference)


def see_that_it_is_ours(checkpoint: Checkpoint) -> None:
    """Raise ValueError where state or metrics of a checkpoint are not of a run: its sums vouch for bytes only."""
    state, metrics, step = checkpoint.state, checkpoint.metrics, checkpoint.step
    limits = state.get("limits")  # the first version had none
    known = {
        "config": isinstance(state.get("config"), dict),
        "threads": is_count(state.get("threads")),
        "before": state.get("before") == {} or is_evaluation(state.get("before")),
        "best": state.get("best", ...) is None or is_evaluation(state.get("best")),
        "skipped_in_a_row": is_count(state.get("skipped_in_a_row")),
        "limits": limits is None or (isinstance(limits, dict) and all(is_count(limits.get(n)) for n in PASSES)),
        "evaluate_limit": is_count(state.get("evaluate_limit", 1)),
        "start": state.get("start") is None or are_answers(state["start"]),
        "beta": is_entry({"step": step, "beta": state.get("beta", 0.0)}),
        "steps": is_list_of(is_entry, metrics.get("steps"))
        and [row["step"] for row in metrics["steps"]] == list(range(1, step + 1)),
        "evals": is_list_of(is_evaluation, metrics.get("evals")),
        "findings": is_list_of(is_finding, metrics.get("findings")),
    }
    if wrong := [name for name, right in known.items() if not right]:
        raise _unfit(checkpoint, f"its {', '.join(wrong)} cannot be")


def see_that_it_fits(checkpoint: Checkpoint, parameters: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the tensors of a checkpoint are not of a model with these parameters."""
    expected = {name: (p.shape, p.dtype) for name, p in parameters.items()}
    for kind, tensors in (("weights", checkpoint.policy), ("reference", checkpoint.reference)):
        if tensors is not None and {name: (t.shape, t.dtype) for name, t in tensors.items()} != expected:
            raise _unfit(checkpoint, f"its {kind} cannot be of this model")
    shapes = [p.shape for p in parameters.values()]
    found = {key: tensor.shape for key, tensor in checkpoint.optimizer.items()}
    touched = [i for i in range(len(shapes)) if f"{i}.step" in found]  # one without a gradient has no moments
    moments = {f"{i}.{name}": shapes[i] for i in touched for name in ("exp_avg", "exp_avg_sq")}
    if found != moments | {f"{i}.step": torch.Size() for i in touched}:
        raise _unfit(checkpoint, "its optimizer state cannot be of this model")


def _unfit(checkpoint: Checkpoint, reason: str) -> ValueError:
    return ValueError(f"checkpoint step-{checkpoint.step:08d} cannot be used: {reason}; {WAYS_ON}")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat named tensors, which safetensors can hold."""
    return {
        f"{index}.{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], parameters: Sequence[Tensor]
) -> None:
    """Put back what `optimizer_tensors` took, for these parameters; hyperparameters stay those of the optimizer."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        value = value if name == "step" else like(value, parameters[int(index)])
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
