"""Write and read the metrics file of a run. It is never half written, so it can be read during the run."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.record.schema import FORMATS, SCHEMA_VERSION, check_record, is_evaluation
from grpo.runtime.atomic_io import write_atomic
from grpo.runtime.checks import check_entries, is_list_of

FILE_NAME = "grpo_metrics.json"
WRITE_EVERY = 5.0  # seconds between writes during steps; an evaluation is written at once


class Metrics:
    """The record of a run: settings, environment, an entry for each step and each evaluation, findings."""

    def __init__(self, folder: Path | None, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Keep the record in memory, and write it to `folder`, which is None for all ranks but rank 0."""
        self.path = folder / FILE_NAME if folder else None
        self.record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "config": config,
            "environment": environment,
            "before_sft": None,  # the test before supervised steps, if the run has them
            "sft": [],  # an entry for each supervised step
            "outlook": None,  # figures of completions sampled before the first step
            "steps": [],
            "evals": [],
            "findings": [],
            "changed_files": [],  # with --accept-changed-files: which files changed after which step
            "finished": None,  # set at the end: the last step and why the run ended
        }
        self._written = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the parts of the record that a checkpoint keeps."""
        names = ("before_sft", "sft", "outlook", "steps", "evals", "findings", "changed_files")
        return {name: self.record[name] for name in names}

    def load_state_dict(self, state: Mapping[str, Any], step: int, sft_step: int = 0) -> None:
        """Restore what `state_dict` returned after `step` steps and `sft_step` supervised steps.

        Raises ValueError if the state is damaged or does not belong to these numbers of steps.
        """
        # Checkpoints of earlier versions lack these parts.
        state = {"before_sft": None, "sft": [], "outlook": None, "changed_files": [], **state}
        passed = {name: FORMATS[name](state.get(name)) for name in self.state_dict()}
        passed["evals"] = is_list_of(is_evaluation, state.get("evals"))
        for name, count in (("sft", sft_step), ("steps", step)):
            passed[name] = passed[name] and [row["step"] for row in state[name]] == list(range(1, count + 1))
        check_entries(passed)
        self.record |= {name: state[name] for name in self.state_dict()}

    def add_step(self, entry: dict[str, Any], kind: str = "steps") -> None:
        """Append the entry of a step, or of a supervised step (kind "sft"); the file is written every few seconds."""
        self.record[kind].append(_finite(entry))
        if time.monotonic() - self._written > WRITE_EVERY:
            self.write()

    def add_time(self, phase: str, seconds: float) -> None:
        """Add seconds to a phase of the last step; do nothing before the first step."""
        if self.record["steps"]:
            row = self.record["steps"][-1]
            row[f"time/{phase}"] = row.get(f"time/{phase}", 0.0) + seconds

    def add_eval(self, entry: dict[str, Any]) -> None:
        """Append an evaluation and write the file."""
        self.record["evals"].append(_finite(entry))
        self.write()

    def add_changed_files(self, step: int, files: Mapping[str, str]) -> None:
        """Record that files changed after step `step`. `files` has their new SHA-256 values by path."""
        self.record["changed_files"].append({"step": step, "files": dict(files)})

    def write(self) -> None:
        """Replace the file by a new one, whole or not at all."""
        if self.path is None:
            return
        text = json.dumps(self.record, allow_nan=False, separators=(",", ":")) + "\n"
        write_atomic(self.path, text.encode(), durable=True)
        self._written = time.monotonic()


def _finite(value: Any) -> Any:
    """Replace every NaN and infinity by None, because JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def load_metrics(path: Path) -> dict[str, Any]:
    """Read a metrics file, given its path or the folder of the run.

    Raises ValueError, with a one-line message, if the file is missing, empty, damaged or from another program.
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
    """Return the record of the run in a folder if the run ended after `step` with these metrics; else None."""
    try:
        written = load_metrics(folder)
    except ValueError:
        return None  # The file is damaged or missing. The checkpoint has everything but the ending.
    same = same_rows(written["steps"], metrics["steps"]) and same_rows(written["evals"][:-1], metrics["evals"])
    return written if same and (written.get("finished") or {}).get("step") == step else None


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """Return an entry without its times, which differ between otherwise equal runs."""
    return {name: value for name, value in row.items() if not name.startswith("time/")}


def same_rows(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    """Return whether two lists of entries are equal apart from times."""
    return list(map(without_times, first)) == list(map(without_times, second))
