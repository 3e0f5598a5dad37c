"""The metrics file of a run: always whole, readable while it grows."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.record.schema import SCHEMA_VERSION, check_record, is_entry, is_evaluation, is_finding, is_outlook
from grpo.runtime.atomic_io import write_atomic
from grpo.runtime.checks import check_entries, is_list_of

FILE_NAME = "grpo_metrics.json"
WRITE_EVERY = 5.0  # seconds, between evaluations


class Metrics:
    """The record of a run: settings, environment, an entry for each step and each evaluation, findings."""

    def __init__(self, folder: Path | None, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Without a folder, write nothing: rank 0 does."""
        self.path = folder / FILE_NAME if folder else None
        self.record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "config": config,
            "environment": environment,
            "before_sft": None,  # the test of the model before supervised steps, if there are any
            "sft": [],  # an entry for each supervised step
            "outlook": None,  # what a look before the first step found
            "steps": [],
            "evals": [],
            "findings": [],
            "finished": None,  # once it has: after which step, and why
        }
        self._written = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the outlook, and steps, evaluations and findings so far."""
        names = ("before_sft", "sft", "outlook", "steps", "evals", "findings")
        return {name: self.record[name] for name in names}

    def load_state_dict(self, state: Mapping[str, Any], step: int, sft_step: int = 0) -> None:
        """Restore what `state_dict` returned after so many steps of each kind.

        Raises ValueError if that cannot be its value.
        """
        state = {"before_sft": None, "sft": [], "outlook": None, **state}  # earlier versions had none
        steps, sft = state.get("steps"), state["sft"]
        check_entries(
            {
                "before_sft": state["before_sft"] is None or is_evaluation(state["before_sft"]),
                "sft": is_list_of(is_entry, sft) and [row["step"] for row in sft] == list(range(1, sft_step + 1)),
                "outlook": state["outlook"] is None or is_outlook(state["outlook"]),
                "steps": is_list_of(is_entry, steps) and [row["step"] for row in steps] == list(range(1, step + 1)),
                "evals": is_list_of(is_evaluation, state.get("evals")),
                "findings": is_list_of(is_finding, state.get("findings")),
            }
        )
        self.record |= {name: state[name] for name in self.state_dict()}

    def add_step(self, entry: dict[str, Any], kind: str = "steps") -> None:
        """Append a step, or one of kind "sft"; the file follows within a few seconds."""
        self.record[kind].append(_finite(entry))
        if time.monotonic() - self._written > WRITE_EVERY:
            self.write()

    def add_time(self, phase: str, seconds: float) -> None:
        """Add seconds to a phase of the last step; before the first step, to none."""
        if self.record["steps"]:
            row = self.record["steps"][-1]
            row[f"time/{phase}"] = row.get(f"time/{phase}", 0.0) + seconds

    def add_eval(self, entry: dict[str, Any]) -> None:
        """Append an evaluation and write the file."""
        self.record["evals"].append(_finite(entry))
        self.write()

    def write(self) -> None:
        """Replace the file by a whole new one."""
        if self.path is None:
            return
        text = json.dumps(self.record, allow_nan=False, separators=(",", ":")) + "\n"
        write_atomic(self.path, text.encode(), durable=True)
        self._written = time.monotonic()


def _finite(value: Any) -> Any:
    """Replace every number that is not finite by None: JSON has no such number."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def load_metrics(path: Path) -> dict[str, Any]:
    """Read a metrics file, given its path or the folder of the run.

    Raises ValueError, in one line that says what to do, if it is missing, empty, cut short or of another program.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no {path}; python train_grpo.py writes one") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text, so not a metrics file of this program") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; train again, or give another file")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); train again, or give another file") from None
    check_record(record, path)
    return record


def ended_with(folder: Path, step: int, metrics: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of the run in a folder if it ended after `step` with these metrics, else None."""
    try:
        written = load_metrics(folder)
    except ValueError:
        return None  # damaged or missing; the checkpoint has all of it but the ending
    same = same_rows(written["steps"], metrics["steps"]) and same_rows(written["evals"][:-1], metrics["evals"])
    return written if same and (written.get("finished") or {}).get("step") == step else None


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """Return an entry without its seconds, which differ between equal runs."""
    return {name: value for name, value in row.items() if not name.startswith("time/")}


def same_rows(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Return whether entries are equal, seconds aside."""
    return list(map(without_times, some)) == list(map(without_times, others))
