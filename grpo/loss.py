"""The GRPO objective, as pure functions of log-probabilities.

Per token (DeepSeekMath, arXiv:2402.03300, equation 3; Schulman's k3 from equation 4):

    objective = min(ratio · A, clip(ratio, 1 − ε, 1 + ε) · A) − β · KL

averaged over a completion's tokens, then over the completions; the loss is its negative. The published variants are
settings: another average, one ratio a completion, a wider range upwards. All arguments are (B, C) float32 unless said
otherwise, all results finite wherever the inputs are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.config import TrainConfig

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far outside anything a run survives, and still finite


def token_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 for each token: exp(Δ) − Δ − 1 with Δ = ref_logprobs − logprobs; nats, never negative.

    On samples from the policy its mean is KL(policy ‖ reference) (http://joschu.net/blog/kl-approx.html).
    As a loss its gradient on the first pass, in expectation, is that of KL(reference ‖ policy). With Δ the
    other way round it would estimate χ² − KL, whose gradient grows without bound. Δ is clamped before the
    exponential: a clamp after it still gives 0 · inf = NaN in the gradient.
    """
    delta = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return delta.exp() - delta - 1


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """exp(logprobs − old_logprobs): the policy against the one that sampled; exactly 1 where they are equal."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """One ratio a completion, the geometric mean of those of its tokens, in every column (B, C).

    exp of the mean of logprobs − old_logprobs over the completion: GSPO, arXiv:2507.18071, equation 7.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).sum(-1, keepdim=True)  # (B, 1)
    mean = log_ratio / mask.sum(-1, keepdim=True).clamp(min=1)
    return mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().expand_as(logprobs)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float) -> Tensor:
    """min(ratio · A, clip(ratio, 1 − ε, 1 + ε_high) · A), to be maximised; `advantages` is (B,).

    The minimum makes it right for both signs of A: no gradient where the ratio has already moved past the
    range in the direction that A asks for, full gradient where it has moved the other way. (PPO,
    arXiv:1707.06347, equation 7; a larger ε_high leaves unlikely tokens more room to grow: DAPO,
    arXiv:2503.14476, section 3.1.)
    """
    a = advantages.unsqueeze(-1)  # (B, 1)
    return torch.minimum(ratio * a, ratio.clamp(1 - epsilon, 1 + epsilon_high) * a)


def loss_average(
    values: Tensor, mask: Tensor, how: str, *, num_completions: int, num_tokens: int, max_new_tokens: int
) -> Tensor:
    """The step's average of `values` (B, C), or the share of it that these rows have.

    "completion": over each completion's own tokens, then over completions (GRPO). "token": over all tokens of the
    step, so that long completions count more (DAPO, arXiv:2503.14476, equation 8). "constant": over the length that
    completions may have, so that no length is favoured (Dr. GRPO, arXiv:2503.20783, section 3.1). Denominators are
    those of the whole step, which makes the sum over micro-batches equal to one large batch.
    """
    of_rows = torch.where(mask, values, 0.0).sum(-1)  # (B,)
    if how == "completion":
        return (of_rows / mask.sum(-1).clamp(min=1)).sum() / num_completions
    return of_rows.sum() / (max(1, num_tokens) if how == "token" else num_completions * max_new_tokens)


@dataclass(frozen=True)
class Loss:
    """A micro-batch's share of the step's loss (a scalar with gradient), and what to log of it."""

    loss: Tensor
    kl: Tensor  # (B, C), no gradient
    ratio: Tensor  # (B, C), no gradient
    clipped: Tensor  # (B, C) bool: the clipped term is the smaller one, so no gradient comes from here


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    config: TrainConfig,
    *,
    num_completions: int,
    num_tokens: int,
) -> Loss:
    """The negated objective, averaged over the step's `num_completions` and `num_tokens`, as far as these rows go.

    `ref_logprobs` is None where no reference is used (β = 0); `completion_mask` is (B, C) bool.
    """
    assert logprobs.shape == old_logprobs.shape == completion_mask.shape
    assert advantages.shape == logprobs.shape[:1]
    if config.ratio == "sequence":
        ratio = sequence_ratio(logprobs, old_logprobs, completion_mask)
    else:
        ratio = policy_ratio(logprobs, old_logprobs)
    surrogate = clipped_surrogate(ratio, advantages, config.epsilon, config.epsilon_high or config.epsilon)
    kl = torch.zeros_like(logprobs) if ref_logprobs is None else token_kl(logprobs, ref_logprobs)
    loss = loss_average(
        config.beta * kl - surrogate,
        completion_mask,
        config.loss_average,
        num_completions=num_completions,
        num_tokens=num_tokens,
        max_new_tokens=config.max_new_tokens,
    )
    clipped = (ratio * advantages.unsqueeze(-1) > surrogate) & completion_mask
    return Loss(loss, kl.detach(), ratio.detach(), clipped)
