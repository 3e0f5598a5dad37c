"""The metrics file: what a run wrote down, always whole, readable while it grows."""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
FILE_NAME = "grpo_metrics.json"
LARGEST_NUMBER = 10**300  # JSON may hold integers that no float can
MEASURED = ("accuracy", "n", "ci_low", "ci_high")  # of every evaluation
TABLES = ("categories", "pass_at_k")  # of an evaluation
NOT_NUMBERS = ("split", "skills", *TABLES)
WRITE_EVERY = 5.0  # seconds, between evaluations


class Stopwatch:
    """Seconds by phase: `with clock("sample"): ...` adds to `clock.seconds["sample"]`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what is inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class Metrics:
    """The run's record: settings, environment, one entry a step, one an evaluation."""

    def __init__(self, folder: Path | None, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Without a folder nothing is written: another process of the run does."""
        self.path = folder / FILE_NAME if folder else None
        self.record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "config": config,
            "environment": environment,
            "steps": [],
            "evals": [],
            "findings": [],
            "finished": None,  # or the step after which the run ended, and why
        }
        self._written = 0.0

    def restore(self, record: dict[str, Any]) -> None:
        """Go on from the record of a checkpoint; what was written after it is forgotten."""
        for name in ("steps", "evals", "findings"):
            self.record[name] = record[name]

    def add_step(self, entry: dict[str, Any]) -> None:
        """Append a step; the file follows within a few seconds."""
        self.record["steps"].append(_finite(entry))
        if time.monotonic() - self._written > WRITE_EVERY:
            self.write()

    def add_time(self, phase: str, seconds: float) -> None:
        """Add to a phase of the last step; what comes before the first step is nobody's."""
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
        temporary = self.path.with_name(f".{self.path.name}.new")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(self.record, file, allow_nan=False, separators=(",", ":"))
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:  # that of a write names no file
            raise OSError(f"cannot write {self.path}: {error.strerror or error}") from None
        self._written = time.monotonic()


def _finite(value: Any) -> Any:
    """The same with null for every number that is not finite: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def load_metrics(path: Path) -> dict[str, Any]:
    """The record in a metrics file, or in the folder of a run.

    Raises ValueError, in one line that says what to do, where it is missing, empty, cut short or not ours.
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
    _check(record, path)
    return record


def ended_with(folder: Path, step: int, metrics: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the run in a folder, if it ended after `step` with these metrics; None if it is to go on."""
    try:
        written = load_metrics(folder)
    except ValueError:
        return None  # damaged or missing; the checkpoint has all of it but the ending
    same = same_rows(written["steps"], metrics["steps"]) and same_rows(written["evals"][:-1], metrics["evals"])
    return written if same and (written.get("finished") or {}).get("step") == step else None


def _check(record: Any, path: Path) -> None:
    if not isinstance(record, dict) or "schema_version" not in record:
        raise ValueError(f"{path} was not written by this program; give the grpo_metrics.json of a run")
    if record["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {record['schema_version']!r}, this program reads {SCHEMA_VERSION}"
        )
    for key in ("steps", "evals"):
        if not is_list_of(is_entry, record.get(key)):
            raise ValueError(f"{path} is damaged: its {key!r} is not a list of entries with a step and numbers")
    if any(row.get(name) is None for row in record["evals"] for name in MEASURED):
        raise ValueError(f"{path} is damaged: one of its 'evals' lacks one of {', '.join(MEASURED)}")
    if not isinstance(record.get("config"), dict):
        raise ValueError(f"{path} is damaged: it has no 'config'")
    if not is_list_of(is_finding, record.get("findings", [])):
        raise ValueError(f"{path} is damaged: its 'findings' is not a list of texts with a name and a step")
    ending = record.get("finished")
    if ending is not None and not (isinstance(ending, dict) and is_count(ending.get("step")) and "reason" in ending):
        raise ValueError(f"{path} is damaged: its 'finished' is not a step and a reason")


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """An entry without its seconds, which no two runs share."""
    return {name: value for name, value in row.items() if not name.startswith("time/")}


def same_rows(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether entries say the same, seconds aside."""
    return list(map(without_times, some)) == list(map(without_times, others))


def is_count(value: Any) -> bool:
    """Whether a value is a number of things, such as steps."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_NUMBER


def is_list_of(is_one: Callable[[Any], bool], value: Any) -> bool:
    """Whether a value is a list, and every item passes."""
    return isinstance(value, list) and all(map(is_one, value))


def is_evaluation(value: Any) -> bool:
    """Whether a value is an entry of `evals`, complete."""
    return is_entry(value) and "split" in value and all(value.get(name) is not None for name in MEASURED)


def is_finding(value: Any) -> bool:
    """Whether a value is a finding on the run's health, complete."""
    texts = [value.get("name"), value.get("text"), *_examples(value)] if isinstance(value, dict) else [None]
    return all(isinstance(text, str) for text in texts) and is_count(value.get("step"))


def _examples(finding: dict[str, Any]) -> list[Any]:
    examples = finding.get("examples", [])
    return examples if isinstance(examples, list) else [None]


def is_entry(row: Any) -> bool:
    """Whether a row has a step, and nothing but numbers and nulls where the plots look for numbers."""
    if not isinstance(row, dict) or not is_count(row.get("step")):
        return False
    if not all(_is_table(name, row[name]) for name in TABLES if name in row):
        return False
    numbers = [value for name, value in row.items() if name not in NOT_NUMBERS and value is not None]
    return all(isinstance(value, (int, float)) and abs(value) < LARGEST_NUMBER for value in numbers)


def _is_table(name: str, table: Any) -> bool:
    """Whether accuracies by category, or pass@k by k, are so many numbers."""
    if not isinstance(table, dict):
        return False
    if name == "pass_at_k":
        return all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in table.values())
    return all(
        isinstance(row, dict) and all(isinstance(row.get(k), (int, float)) and row[k] >= 0 for k in MEASURED)
        for row in table.values()
    )


def environment(device: str, threads: int, versions: dict[str, str]) -> dict[str, Any]:
    """What a figure needs to be compared with another: device, threads, versions, platform."""
    return {
        "device": device,
        "threads": threads,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        **versions,
    }
