"""Measure drift: how far a policy has moved from the starting model of its run, on prompts outside its training.

The starting model answers a few unrelated questions once, greedily. Its answers and their log-probabilities are kept,
so that no second model is needed. The drift is the mean over the tokens of the answers of

    log p_start(token | before) − log p_now(token | before)        nats a token

It is 0 at the start, and above 0 once the policy finds the answers less likely. If the answers were samples, this
would be an unbiased estimate of KL(start ‖ policy) per token. Greedy answers make it repeatable, but they cover only
the likeliest tokens. So the drift is not a KL divergence: a policy that only becomes surer of the same answers has a
drift below 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch

from grpo.generation.decoding import Decoder
from grpo.generation.greedy import greedy
from grpo.model.language_model import LanguageModel
from grpo.runtime.checks import is_count, is_list_of
from grpo.runtime.precision import in_precision
from grpo.scoring.scorer import DENSE
from grpo.scoring.tokens import tokens_of

MAX_ANSWER_TOKENS = 24  # Answers to the unrelated questions are cut after this many tokens.


@dataclass(frozen=True)
class DriftBaseline:
    """The starting model's answers: token ids of prompts and answers, and log-probabilities of the answers."""

    prompts: list[list[int]]
    answers: list[list[int]]  # including the end token, unless the answer was cut off
    logprobs: list[list[float]]  # one float32 value per token of an answer

    def to_dict(self) -> dict[str, Any]:
        """Return the baseline as JSON values; JSON keeps the floats exactly."""
        return asdict(self)

    @classmethod
    def record(
        cls, lm: LanguageModel, questions: Sequence[str], decoder: Decoder, rows_per_pass: int
    ) -> "DriftBaseline":
        """Record a model's greedy answers to the questions, with the log-probabilities of the answers' tokens."""
        prompts = plain_prompts(lm, questions)
        answers = greedy(lm, prompts, MAX_ANSWER_TOKENS, rows_per_pass, decoder).rows()
        return cls(prompts, answers, answer_logprobs(lm, prompts, answers, rows_per_pass))

    def drift(self, lm: LanguageModel, rows_per_pass: int) -> float | None:
        """Return the drift of a policy, nats a token; None if a log-probability is not finite."""
        now = answer_logprobs(lm, self.prompts, self.answers, rows_per_pass)
        pairs = zip(chain(*self.logprobs), chain(*now), strict=True)
        drift = math.fsum(before - after for before, after in pairs) / sum(map(len, now))
        return drift if math.isfinite(drift) else None

    @staticmethod
    def is_state(value: Any) -> bool:
        """Return whether a value has the structure that `to_dict` returns: keys, types and matching list lengths."""
        if not isinstance(value, Mapping) or set(value) != {"prompts", "answers", "logprobs"}:
            return False
        prompts = value["prompts"]
        answers = value["answers"]
        logprobs = value["logprobs"]
        return (
            all(is_list_of(lambda row: is_list_of(is_count, row) and row, rows) for rows in (prompts, answers))
            and is_list_of(lambda row: is_list_of(lambda x: isinstance(x, float) and math.isfinite(x), row), logprobs)
            and len(prompts) == len(answers) > 0
            and list(map(len, answers)) == list(map(len, logprobs))
        )


def plain_prompts(lm: LanguageModel, questions: Sequence[str]) -> list[list[int]]:
    """Return the prompts of questions, as token ids, without a system prompt."""
    return lm.prompts([[{"role": "user", "content": question}] for question in questions])


@torch.no_grad()
def answer_logprobs(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], rows_per_pass: int
) -> list[list[float]]:
    """Return the log-probability of each token of each answer at temperature 1, computed in padded rows."""
    rows: list[list[float]] = []
    for start in range(0, len(prompts), rows_per_pass):
        batch = answers[start : start + rows_per_pass]
        tokens = tokens_of(prompts[start : start + rows_per_pass], batch, lm.pad_id, lm.model.device)
        with in_precision(lm.model):
            logprobs = DENSE.logprobs(lm.model, tokens, 1.0)
        rows += [row[: len(answer)] for row, answer in zip(logprobs.tolist(), batch, strict=True)]
    return rows
