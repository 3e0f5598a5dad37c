"""Read settings from a JSON file: `train_grpo.py --config FILE.json`. Imports nothing heavy."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from grpo.config import TrainConfig, with_new_names
from grpo.model_card import resolve
from grpo.runtime.console import printable
from grpo.setting import check_setting


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a JSON file, which is an object of settings or the `grpo_metrics.json` of a run.

    Raises ValueError, in one line that names the file and the entry, if an entry is not a valid setting.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--config {path} is not JSON ({error})") from None
    if isinstance(value, dict) and "schema_version" in value:
        value = value.get("config")
    if not isinstance(value, dict):
        raise ValueError(f"--config {path} is neither a JSON object of settings nor the grpo_metrics.json of a run")
    settings = with_new_names(value)
    known = {f.name: f for f in fields(TrainConfig)}
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"--config {path} has {printable(name)!r}, which is not a setting; see --help-all")
        if name == "task" and isinstance(value, str):  # a file may give a single task as a string
            value = [value]
        if isinstance(value, list):
            settings[name] = value = tuple(value)
        try:
            check_setting(name, value, known[name].type, known[name].metadata)
        except ValueError as error:
            raise ValueError(f"--config {path}: {error}") from None
    return settings


def resolve_with_file(path: Path, in_file: Mapping[str, Any], given: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a run: `given` overrides the file. A ValueError about the file names it."""
    try:
        return resolve({**in_file, **given})
    except ValueError:
        try:
            resolve(in_file)
        except ValueError as error:
            raise ValueError(f"--config {path}: {error}") from None
        raise
