"""Sample groups of completions from prompts.

Tokens are drawn from the plain softmax at the given temperature: no top-k, top-p, min-p or penalties, whatever the
model's generation config says, because the policy that is scored must be the policy that sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from grpo.generation.decoding import Decoder, Decoding
from grpo.runtime.device import TRAITS
from grpo.runtime.microbatch import split_microbatches
from grpo.scoring.scorer import scaled
from grpo.scoring.tokens import length_mask, prompts_of

# This many probabilities fit into a CPU's cache, each in float32 and as two integers.
CACHE_PROBABILITIES = 2**17
# On other devices this many are processed at once. They take 20 bytes each, so 320 MiB.
DEVICE_PROBABILITIES = 2**24
QUANTA = 2**50  # Probabilities are multiplied by this and cut to integers, so that their sums are exact.
CHECK_EVERY = 4  # tokens between checks for ended rows, where a check makes the host wait for the device
SHRINK_TO = 3 / 4  # Ended rows are dropped once at most 3/4 of the batch is running, and again at 3/4 of the rest.


@dataclass(frozen=True)
class Completions:
    """Sampled completions, on the CPU, group-major: B = N · G rows and C columns. The longest one has C tokens."""

    ids: Tensor  # (B, C) int64, right-padded
    lengths: Tensor  # (B,) int64, number of tokens, end token included
    ended: Tensor  # (B,) bool: False if the token limit cut the row off
    logprobs: Tensor  # (B, C) float32 at the sampling temperature; 0 on padding and after greedy decoding

    @property
    def mask(self) -> Tensor:
        """Return the mask (B, C) bool of tokens through the first end token. It depends on lengths, not on ids."""
        return length_mask(self.lengths, self.ids.shape[1])

    def rows(self, with_end: bool = True) -> list[list[int]]:
        """Return the token ids of each completion, with or without its end token."""
        lengths = self.lengths if with_end else self.lengths - self.ended.long()
        return [ids[:n] for ids, n in zip(self.ids.tolist(), lengths.tolist(), strict=True)]

    def pick(self, rows: Sequence[int]) -> "Completions":
        """Return these rows, in this order, with as many columns as the longest of them needs."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        return Completions(self.ids[rows, :width], lengths, self.ended[rows], self.logprobs[rows, :width])


@dataclass(frozen=True)
class SamplingParams:
    """How to complete a prompt."""

    max_tokens: int
    stop_ids: Sequence[int]  # every id that ends a completion
    n: int = 1  # completions per prompt
    temperature: float = 1.0  # sampling temperature; greedy decoding ignores it


@dataclass(frozen=True)
class Generator:
    """A model that completes prompts: `Generator(model, decoder)(prompt_ids, prompt_mask, params, uniforms)`."""

    model: PreTrainedModel
    decoder: Decoder = field(default_factory=Decoder)
    check_every: int = 0  # tokens between checks for ended rows, which change no completion; 0: depends on device

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
        """Return `params.n` completions of each of N left-padded prompts (N, P), on any device.

        `uniforms` (N · n, max_tokens) come from `sampling_uniforms`; if they are None, decoding is greedy. At most
        `rows_per_pass` rows, by default all, run together. The first `common_prefix` tokens, which must be the same
        in all prompts, run once.
        """
        n, device = params.n, self.model.device
        prompt_ids, prompt_mask = prompt_ids.to(device), prompt_mask.to(device)
        total = len(prompt_ids) * n
        if uniforms is not None:
            uniforms = uniforms.to(uniforms.dtype if TRAITS[device.type].has_float64 else torch.float32).to(device)
        parts = []
        for rows in split_microbatches(total, n, rows_per_pass or total):
            prompts = prompts_of(rows, n)
            ids, mask = prompt_ids[prompts], prompt_mask[prompts]
            repeats = (rows.stop - rows.start) // len(ids)
            decoding, logits = self.decoder.begin(self.model, ids, mask, repeats, params.max_tokens, common_prefix)
            parts.append(self._decode(decoding, logits, params, None if uniforms is None else uniforms[rows]))
        return parts[0] if len(parts) == 1 else concatenate(parts)

    def _decode(
        self, decoding: Decoding, logits: Tensor, params: SamplingParams, uniforms: Tensor | None
    ) -> Completions:
        """Decode at most `max_tokens` tokens of each row, the first from `logits` (B, V).

        Between two checks for ended rows, the host never waits for the device. Dropping ended rows means copying the
        cache of all other rows, so a check drops them only if there are enough of them to save time.
        """
        rows, columns, device = logits.shape[0], params.max_tokens, logits.device
        ends = torch.tensor(list(params.stop_ids), device=device)
        check_every = self.check_every or (CHECK_EVERY if TRAITS[device.type].is_queued else 1)
        ids = torch.zeros(rows, columns, dtype=torch.long, device=device)
        logprobs = torch.zeros(rows, columns, device=device)
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        ended = torch.ones(rows, dtype=torch.bool, device=device)  # True for dropped rows; the others are set last
        decoded = torch.arange(rows, device=device)  # numbers of the rows that have not been dropped
        running = torch.ones_like(ended)  # for each row in `decoded`: True until it has ended
        for column in range(columns):
            if uniforms is None:
                tokens = logits.argmax(-1)
            else:
                tokens, token_logprobs = draw(logits, uniforms[decoded, column], params.temperature)
                logprobs[decoded, column] = torch.where(running, token_logprobs, 0.0)
            ids[decoded, column] = torch.where(running, tokens, 0)
            lengths[decoded] += running
            running = running & ~torch.isin(tokens, ends)
            if column == columns - 1:
                break
            if (column + 1) % check_every == 0:
                left = int(running.sum())
                if not self.decoder.ranks.any(left > 0):
                    break
                size = shrunk(len(decoded), left)
                if decoding.can_shrink and size < len(decoded):
                    # The running rows and the first ended ones; unlike `nonzero`, this reads no size.
                    stay = (~running).long().argsort(stable=True)[:size].sort().values
                    decoding.keep(stay)
                    decoded, running, tokens = decoded[stay], running[stay], tokens[stay]
            logits = decoding(tokens)
        ended[decoded] = ~running
        ids, lengths, ended, logprobs = (x.cpu() for x in (ids, lengths, ended, logprobs))
        longest = int(lengths.max())
        return Completions(ids[:, :longest], lengths, ended, logprobs[:, :longest])


def sampling_uniforms(seed: int, step: int, rows: int, columns: int, attempt: int = 0) -> Tensor:
    """Return the uniform numbers in [0, 1) that decide the tokens of a step, (rows, columns) float64.

    They depend only on the seed, the step and `attempt`: 0 for the first draw, then the number of the redraw of tied
    groups. They are drawn on the CPU, so they are the same on every device and after a resume.
    """
    return torch.from_numpy(np.random.default_rng([seed, step, attempt]).random((rows, columns)))


def draw(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw a token for each row of logits (B, V) by `uniforms` (B,); return tokens and log-probabilities, (B,) each.

    Few rows are processed at a time, to limit memory; a CPU processes as many as fit into its cache.
    """
    most = CACHE_PROBABILITIES if logits.device.type == "cpu" else DEVICE_PROBABILITIES
    rows = max(1, most // logits.shape[-1])
    tokens, logprobs = [], []
    for few_logits, few_uniforms in zip(logits.split(rows), uniforms.split(rows), strict=True):
        probabilities = scaled(few_logits, temperature).softmax(-1)
        tokens.append(sample_inverse_cdf(probabilities, few_uniforms))
        logprobs.append(probabilities.gather(-1, tokens[-1][:, None]).squeeze(-1).log())
    return torch.cat(tokens), torch.cat(logprobs)


def sample_inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token for each row of probabilities (B, V): the first with a cumulative sum above `uniforms` (B,).

    Unlike with `torch.multinomial`, a row's token does not depend on the other rows of the batch. Integers are
    summed, which is exact on every device. A sum in float32 would be off by 1e-3 over a vocabulary of 150,000, MPS
    has no float64, and CUDA has no deterministic cumulative sum of floats.
    """
    cumulative = (probabilities * QUANTA).long().cumsum(-1)  # (B, V)
    total = cumulative[:, -1:]
    target = (uniforms[:, None] * total).long().minimum(total - 1)
    # For logits that are not finite no token is meaningful; the clamp keeps the index inside the vocabulary.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)


def shrunk(rows: int, running: int) -> int:
    """Return how many rows to keep: all running rows, and at least one, as other ranks may still need passes.

    Only a few numbers of rows can occur, because a device's library makes new kernels for each number.
    """
    while rows > 1 and running <= (fewer := int(rows * SHRINK_TO)):
        rows = fewer
    return rows


def concatenate(parts: Sequence[Completions]) -> Completions:
    """Join the rows of all parts, padded to the longest completion."""
    width = max(part.ids.shape[1] for part in parts)
    return Completions(
        ids=torch.cat([pad(part.ids, (0, width - part.ids.shape[1])) for part in parts]),
        lengths=torch.cat([part.lengths for part in parts]),
        ended=torch.cat([part.ended for part in parts]),
        logprobs=torch.cat([pad(part.logprobs, (0, width - part.logprobs.shape[1])) for part in parts]),
    )
