"""Check that a value read from a file has the format of `grpo_metrics.json`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo.runtime.checks import LARGEST_NUMBER, is_count, is_list_of

SCHEMA_VERSION = 1
MEASURED = ("accuracy", "n", "ci_low", "ci_high")  # Every evaluation has these numbers.
# Only some evaluations have these tables. "tasks" was written by older versions.
TABLES = ("tasks", "categories", "pass_at_k", "maj_at_k")
NOT_NUMBERS = ("split", "skills", *TABLES)
MAX_SHOWN_CATEGORIES = 6  # More categories do not fit into a line or a legend.


def check_record(record: Any, path: Path) -> None:
    """Raise ValueError if `record`, read from `path`, does not have the format that a run writes."""
    if not isinstance(record, dict) or "schema_version" not in record:
        raise ValueError(f"{path} was not written by this program; give the grpo_metrics.json of a run")
    if record["schema_version"] != SCHEMA_VERSION:
        version = record["schema_version"]
        raise ValueError(f"{path} has schema version {version!r}, this program reads {SCHEMA_VERSION}")
    for name, is_valid in FORMATS.items():
        if not is_valid({**DEFAULTS, **record}.get(name)):
            raise ValueError(f"{path} is damaged at {name!r}; train again, or give another file")


def is_entry(row: Any) -> bool:
    """Return whether a row has a step, and only numbers and nulls where the plots expect numbers."""
    if not isinstance(row, dict) or not is_count(row.get("step")):
        return False
    if not all(_is_table(name, row[name]) for name in TABLES if name in row):
        return False
    numbers = [value for name, value in row.items() if name not in NOT_NUMBERS and value is not None]
    return all(isinstance(value, (int, float)) and abs(value) < LARGEST_NUMBER for value in numbers)


def is_evaluation(value: Any) -> bool:
    """Return whether a value is a complete entry of `evals`."""
    return _is_measured(value) and "split" in value and _is_table("skills", value.get("skills", {}))


def is_finding(value: Any) -> bool:
    """Return whether a value is a complete finding."""
    if not isinstance(value, dict) or not isinstance(value.get("examples", []), list):
        return False
    texts = [value.get("name"), value.get("text"), *value.get("examples", [])]
    return all(isinstance(text, str) for text in texts) and is_count(value.get("step"))


def is_change(value: Any) -> bool:
    """Return whether a value has a step and the SHA-256 values, by path, of the files that changed after it."""
    if not isinstance(value, dict) or not isinstance(value.get("files"), dict):
        return False
    return is_count(value.get("step")) and all(isinstance(sha256, str) for sha256 in value["files"].values())


def is_outlook(value: Any) -> bool:
    """Return whether a value has the counts and shares of an outlook, which is measured before the first step."""
    if not isinstance(value, dict) or not all(is_count(value.get(name)) for name in ("groups", "num_generations")):
        return False
    shares = [
        value.get(name) for name in ("teaching", "all_right", "pass_at_1", "pass_at_g", "well_formed", "truncated")
    ]
    return all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in shares)


def evaluations(record: Mapping[str, Any], split: str) -> list[dict[str, Any]]:
    """Return the evaluations of a run on one split, "validation" or "test", in the order of their steps."""
    return [entry for entry in record["evals"] if entry.get("split") == split]


def few_categories(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an evaluation's accuracies by category; {} if there are too many categories to show."""
    categories = entry.get("categories", {})
    return categories if len(categories) <= MAX_SHOWN_CATEGORIES else {}


def _is_measured(value: Any) -> bool:
    """Return whether a value is an entry with the numbers of an evaluation."""
    return is_entry(value) and all(value.get(name) is not None for name in MEASURED)


def _is_ending(value: Any) -> bool:
    """Return whether a value has the last step of a run and the reason why the run ended."""
    return isinstance(value, dict) and is_count(value.get("step")) and "reason" in value


def _is_table(name: str, table: Any) -> bool:
    """Return whether a table of accuracies by category or skill, or of pass@k or maj@k by k, holds numbers."""
    if not isinstance(table, dict):
        return False
    if name in ("pass_at_k", "maj_at_k"):
        return all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in table.values())
    return all(
        isinstance(row, dict)
        and all(isinstance(row.get(k), (int, float)) and row[k] >= 0 for k in MEASURED)
        and isinstance(row.get("well_formed", 0), (int, float))
        for row in table.values()
    )


# Each part of the file with the function that checks its value. A file may have other parts as well.
FORMATS: dict[str, Callable[[Any], bool]] = {
    "config": lambda value: isinstance(value, dict),
    "before_sft": lambda value: value is None or is_evaluation(value),
    "sft": lambda value: is_list_of(is_entry, value),
    "outlook": lambda value: value is None or is_outlook(value),
    "steps": lambda value: is_list_of(is_entry, value),
    "evals": lambda value: is_list_of(_is_measured, value),
    "findings": lambda value: is_list_of(is_finding, value),
    "changed_files": lambda value: is_list_of(is_change, value),
    "finished": lambda value: value is None or _is_ending(value),
}
# Earlier versions did not write these parts. Their files are read as if they had these values.
DEFAULTS: dict[str, Any] = {
    "before_sft": None,
    "sft": [],
    "outlook": None,
    "findings": [],
    "changed_files": [],
    "finished": None,
}
