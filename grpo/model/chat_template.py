"""Make sure that a model's chat template takes a system text and a question; find the ids that end a turn.

A template may also end each prompt with <think>, or change worked examples: `task_for` adapts a task to this.
"""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.model.language_model import LanguageModel, render, template_end_id
from tasks.base import Task, chat
from tasks.common.prompts import THINK
from tasks.common.shots import with_shots_in_system_prompt

# A base model has no chat template and gets this one, after `bos_token` if the tokenizer begins texts with it.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] }}{{ eos_token }}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# The call with which a chat template writes the current date. `fix_date` writes TEMPLATE_DATE in its place.
TODAY = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
TEMPLATE_DATE = datetime(2026, 1, 1)
# Put before a template without a system role (Gemma 2), this adds the system text to the first user message.
MERGE_SYSTEM = (
    "{% if messages[0]['role'] == 'system' and messages | length > 1 %}"
    "{% set first = {'role': 'user', 'content': messages[0]['content'] + '\n\n' + messages[1]['content']} %}"
    "{% set messages = [first] + messages[2:] %}"
    "{% endif %}"
)


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give a base model a plain chat template; let a template without a system role take a system text.

    The tokenizer keeps the template, so that a saved model gets the same prompts. Returns a remark on what was done,
    or "" if nothing changed. Raises ValueError if the template is not a text, or leaves the user's message out.
    """
    if not isinstance(tokenizer.chat_template or "", (str, dict)):
        raise ValueError(f"the model's chat template is {type(tokenizer.chat_template).__name__}, not a text")
    if not tokenizer.chat_template:
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
        return "It has no chat template, so it is a base model. Its prompts are plain text: User: ... Assistant:"
    system = "s7st3m"
    user = "qu3sti0n"
    chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    with suppress(ValueError):
        text = render(tokenizer, chat)
        if system in text and user in text:
            return ""
    tokenizer.chat_template = MERGE_SYSTEM + tokenizer.get_chat_template()
    text = render(tokenizer, chat)
    if system not in text or user not in text:
        raise ValueError("the model's chat template leaves the user's message out, so no question reaches the model")
    return "Its chat template has no system role: the system text becomes the beginning of the user's message."


def fix_date(tokenizer: PreTrainedTokenizerBase) -> str:
    """Replace today's date in the chat template by TEMPLATE_DATE, so that prompts are the same on every day.

    The tokenizer keeps the template, so that a saved model gets the same prompts. Returns a remark, or "" if the
    template writes no date.
    """
    template = tokenizer.get_chat_template()
    if not TODAY.search(template):
        return ""
    tokenizer.chat_template = TODAY.sub(lambda call: json.dumps(TEMPLATE_DATE.strftime(call["format"])), template)
    return (
        f"Its chat template writes today's date. Here it is always {TEMPLATE_DATE:%Y-%m-%d}, so that prompts are the "
        "same on every day."
    )


def check_template_args(tokenizer: PreTrainedTokenizerBase, names: Iterable[str]) -> None:
    """Raise ValueError if a name of --chat-template-arg does not occur in the model's chat template."""
    for name in names:
        if not re.search(rf"\b{re.escape(name)}\b", tokenizer.get_chat_template()):
            raise ValueError(f"--chat-template-arg sets {name}, but the model's chat template does not use it")


def end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends a turn, according to the tokenizer, the generation config or the chat template.

    The chat template is needed because Gemma 3 ends a turn with <end_of_turn>, which is not its EOS token.
    """
    ids = {tokenizer.eos_token_id, template_end_id(tokenizer)}
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids.update(configured if isinstance(configured, list) else [configured])
    return tuple(sorted(i for i in ids if i is not None))


def opening_of(lm: LanguageModel) -> str:
    """Return "<think>" with the white space after it if the chat template ends each prompt with them, else ""."""
    prompt = render(lm.tokenizer, chat("?", "?"), add_generation_prompt=True, **lm.template_args)
    _, tag, space = prompt.rpartition(THINK)
    return "" if space.strip() else tag + space


def task_for(lm: LanguageModel, task: Task) -> Task:
    """Adapt a task to what the model's chat template does to its prompts; return `task` itself if nothing changes.

    A <think> at the end of each prompt becomes the task's `opening`, so that it counts as a part of a completion's
    form. If the template changes worked examples, for example because it removes the thinking from earlier
    turns, they move to the system prompt, unless the template changes them there too. A note of the task says so.
    """
    if task.parts:
        parts = {name: task_for(lm, part) for name, part in task.parts.items()}
        if all(part is task.parts[name] for name, part in parts.items()):
            return task
        first = next(iter(parts.values()))
        shown = {"system_prompt": first.system_prompt, "examples": first.examples, "opening": first.opening}
        notes = [f"{name}: {n}" for name, part in parts.items() for n in part.notes[len(task.parts[name].notes) :]]
        return replace(task, parts=parts, **shown, notes=[*task.notes, *notes])
    opening = opening_of(lm)
    if opening != task.opening:
        task = replace(task, opening=opening)
    if not task.examples:
        return task
    texts = [message["content"].strip() for message in task.examples]
    if _shows(lm, task, texts):
        return task
    note = "The model's chat template changes worked examples in earlier turns"
    moved = with_shots_in_system_prompt(task)
    if _shows(lm, moved, texts):
        return replace(moved, notes=[*task.notes, f"{note}, so they are in the system prompt instead."])
    return replace(task, notes=[*task.notes, f"{note} and in the system prompt; look at a prompt with --check."])


def _shows(lm: LanguageModel, task: Task, texts: Iterable[str]) -> bool:
    """Return whether the task's prompts contain all these texts, unchanged."""
    prompt = render(lm.tokenizer, task.messages("?"), add_generation_prompt=True, **lm.template_args)
    return all(text in prompt for text in texts)
