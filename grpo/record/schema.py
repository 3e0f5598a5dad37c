"""What `grpo_metrics.json` looks like, and whether a value from a file does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.runtime.checks import LARGEST_NUMBER, is_count, is_list_of

SCHEMA_VERSION = 1
MEASURED = ("accuracy", "n", "ci_low", "ci_high")  # in every evaluation
TABLES = ("tasks", "categories", "pass_at_k", "maj_at_k")  # in some evaluations; tasks: of older versions
FEW_CATEGORIES = 6  # that fit into a line or a legend
NOT_NUMBERS = ("split", "skills", *TABLES)


def check_record(record: Any, path: Path) -> None:
    """Raise ValueError if `record`, read from `path`, is not what a run writes."""
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
    if not is_list_of(is_entry, record.get("sft", [])):
        raise ValueError(f"{path} is damaged: its 'sft' is not a list of entries with a step and numbers")
    if record.get("before_sft") is not None and not is_evaluation(record["before_sft"]):
        raise ValueError(f"{path} is damaged: its 'before_sft' is not an evaluation")
    if record.get("outlook") is not None and not is_outlook(record["outlook"]):
        raise ValueError(f"{path} is damaged: its 'outlook' is not a table of shares")
    ending = record.get("finished")
    if ending is not None and not (isinstance(ending, dict) and is_count(ending.get("step")) and "reason" in ending):
        raise ValueError(f"{path} is damaged: its 'finished' is not a step and a reason")


def is_evaluation(value: Any) -> bool:
    """Return whether a value is a complete entry of `evals`."""
    complete = is_entry(value) and "split" in value and all(value.get(name) is not None for name in MEASURED)
    return complete and _is_table("skills", value.get("skills", {}))


def few_categories(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the accuracies by category of an evaluation if there are few categories; else {}."""
    categories = entry.get("categories", {})
    return categories if len(categories) <= FEW_CATEGORIES else {}


def is_finding(value: Any) -> bool:
    """Return whether a value is a complete finding on the run's health."""
    texts = [value.get("name"), value.get("text"), *_examples(value)] if isinstance(value, dict) else [None]
    return all(isinstance(text, str) for text in texts) and is_count(value.get("step"))


def is_outlook(value: Any) -> bool:
    """Return whether a value is what a look before the first step writes: two counts, and shares."""
    shares = ("teaching", "all_right", "pass_at_1", "pass_at_g", "well_formed", "truncated")
    known = isinstance(value, dict) and all(isinstance(value.get(name), (int, float)) for name in shares)
    counted = known and all(is_count(value.get(name)) for name in ("groups", "num_generations"))
    return counted and all(0 <= value[name] <= 1 for name in shares)


def _examples(finding: dict[str, Any]) -> list[Any]:
    examples = finding.get("examples", [])
    return examples if isinstance(examples, list) else [None]


def is_entry(row: Any) -> bool:
    """Return whether a row has a step, and only numbers and nulls where the plots expect numbers."""
    if not isinstance(row, dict) or not is_count(row.get("step")):
        return False
    if not all(_is_table(name, row[name]) for name in TABLES if name in row):
        return False
    numbers = [value for name, value in row.items() if name not in NOT_NUMBERS and value is not None]
    return all(isinstance(value, (int, float)) and abs(value) < LARGEST_NUMBER for value in numbers)


def _is_table(name: str, table: Any) -> bool:
    """Return whether a table of accuracies by category, or of pass@k or maj@k by k, holds numbers."""
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
