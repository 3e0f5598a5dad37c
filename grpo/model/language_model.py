"""A causal language model with its tokenizer: from chats to prompts, from token ids to texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.config import TrainConfig
from grpo.runtime.console import printable
from grpo.scoring.tokens import left_pad
from tasks.base import Message, Task

CHARACTERS = 64  # of a token, at most: of a longer text a beginning tells whether it fits
NAMED = 5  # how many questions an error names


@dataclass(frozen=True)
class LanguageModel:
    """A model with all that is needed to go from chats to texts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]  # every id that ends a turn
    pad_id: int
    notes: tuple[str, ...] = ()  # remarks on how the model is asked, for the start of a run
    dropout: dict[str, float] = field(default_factory=dict)  # rates of its config.json, all switched off here

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.model.device

    @property
    def positions(self) -> int | None:
        """Return how many tokens prompt and completion may have together, if the configuration says so."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        return most if isinstance(most, int) and most > 0 else None

    def prompts(self, chats: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Return the prompt of each chat as token ids. Control tokens in a message stay text.

        Raises ValueError if the tokenizer has tokens that the model does not.
        """
        prompts = [encode_chat(self.tokenizer, chat) for chat in chats]
        rows = self.model.get_input_embeddings().weight.shape[0]
        if (largest := max(map(max, filter(None, prompts)), default=0)) >= rows:
            raise ValueError(f"the model's tokenizer makes the token id {largest}; its embedding has {rows} rows")
        return prompts

    def encode(self, chats: Sequence[Sequence[Message]]) -> tuple[Tensor, Tensor]:
        """Return the prompts of chats, left-padded: (N, P) ids and bool mask."""
        return left_pad(self.prompts(chats), self.pad_id, self.device)

    def completion(self, text: str) -> list[int]:
        """Return a completion as token ids, with the token that ends the turn. Control tokens in it stay text."""
        return encode_completion(self.tokenizer, text)

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of token ids, special tokens included."""
        return self.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message]) -> list[int]:
    """Return the ids of the prompt for the assistant's turn; control tokens in the messages are encoded as text."""
    options = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
    return render(tokenizer, chat, add_generation_prompt=True, **options)["input_ids"]


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of an assistant's turn, with the token that ends it; control tokens in `text` stay text.

    Raises ValueError if the tokenizer has no token that ends a turn.
    """
    end = template_end_id(tokenizer)
    if end is None:
        raise ValueError("the model's tokenizer has no token that ends a turn, so no completion can be taught")
    return [*tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], end]


def template_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template puts after an assistant's turn, or else the tokenizer's EOS."""
    said = "c0mpl3ti0n"
    turn = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said}]
    _, found, after = render(tokenizer, turn).rpartition(said)
    following = tokenizer(after.strip(), add_special_tokens=False)["input_ids"][:1] if found else []
    added = tokenizer.added_tokens_decoder
    return next((i for i in following if i in added and added[i].special), tokenizer.eos_token_id)


def render(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message], **options: Any) -> Any:
    """Render a chat by the template. Raises ValueError, in one printable line, if the template refuses it."""
    try:
        return tokenizer.apply_chat_template(list(chat), **({"tokenize": False} | options))
    except TemplateError as error:
        reason = printable(" ".join(str(error).split()))[:300]
        raise ValueError(f"the model's chat template refuses the prompt: {reason}") from None


def switch_off_dropout(model: PreTrainedModel) -> dict[str, float]:
    """Set all dropout to 0, so that train mode computes what eval mode does; return the rates of the configuration.

    GPT-2 has 0.1 in modules of their own; others keep a number in a module, or read the configuration.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)
    rates = {name: x for name, x in model.config.to_dict().items() if "drop" in name and isinstance(x, float) and x}
    for name in rates:
        setattr(model.config, name, 0.0)
    return rates


def check_room(lm: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise ValueError if the longest prompt and a completion have more tokens than the model has positions."""
    longest = max(map(len, prompts), default=0)
    if lm.positions is not None and longest + max_new_tokens > lm.positions:
        raise ValueError(
            f"a question with its prompt has {longest:,} tokens and its answer up to {max_new_tokens:,}: more than "
            f"the {lm.positions:,} positions of the model; ask something shorter, or give a smaller --max-new-tokens"
        )


def check_prompts_fit(lm: LanguageModel, task: Task, config: TrainConfig) -> None:
    """Raise ValueError, with the place in the file, if a question and a completion have more tokens than fit.

    Of a task that draws its problems, one is looked at. A question of fewer bytes than tokens are left cannot be too
    long, so that few are encoded.
    """
    if lm.positions is None:
        return
    for part in task.parts.values():
        check_prompts_fit(lm, part, config)
    if task.parts:
        return
    room = lm.positions - config.max_new_tokens
    [frame] = lm.prompts([task.messages("?")])
    listed = list(task.listed())
    too_long = []
    for problem in listed or [task.training_problem(config.seed, 1, 0)]:
        if not listed or len(frame) + len(problem.question.encode()) > room:
            [prompt] = lm.prompts([task.messages(problem.question[: CHARACTERS * lm.positions])])
            if len(prompt) > room:
                too_long.append((problem, len(prompt)))
    if not too_long:
        return
    problem, tokens = too_long[0]
    cut = len(problem.question) > CHARACTERS * lm.positions
    more = [other.place for other, _ in too_long[1:NAMED]]
    others = f" (and {len(too_long) - 1} more: {', '.join(more)}{', …' * (len(too_long) > NAMED)})" if more else ""
    examples = f" with {len(task.examples) // 2} worked examples" if task.examples else ""
    advice = "lower --shots" if examples and len(frame) > room / 2 else "shorten or remove the question"
    raise ValueError(
        f"{problem.place}{': ' * bool(problem.place)}the prompt{examples} has {'more than ' * cut}{tokens:,} tokens, "
        f"and --max-new-tokens is {config.max_new_tokens}: more than the {lm.positions:,} positions of "
        f"{config.model}; {advice}{others}"
    )
