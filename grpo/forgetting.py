"""How far a policy has moved on prompts that it is not trained on, from the model that its run started from.

That model answers some unrelated questions once, greedily. Its answers and their log-probabilities are kept, so that
no second model is needed. The drift is the mean over the answers' tokens of

    log p_start(token | before) − log p_now(token | before)        nats a token

0 at the start, and above it once the policy finds those answers less likely. Were the answers samples, this would be
an unbiased estimate of KL(start ‖ policy) a token (DESIGN: what is forgotten). Greedy answers make it repeatable but
look at the likeliest tokens only: it is no KL, can be below 0 (a policy that only becomes surer of the same answers),
and says nothing of what else the model might have said.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from grpo.greedy import greedy
from grpo.logprobs import Tokens, completion_logprobs
from grpo.metrics import is_count, is_list_of
from grpo.models import LanguageModel, precision
from grpo.sampling import left_pad

ANSWER_TOKENS = 24  # of each answer at most


@dataclass(frozen=True)
class StartingAnswers:
    """What the starting model answered: token ids of prompts and answers, and each answer's log-probabilities."""

    prompts: list[list[int]]
    answers: list[list[int]]  # the end token included
    logprobs: list[list[float]]  # of the answers' tokens, float32

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint has them; floats come back from JSON as they were."""
        return asdict(self)

    @classmethod
    def ask(cls, lm: LanguageModel, questions: Sequence[str], limit: int) -> "StartingAnswers":
        """Have a model answer the questions, greedily, at most `limit` at a time."""
        prompts = prompts_of(lm, questions)
        with precision(lm.device):
            found = greedy(lm.model, prompts, ANSWER_TOKENS, lm.end_ids, lm.pad_id, limit, False)
        answers = [row[:n] for row, n in zip(found.ids.tolist(), found.lengths.tolist(), strict=True)]
        return cls(prompts, answers, logprobs_of(lm, prompts, answers, limit))

    def same_prompts(self, lm: LanguageModel, questions: Sequence[str]) -> bool:
        """Whether a model would be asked in the same tokens, so that these are answers to it."""
        return prompts_of(lm, questions) == self.prompts

    def drift(self, lm: LanguageModel, limit: int) -> float | None:
        """Nats a token; None where a log-probability is not finite."""
        now = logprobs_of(lm, self.prompts, self.answers, limit)
        differences = [x - y for a, b in zip(self.logprobs, now, strict=True) for x, y in zip(a, b, strict=True)]
        drift = math.fsum(differences) / len(differences)
        return drift if math.isfinite(drift) else None


def prompts_of(lm: LanguageModel, questions: Sequence[str]) -> list[list[int]]:
    """The questions asked in plain text, without a system prompt."""
    return lm.prompts([[{"role": "user", "content": question}] for question in questions])


@torch.no_grad()
def logprobs_of(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], limit: int
) -> list[list[float]]:
    """The log-probability of each token of each answer at temperature 1, by the dense path, which all models have."""
    rows: list[list[float]] = []
    for start in range(0, len(prompts), limit):
        some = answers[start : start + limit]
        width = max(map(len, some))
        ids = torch.tensor([[*answer, *[0] * (width - len(answer))] for answer in some], device=lm.device)
        lengths = torch.tensor([len(answer) for answer in some], device=lm.device)
        mask = torch.arange(width, device=lm.device) < lengths[:, None]
        tokens = Tokens(*left_pad(prompts[start : start + limit], lm.pad_id, lm.device), ids, mask)
        with precision(lm.device):
            logprobs, _ = completion_logprobs(lm.model, tokens, 1.0, shared=False)
        rows += [row[: len(answer)] for row, answer in zip(logprobs.tolist(), some, strict=True)]
    return rows


def are_answers(value: Any) -> bool:
    """Whether a value is what `to_dict` gives, as far as lengths and types go."""
    if not isinstance(value, Mapping) or set(value) != {"prompts", "answers", "logprobs"}:
        return False
    prompts, answers, logprobs = value["prompts"], value["answers"], value["logprobs"]
    return (
        all(is_list_of(lambda row: is_list_of(is_count, row) and row, rows) for rows in (prompts, answers))
        and is_list_of(lambda row: is_list_of(lambda x: isinstance(x, float) and math.isfinite(x), row), logprobs)
        and len(prompts) == len(answers) > 0
        and list(map(len, answers)) == list(map(len, logprobs))
    )
