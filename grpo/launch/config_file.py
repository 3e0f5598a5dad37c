"""Settings from a JSON file: `train_grpo.py --config FILE.json`. Imports nothing heavy."""

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
    """Return the settings in a JSON object, or those of the run that wrote a `grpo_metrics.json`.

    Raises ValueError, in one line that names the file and the entry, if one of them cannot be a setting.
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
        raise ValueError(f"--config {path} is not a JSON object of settings, nor the grpo_metrics.json of a run")
    settings, known = with_new_names(value), {f.name: f for f in fields(TrainConfig)}
    for name, one in settings.items():
        if name not in known:
            raise ValueError(f"--config {path} has {printable(name)!r}, which is no setting; --help-all lists them")
        if name == "task" and isinstance(one, str):  # one alone
            one = [one]
        if isinstance(one, list):
            settings[name] = one = tuple(one)
        try:
            check_setting(name, one, known[name].type, known[name].metadata)
        except ValueError as error:
            raise ValueError(f"--config {path}: {error}") from None
    return settings


def resolve_with_file(path: Path, in_file: Mapping[str, Any], given: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a run, those given before those in a file; an error says if the file alone has it."""
    try:
        return resolve({**in_file, **given})
    except ValueError:
        try:
            resolve(in_file)
        except ValueError as error:
            raise ValueError(f"--config {path}: {error}") from None
        raise
