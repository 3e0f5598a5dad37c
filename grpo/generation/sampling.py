"""From prompts to groups of completions.

The prompt is run through the model once and its key/value cache expanded to the G completions of its group. Tokens
are drawn from the plain softmax at the given temperature: no top-k, top-p, min-p or penalties, whatever the model's
generation config says, because the policy that is scored must be the one that sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from grpo.generation.cuda_graphs import CudaGraphDecoding
from grpo.generation.decoding import CachedDecoding, Decoder
from grpo.runtime.microbatch import split_microbatches
from grpo.scoring.scorer import scaled
from grpo.scoring.tokens import length_mask, prompts_of

CACHE_PROBABILITIES = 2**17  # that fit into a CPU's cache, each in float32 and as two integers
QUANTA = 2**50  # a distribution is turned into integers that add up to about this
CHECK_EVERY = 4  # tokens between checks for ended rows, on devices where each check makes the host wait
SHRINK_TO = 3 / 4  # drop ended rows once at most this share of them is running; then again at 3/4 of that


@dataclass(frozen=True)
class Completions:
    """Sampled rows, group-major: B = N · G rows, C columns, C the longest completion."""

    ids: Tensor  # (B, C) int64, right-padded
    lengths: Tensor  # (B,) int64, the end token included
    ended: Tensor  # (B,) bool: False if the token limit cut the row off
    logprobs: Tensor  # (B, C) float32 at the sampling temperature, 0 on padding and after greedy decoding

    @property
    def mask(self) -> Tensor:
        """Return (B, C) bool: through the first end token, inclusive. From lengths, never from token ids."""
        return length_mask(self.lengths, self.ids.shape[1])

    def rows(self, with_end: bool = True) -> list[list[int]]:
        """Return the ids of each completion, with or without the token that ended it."""
        lengths = self.lengths if with_end else self.lengths - self.ended.long()
        return [ids[:n] for ids, n in zip(self.ids.tolist(), lengths.tolist(), strict=True)]

    def to(self, device: torch.device | str) -> "Completions":
        """Return a copy with all tensors on `device`."""
        return Completions(
            self.ids.to(device), self.lengths.to(device), self.ended.to(device), self.logprobs.to(device)
        )

    def pick(self, rows: Sequence[int]) -> "Completions":
        """Return some rows, in that order, as wide as the longest of them."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        return Completions(self.ids[rows, :width], lengths, self.ended[rows], self.logprobs[rows, :width])


@dataclass(frozen=True)
class SamplingParams:
    """How to complete a prompt. `stop_ids` has every id that ends a completion."""

    max_tokens: int
    stop_ids: Sequence[int]
    n: int = 1  # completions a prompt
    temperature: float = 1.0  # of sampling; greedy decoding has none


@dataclass(frozen=True)
class Generator:
    """A model that completes prompts: `Generator(model, decoder)(prompt_ids, prompt_mask, params, uniforms)`."""

    model: PreTrainedModel
    decoder: Decoder = field(default_factory=Decoder)
    check_every: int = 0  # tokens between checks for ended rows, the same result for any; 0: by device

    @torch.no_grad()
    def __call__(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        params: SamplingParams,
        uniforms: Tensor | None = None,
        rows_per_pass: int | None = None,
        common_prefix: int = 0,
    ) -> Completions:
        """Return `params.n` completions for each of N left-padded prompts (N, P); greedy without `uniforms`.

        `uniforms` (N · n, max_tokens) come from `sampling_uniforms`. At most `rows_per_pass` rows are run at a time,
        by default all. All prompts begin with the same `common_prefix` tokens, which are run once.
        """
        group, device = params.n, prompt_ids.device
        total = len(prompt_ids) * group
        if uniforms is not None:
            uniforms = uniforms.to(torch.float32 if device.type == "mps" else uniforms.dtype).to(device)
        parts = []
        for rows in split_microbatches(total, group, rows_per_pass or total):
            prompts = prompts_of(rows, group)
            ids, mask = prompt_ids[prompts], prompt_mask[prompts]
            repeats = (rows.stop - rows.start) // (prompts.stop - prompts.start)
            decoding, logits = self.decoder.begin(self.model, ids, mask, repeats, params.max_tokens, common_prefix)
            parts.append(self._decode(decoding, logits, params, None if uniforms is None else uniforms[rows]))
        return concatenate(parts)

    def _decode(
        self,
        decoding: CachedDecoding | CudaGraphDecoding,
        logits: Tensor,
        params: SamplingParams,
        uniforms: Tensor | None,
    ) -> Completions:
        """Decode at most `max_tokens` tokens of each row, the first of them from `logits` (B, V).

        Between two checks all stays on the device, in tensors of constant shape, and the host waits for nothing. At a
        check, rows that have ended are dropped if they are enough to make up for copying the cache of the others.
        """
        rows, columns, device = logits.shape[0], params.max_tokens, logits.device
        ends = torch.tensor(list(params.stop_ids), device=device)
        check_every = self.check_every or (1 if device.type == "cpu" else CHECK_EVERY)
        ids = torch.zeros(rows, columns, dtype=torch.long, device=device)
        logprobs = torch.zeros(rows, columns, device=device)
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        ended = torch.ones(rows, dtype=torch.bool, device=device)  # of dropped rows; in the end, of all
        alive = torch.arange(rows, device=device)  # the rows that are still decoded
        running = torch.ones_like(ended)  # which of those have not ended
        for column in range(columns):
            if uniforms is None:
                tokens = logits.argmax(-1)
            else:
                tokens, chosen = draw(logits, uniforms[alive, column], params.temperature)
                logprobs[alive, column] = torch.where(running, chosen, 0.0)
            ids[alive, column] = torch.where(running, tokens, 0)
            lengths[alive] += running
            running = running & ~torch.isin(tokens, ends)
            if column == columns - 1:
                break
            if (column + 1) % check_every == 0:
                left = int(running.sum())
                if not self.decoder.ranks.any(left > 0):
                    break
                size = shrunk(len(alive), left)
                if decoding.can_shrink and size < len(alive):
                    ended_so_far = (~running).long().cumsum(0)
                    stay = (running | (ended_so_far <= size - left)).nonzero().squeeze(-1)
                    decoding.keep(stay)
                    alive, running, tokens = alive[stay], running[stay], tokens[stay]
            logits = decoding(tokens)
        ended[alive] = ~running
        longest = int(lengths.max())
        return Completions(ids[:, :longest], lengths, ended, logprobs[:, :longest])


def sampling_uniforms(seed: int, step: int, rows: int, columns: int, attempt: int = 0) -> Tensor:
    """Return the uniforms in [0, 1) that decide a step's tokens, (rows, columns) float64, from seed and step.

    `attempt` counts how often problems of the step were drawn again. They are drawn on the CPU, so that every device,
    and a retry after a resume, sees the same ones.
    """
    return torch.from_numpy(np.random.default_rng([seed, step, attempt]).random((rows, columns)))


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token for each row of logits (B, V) at `uniforms` (B,); return them and their log-probabilities.

    On a CPU, a few rows at a time go through all that is done with them, so that they stay in its cache.
    """
    rows = max(1, CACHE_PROBABILITIES // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    tokens, logprobs = [], []
    for few_logits, few_uniforms in zip(logits.split(rows), uniforms.split(rows), strict=True):
        probabilities = scaled(few_logits, temperature).softmax(-1)
        tokens.append(sample_inverse_cdf(probabilities, few_uniforms))
        logprobs.append(probabilities.gather(-1, tokens[-1][:, None]).squeeze(-1).log())
    return torch.cat(tokens), torch.cat(logprobs)


def sample_inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token for each row of probabilities (B, V): the inverse of their cumulative sum at `uniforms` (B,).

    Unlike `torch.multinomial`, a row's token does not depend on the other rows of the batch. The sum is one of
    integers, so it is exact on every device: float32 is off by 1e-3 over a vocabulary of 150,000, MPS has no
    float64, and CUDA has no deterministic sum of floats.
    """
    cumulative = (probabilities * QUANTA).long().cumsum(-1)  # (B, V)
    total = cumulative[:, -1:]
    target = (uniforms[:, None] * total).long().minimum(total - 1)
    # the clamp is for logits that are not finite: their token means nothing, but it must exist
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)


def shrunk(rows: int, running: int) -> int:
    """Return how many of these rows to keep: at least one, for other ranks may still be running.

    Only a few numbers of rows can come of it, because a device's library makes new kernels for each.
    """
    while rows > 1 and running <= (fewer := int(rows * SHRINK_TO)):
        rows = fewer
    return rows


def concatenate(parts: Sequence[Completions]) -> Completions:
    """Join the rows of all parts, padded to the longest."""
    width = max(part.ids.shape[1] for part in parts)
    return Completions(
        ids=torch.cat([pad(part.ids, (0, width - part.ids.shape[1])) for part in parts]),
        lengths=torch.cat([part.lengths for part in parts]),
        ended=torch.cat([part.ended for part in parts]),
        logprobs=torch.cat([pad(part.logprobs, (0, width - part.logprobs.shape[1])) for part in parts]),
    )
