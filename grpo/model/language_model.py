"""A causal language model with its tokenizer: from chats to prompts, from token ids to texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.model.chat_template import encode_chat, encode_completion
from grpo.model.tokens import left_pad
from tasks.base import Message


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

    def prompts(self, chats: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Return the prompt of each chat as token ids. Control tokens in a message stay text."""
        return [encode_chat(self.tokenizer, chat) for chat in chats]

    def encode(self, chats: Sequence[Sequence[Message]]) -> tuple[Tensor, Tensor]:
        """Return the prompts of chats, left-padded: (N, P) ids and bool mask."""
        return left_pad(self.prompts(chats), self.pad_id, self.device)

    def completion(self, text: str) -> list[int]:
        """Return a completion as token ids, with the token that ends the turn. Control tokens in it stay text."""
        return encode_completion(self.tokenizer, text)

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of token ids, special tokens included."""
        return self.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
