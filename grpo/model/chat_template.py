"""Chat templates: from chats to prompts, for models without a template too, and the ids that end a turn."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.runtime.console import printable
from tasks.base import Message

# for a base model, which has no chat template; `bos_token` is put before it if the tokenizer adds one
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] }}{{ eos_token }}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# put before a template without a system role (Gemma 2): the system text begins the first user message
MERGE_SYSTEM = (
    "{% if messages[0]['role'] == 'system' and messages | length > 1 %}"
    "{% set first = {'role': 'user', 'content': messages[0]['content'] + '\n\n' + messages[1]['content']} %}"
    "{% set messages = [first] + messages[2:] %}"
    "{% endif %}"
)


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give a base model a plain chat template, and a template without a system role a place for the system text.

    The tokenizer keeps it, so that a saved model is asked in the same way. Returns a remark on what was done, or "".
    Raises ValueError if the template leaves the user's message out.
    """
    if not isinstance(tokenizer.chat_template or "", (str, dict)):
        raise ValueError(f"the model's chat template is {type(tokenizer.chat_template).__name__}, not a text")
    if not tokenizer.chat_template:
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
        return "It has no chat template, so it is a base model, and is asked in plain text: User: ... Assistant:"
    system, user = "s7st3m", "qu3sti0n"
    chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    with suppress(ValueError):
        text = render(tokenizer, chat)
        if system in text and user in text:
            return ""
    tokenizer.chat_template = MERGE_SYSTEM + tokenizer.get_chat_template()
    text = render(tokenizer, chat)
    if system not in text or user not in text:
        raise ValueError("the model's chat template leaves the user's message out, so it cannot be asked anything")
    return "Its chat template has no system role: that text becomes the beginning of the user's message."


def render(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message], **options: Any) -> Any:
    """Render a chat by the template. Raises ValueError, in one printable line, if the template refuses it."""
    try:
        return tokenizer.apply_chat_template(list(chat), **({"tokenize": False} | options))
    except TemplateError as error:
        reason = printable(" ".join(str(error).split()))[:300]
        raise ValueError(f"the model's chat template refuses the prompt: {reason}") from None


def end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends a turn: the tokenizer's, the generation config's, and the chat template's own.

    The last is found by rendering an assistant's turn: Gemma 3 ends a turn on <end_of_turn>, which is not its EOS.
    """
    ids = {tokenizer.eos_token_id, template_end_id(tokenizer)}
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids.update(configured if isinstance(configured, list) else [configured])
    return tuple(sorted(i for i in ids if i is not None))


def template_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template puts after an assistant's turn, or else the tokenizer's EOS."""
    said = "c0mpl3ti0n"
    turn = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said}]
    _, found, after = render(tokenizer, turn).rpartition(said)
    following = tokenizer(after.strip(), add_special_tokens=False)["input_ids"][:1] if found else []
    added = tokenizer.added_tokens_decoder
    return next((i for i in following if i in added and added[i].special), tokenizer.eos_token_id)


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of an assistant's turn, with the token that ends it; control tokens in `text` stay text.

    Raises ValueError if the tokenizer has no token that ends a turn.
    """
    end = template_end_id(tokenizer)
    if end is None:
        raise ValueError("the model's tokenizer has no token that ends a turn, so no completion can be taught")
    return [*tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], end]


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message]) -> list[int]:
    """Return the ids of the prompt for the assistant's turn; control tokens in the messages are encoded as text."""
    options = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
    return render(tokenizer, chat, add_generation_prompt=True, **options)["input_ids"]
