"""From prompts to groups of completions.

The prompt is run through the model once and its key/value cache repeated for the G completions of its
group. Tokens are drawn from the plain softmax at the given temperature: no top-k, top-p, min-p or penalties,
whatever the model's generation config says, because the policy that is scored must be the one that sampled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from grpo import ranks
from grpo.cache import Steps
from grpo.graphs import StaticSteps, can_replay
from grpo.memory import gives, passes
from grpo.sharding import is_sharded

WEIGHTS = 2**50  # a distribution as integers that add up to about this
CHECK_EVERY = 4  # tokens, where looking makes the host wait; a pass too many costs more than some looks
LEAVE = 3 / 4  # rows that have ended leave once at most so many are left


@dataclass(frozen=True)
class Completions:
    """Sampled rows, group-major: B = N · G rows, C columns, C the longest completion."""

    ids: Tensor  # (B, C) int64, right-padded
    lengths: Tensor  # (B,) int64, the end token included
    ended: Tensor  # (B,) bool: False where the token limit cut the row off
    logprobs: Tensor  # (B, C) float32 at the sampling temperature, 0 on padding and where decoding was greedy

    @property
    def mask(self) -> Tensor:
        """(B, C) bool: through the first end token, inclusive. From lengths, never from token ids."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        return columns < self.lengths.unsqueeze(-1)

    def to(self, device: torch.device | str) -> "Completions":
        """The same with its tensors there."""
        return Completions(*(tensor.to(device) for tensor in (self.ids, self.lengths, self.ended, self.logprobs)))

    def pick(self, rows: Sequence[int]) -> "Completions":
        """Some rows, in that order, as wide as the longest of them."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        return Completions(self.ids[rows, :width], lengths, self.ended[rows], self.logprobs[rows, :width])


def token_noise(seed: int, step: int, rows: int, columns: int, attempt: int = 0) -> Tensor:
    """The uniforms in [0, 1) that decide a step's tokens, (rows, columns) float64: a function of seed and step.

    `attempt` counts the times that problems of the step were drawn again. Drawn on the CPU, so that every device, and
    a retry after a resume, sees the same ones.
    """
    return torch.from_numpy(np.random.default_rng([seed, step, attempt]).random((rows, columns)))


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as (N, P) int64 ids and (N, P) bool mask, padding on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    return ids.to(device), mask.to(device)


def positions(mask: Tensor) -> Tensor:
    """Position ids for a left-padded mask: 0 at the first token that is not padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def draw_tokens(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """One token for each row of `logits` (B, V), by the inverse of the cumulative softmax at `noise` (B,)."""
    return _draw((logits.float() / temperature).softmax(-1), noise)


def _draw(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The inverse of the cumulative sum of probabilities (B, V) at `noise` (B,).

    Unlike `torch.multinomial`, a row's token does not depend on the other rows of the batch. The sum is one of
    integers, so it is exact on every device: float32 is off by 1e-3 over a vocabulary of 150,000, MPS has no
    float64, and CUDA has no deterministic sum of floats.
    """
    cumulative = (probabilities * WEIGHTS).long().cumsum(-1)  # (B, V)
    total = cumulative[:, -1:]
    target = (noise[:, None] * total).long().minimum(total - 1)
    # the clamp is for logits that are not finite: their token means nothing, but there is one
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)


def prefill(model: PreTrainedModel, ids: Tensor, mask: Tensor, beginning: int = 0) -> tuple[DynamicCache, Tensor]:
    """The cache of N left-padded prompts (N, P), and the logits after them (N, V).

    The `beginning` tokens that all of them begin with, a system prompt for instance, are run once, and each row's
    cache gets them behind its own padding, where they would stand anyway: N · (P − S) + S tokens instead of N · P,
    exact in float32. One row at least must be without padding.
    """
    cache = DynamicCache()
    if beginning:
        padding = (~mask).sum(-1, keepdim=True)  # (N, 1)
        start = ids[padding.argmin()][None, :beginning]  # (1, S), of a row without padding
        places = torch.arange(beginning, device=ids.device)
        ones = torch.ones_like(start)
        model(
            input_ids=start,
            attention_mask=ones,
            position_ids=places[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        source = (places - padding).clamp(min=0)  # (N, S); what comes before a row's first token is masked
        for layer in cache.layers:
            layer.keys, layer.values = (x[0][:, source].transpose(0, 1) for x in (layer.keys, layer.values))
    out = model(
        input_ids=ids[:, beginning:],
        attention_mask=mask.long(),
        position_ids=positions(mask)[:, beginning:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return cache, out.logits[:, -1]


@torch.no_grad()
def can_repeat(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> bool:
    """Whether the cache of a prompt, repeated, goes on as it should: tried on some prompts (N, P), each twice."""
    apart = _after_a_token(model, ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0), 1)
    return gives(lambda: _after_a_token(model, ids, mask, 2), apart)


def _after_a_token(model: PreTrainedModel, ids: Tensor, mask: Tensor, repeats: int) -> Tensor:
    """Log-probabilities (N · repeats, V) after the prompts and their likeliest token."""
    cache, logits = prefill(model, ids, mask)
    logits = Steps(model, cache, mask, repeats, 1)(logits.argmax(-1).repeat_interleave(repeats))
    return logits.float().log_softmax(-1)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    num_generations: int,
    max_new_tokens: int,
    end_ids: Sequence[int],
    temperature: float = 1.0,
    noise: Tensor | None = None,
    shared: bool = True,
    limit: int | None = None,
    beginning: int = 0,
    check_every: int | None = None,
    more: Callable[[bool], bool] | None = None,
    graphs: bool = False,
) -> Completions:
    """`num_generations` completions for each of the N left-padded prompts; greedy where `noise` is None.

    `noise` is (N · G, max_new_tokens) from `token_noise`. Every id of `end_ids` ends a row. With `shared`, each
    prompt is run once and its cache repeated; without, once for every completion. At most `limit` rows at a time.
    All prompts begin with the same `beginning` tokens, which are run once (`prefill`). Greedy rows have no
    log-probabilities. Whether rows have ended is looked at after every `check_every` tokens; the completions are the
    same for any. `more` is then asked whether to go on, given whether any row here runs still: the processes that a
    model is sharded over all do the same number of forward passes. With `graphs`, by CUDA graphs where the model can
    (`grpo.graphs`), but not on several devices, which talk to each other in a pass.
    """
    total, device = prompt_ids.shape[0] * num_generations, prompt_ids.device
    ends = torch.tensor(list(end_ids), device=device)
    check_every = check_every or (1 if device.type == "cpu" else CHECK_EVERY)
    if more is None and is_sharded(model):
        more = ranks.any_of_all
    if noise is not None:
        noise = noise.to(torch.float32 if device.type == "mps" else noise.dtype).to(device)
    parts = []
    for rows in passes(total, num_generations, limit or total):
        prompts = slice(rows.start // num_generations, -(-rows.stop // num_generations))
        ids, mask = prompt_ids[prompts], prompt_mask[prompts]
        repeats = (rows.stop - rows.start) // (prompts.stop - prompts.start)
        if not shared:
            ids, mask = ids.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)
            repeats = 1
        cache, logits = prefill(model, ids, mask, beginning)
        logits = logits.repeat_interleave(repeats, 0)  # (B, V)
        by_graph = graphs and more is None and can_replay(model, cache, mask, repeats, logits)
        steps = (StaticSteps if by_graph else Steps)(model, cache, mask, repeats, max_new_tokens)
        of_rows = None if noise is None else noise[rows]
        parts.append(_decode(steps, logits, max_new_tokens, ends, temperature, of_rows, check_every, more))
    return concatenate(parts)


def _decode(
    steps: Steps | StaticSteps,
    logits: Tensor,
    columns: int,
    ends: Tensor,
    temperature: float,
    noise: Tensor | None,
    check_every: int,
    more: Callable[[bool], bool] | None,
) -> Completions:
    """At most `columns` tokens of each row, the first of them by `logits` (B, V).

    Between two checks everything stays on the device, in tensors of the same shapes: the host waits for nothing. At a
    check, rows that have ended leave if they are enough to make up for copying the cache of the others.
    """
    rows, device = logits.shape[0], logits.device
    ids = torch.zeros(rows, columns, dtype=torch.long, device=device)
    logprobs = torch.zeros(rows, columns, device=device)
    lengths = torch.zeros(rows, dtype=torch.long, device=device)
    ended = torch.ones(rows, dtype=torch.bool, device=device)  # of rows that have left; in the end, of all
    alive = torch.arange(rows, device=device)  # the rows still in the batch
    running = torch.ones_like(ended)  # of those in the batch
    for column in range(columns):
        if noise is None:
            tokens = logits.argmax(-1)
        else:
            probabilities = (logits.float() / temperature).softmax(-1)
            tokens = _draw(probabilities, noise[alive, column])
            chosen = probabilities.gather(-1, tokens[:, None]).squeeze(-1).log()
            logprobs[alive, column] = torch.where(running, chosen, 0.0)
        ids[alive, column] = torch.where(running, tokens, 0)
        lengths[alive] += running
        running = running & ~torch.isin(tokens, ends)
        if column == columns - 1:
            break
        if (column + 1) % check_every == 0:
            left = int(running.sum())
            if not (left if more is None else more(left > 0)):
                break
            if steps.can_shrink and left <= len(alive) * LEAVE:
                stay = running.nonzero().squeeze(-1) if left else alive.new_zeros(1)  # one at least, for `more`
                steps.keep(stay)
                alive, running, tokens = alive[stay], running[stay], tokens[stay]
        logits = steps(tokens)
    ended[alive] = ~running
    longest = int(lengths.max())
    return Completions(ids[:, :longest], lengths, ended, logprobs[:, :longest])


def concatenate(parts: Sequence[Completions]) -> Completions:
    """The rows of all parts, padded to the longest."""
    width = max(part.ids.shape[1] for part in parts)
    ids, logprobs = (
        torch.cat([pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])
        for tensors in ([part.ids for part in parts], [part.logprobs for part in parts])
    )
    return Completions(ids, torch.cat([p.lengths for p in parts]), torch.cat([p.ended for p in parts]), logprobs)
