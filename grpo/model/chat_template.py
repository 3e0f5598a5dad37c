"""Chat templates of models that have none, or none with a system role, and the ids that end a turn."""

from contextlib import suppress

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.model.language_model import render, template_end_id

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


def end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends a turn: the tokenizer's, the generation config's, and the chat template's own.

    The last is found by rendering an assistant's turn: Gemma 3 ends a turn on <end_of_turn>, which is not its EOS.
    """
    ids = {tokenizer.eos_token_id, template_end_id(tokenizer)}
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids.update(configured if isinstance(configured, list) else [configured])
    return tuple(sorted(i for i in ids if i is not None))
