"""Make sure that a model's chat template takes a system text and a question; find the ids that end a turn."""

from contextlib import suppress

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.model.language_model import render, template_end_id

# A base model has no chat template and gets this one, after `bos_token` if the tokenizer begins texts with it.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] }}{{ eos_token }}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# This goes before a template without a system role (Gemma 2): the system text begins the first user message.
MERGE_SYSTEM = (
    "{% if messages[0]['role'] == 'system' and messages | length > 1 %}"
    "{% set first = {'role': 'user', 'content': messages[0]['content'] + '\n\n' + messages[1]['content']} %}"
    "{% set messages = [first] + messages[2:] %}"
    "{% endif %}"
)


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give a base model a plain chat template, and a template without a system role a place for the system text.

    The tokenizer keeps the template, so that a saved model gets the same prompts. Returns a remark on what was done,
    or "" if nothing was. Raises ValueError if the template is not a text, or leaves the user's message out.
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


def end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends a turn: by the tokenizer, by the generation config and by the chat template.

    The chat template is needed because Gemma 3 ends a turn with <end_of_turn>, which is not its EOS token.
    """
    ids = {tokenizer.eos_token_id, template_end_id(tokenizer)}
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids.update(configured if isinstance(configured, list) else [configured])
    return tuple(sorted(i for i in ids if i is not None))
