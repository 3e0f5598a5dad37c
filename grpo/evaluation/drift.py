"""Drift: how far a policy has moved from the model its run started from, on prompts it is not trained on.

The starting model answers some unrelated questions once, greedily. Its answers and their log-probabilities are kept,
so that no second model is needed. The drift is the mean over the answers' tokens of

    log p_start(token | before) − log p_now(token | before)        nats a token

It is 0 at the start, and above 0 once the policy finds those answers less likely. If the answers were samples, this
would be an unbiased estimate of KL(start ‖ policy) a token. Greedy answers make it repeatable but cover the likeliest
tokens only: it is no KL, it is below 0 for a policy that only becomes surer of the same answers, and it says nothing
of other answers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from grpo.generation.decoding import Decoder
from grpo.generation.greedy import greedy
from grpo.model.language_model import LanguageModel
from grpo.runtime.checks import is_count, is_list_of
from grpo.runtime.precision import in_precision
from grpo.scoring.scorer import DENSE
from grpo.scoring.tokens import Tokens, left_pad, length_mask

ANSWER_TOKENS = 24  # of each answer at most


@dataclass(frozen=True)
class DriftBaseline:
    """The starting model's answers: token ids of prompts and answers, and log-probabilities of the answers."""

    prompts: list[list[int]]
    answers: list[list[int]]  # the end token included
    logprobs: list[list[float]]  # of the answers' tokens, float32

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; floats survive JSON to the bit."""
        return asdict(self)

    @classmethod
    def record(
        cls, lm: LanguageModel, questions: Sequence[str], decoder: Decoder, rows_per_pass: int
    ) -> "DriftBaseline":
        """Answer the questions greedily."""
        prompts = plain_prompts(lm, questions)
        answers = greedy(lm, prompts, ANSWER_TOKENS, rows_per_pass, decoder).rows()
        return cls(prompts, answers, answer_logprobs(lm, prompts, answers, rows_per_pass))

    def same_prompts(self, lm: LanguageModel, questions: Sequence[str]) -> bool:
        """Return whether another model has the same prompts, so that its ids mean the same."""
        return plain_prompts(lm, questions) == self.prompts

    def drift(self, lm: LanguageModel, rows_per_pass: int) -> float | None:
        """Return the drift of a policy, nats a token; None if a log-probability is not finite."""
        now = answer_logprobs(lm, self.prompts, self.answers, rows_per_pass)
        differences = [x - y for a, b in zip(self.logprobs, now, strict=True) for x, y in zip(a, b, strict=True)]
        drift = math.fsum(differences) / len(differences)
        return drift if math.isfinite(drift) else None

    @staticmethod
    def is_state(value: Any) -> bool:
        """Return whether a value could come from `to_dict`, by its types and lengths."""
        if not isinstance(value, Mapping) or set(value) != {"prompts", "answers", "logprobs"}:
            return False
        prompts, answers, logprobs = value["prompts"], value["answers"], value["logprobs"]
        return (
            all(is_list_of(lambda row: is_list_of(is_count, row) and row, rows) for rows in (prompts, answers))
            and is_list_of(lambda row: is_list_of(lambda x: isinstance(x, float) and math.isfinite(x), row), logprobs)
            and len(prompts) == len(answers) > 0
            and list(map(len, answers)) == list(map(len, logprobs))
        )


def plain_prompts(lm: LanguageModel, questions: Sequence[str]) -> list[list[int]]:
    """Return the prompts of questions without a system prompt."""
    return lm.prompts([[{"role": "user", "content": question}] for question in questions])


@torch.no_grad()
def answer_logprobs(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], rows_per_pass: int
) -> list[list[float]]:
    """Return the log-probability of each token of each answer at temperature 1, from dense rows: right for any."""
    rows: list[list[float]] = []
    for start in range(0, len(prompts), rows_per_pass):
        some = answers[start : start + rows_per_pass]
        width = max(map(len, some))
        ids = torch.tensor([[*answer, *[0] * (width - len(answer))] for answer in some], device=lm.device)
        lengths = torch.tensor([len(answer) for answer in some], device=lm.device)
        mask = length_mask(lengths, width)
        tokens = Tokens(*left_pad(prompts[start : start + rows_per_pass], lm.pad_id, lm.device), ids, mask)
        with in_precision(lm.model):
            logprobs = DENSE.logprobs(lm.model, tokens, 1.0)
        rows += [row[: len(answer)] for row, answer in zip(logprobs.tolist(), some, strict=True)]
    return rows
