"""Declare, check and read a setting. The settings themselves are in `config.py`."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

LARGEST_FLOAT32 = 3.4e38
MAX_COUNT = 10**9  # A larger number of steps, prompts or tokens is probably a typo, and would fill the memory.
# These names have a meaning of their own where transformers renders a prompt, so --chat-template-arg cannot set them.
RESERVED_TEMPLATE_ARGS = {
    *("self", "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
}
_DURATION = re.compile(r"(?:([0-9]{1,4})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,8})s)?")


def setting(
    default: Any,
    group: str,
    meaning: str,
    least: float | None = None,
    choices: tuple = (),
    most: float | None = None,
    common: bool = False,
) -> Any:
    """Declare a field of `TrainConfig` with its heading in --help, its meaning, and its bounds or its choices.

    --help lists the `common` settings, which most runs need; --help-all lists all settings.
    """
    if most is None:
        most = LARGEST_FLOAT32 if isinstance(default, float) else MAX_COUNT
    bounds = {"choices": choices, "least": least, "most": most}
    return field(default=default, metadata={"group": group, "meaning": meaning, "common": common, **bounds})


def as_typed(name: str) -> str:
    """Return the command-line option of a setting, such as --learning-rate for learning_rate."""
    return f"--{name.replace('_', '-')}"


def check_setting(name: str, value: Any, kind: type, metadata: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the option if a value has the wrong type or is out of bounds."""
    option = as_typed(name)
    if kind == tuple[str, ...]:
        if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{option} is {value!r}; it must be a list of texts")
        return
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{option} is {value!r}; it must be {kind.__name__}")
    if kind is float and not abs(value) <= LARGEST_FLOAT32:  # `not <=`, because NaN must fail too
        raise ValueError(f"{option} is {value}; it must be a finite number")
    least, most, choices = metadata["least"], metadata["most"], metadata["choices"]
    if least is not None and value < least:
        raise ValueError(f"{option} is {value}; it must be at least {least:g}")
    if kind in (int, float) and value > most:
        raise ValueError(f"{option} is {value}; it must be at most {most if kind is int else format(most, 'g')}")
    if choices and value not in choices:
        raise ValueError(f"{option} is {value!r}; it must be one of {', '.join(choices)}")


def parse_template_args(items: Sequence[str]) -> dict[str, Any]:
    """Return the values of --chat-template-arg NAME=VALUE, by name: each is a bool, None, a number or a text.

    Raises ValueError if an item is not NAME=VALUE, or if the name is one of RESERVED_TEMPLATE_ARGS.

    >>> parse_template_args(["enable_thinking=False", "effort=low"])
    {'enable_thinking': False, 'effort': 'low'}
    """
    values = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.isidentifier() or name in RESERVED_TEMPLATE_ARGS:
            raise ValueError(
                f"--chat-template-arg is {item!r}; write NAME=VALUE, such as enable_thinking=false, with a variable "
                "that the model's chat template leaves open"
            )
        try:
            value = json.loads(text.lower() if text.lower() in ("true", "false") else text)
        except (ValueError, RecursionError):
            value = text
        values[name] = value if isinstance(value, (bool, int, float)) or value is None else text
    return values


def parse_duration(text: str) -> int:
    """Return the seconds in a duration such as 3h, 90m or 1h30m. Raises ValueError for other forms and for zero."""
    match = _DURATION.fullmatch(text.strip().lower())
    parts = [int(part or 0) for part in match.groups()] if match else [0]
    if not any(parts):
        raise ValueError(f"--time-limit is {text!r}; write it as 3h, 90m, 1h30m or 45s")
    hours, minutes, seconds = parts
    return 3600 * hours + 60 * minutes + seconds


def parse_group_schedule(text: str) -> tuple[int, int]:
    """Return the first and the last group size of "8:4". Raises ValueError for any other form."""
    first, _, last = text.partition(":")
    if not all(part.isascii() and part.isdigit() and 2 <= int(part[:6]) <= 10_000 for part in (first, last)):
        raise ValueError(
            f"--group-schedule is {text!r}; write 8:4 for 8 completions per prompt falling to 4, both at least 2"
        )
    return int(first), int(last)
