"""The GRPO objective, as pure functions of log-probabilities.

Per token (DeepSeekMath, arXiv:2402.03300, equation 3; Schulman's k3 from equation 4):

    objective = min(ratio · A, clip(ratio, 1 − ε, 1 + ε) · A) − β · KL

averaged over a completion's tokens, then over the completions; the loss is its negative. All arguments are
(B, C) float32 unless said otherwise, all results finite wherever the inputs are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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


def clipped_surrogate(ratio: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """min(ratio · A, clip(ratio, 1 − ε, 1 + ε) · A), to be maximised; `advantages` is (B,).

    The minimum makes it right for both signs of A: no gradient where the ratio has already moved past the
    range in the direction that A asks for, full gradient where it has moved the other way. (PPO,
    arXiv:1707.06347, equation 7.)
    """
    a = advantages.unsqueeze(-1)  # (B, 1)
    return torch.minimum(ratio * a, ratio.clamp(1 - epsilon, 1 + epsilon) * a)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` over the True places of `mask`; 0 where there are none."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def completion_average(values: Tensor, mask: Tensor, num_completions: int) -> Tensor:
    """Average over each completion's own tokens, then over the `num_completions` of the whole step.

    Dividing by the step's count and not by the rows at hand makes the sum over micro-batches equal to one
    large batch.
    """
    lengths = mask.sum(-1).clamp(min=1)  # (B,)
    return (torch.where(mask, values, 0.0).sum(-1) / lengths).sum() / num_completions


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
    *,
    epsilon: float,
    beta: float,
    num_completions: int,
) -> Loss:
    """The negated objective, summed over this micro-batch, over the step's `num_completions`.

    `ref_logprobs` is None where no reference is used (β = 0); `completion_mask` is (B, C) bool.
    """
    assert logprobs.shape == old_logprobs.shape == completion_mask.shape
    assert advantages.shape == logprobs.shape[:1]
    ratio = policy_ratio(logprobs, old_logprobs)
    surrogate = clipped_surrogate(ratio, advantages, epsilon)
    kl = torch.zeros_like(logprobs) if ref_logprobs is None else token_kl(logprobs, ref_logprobs)
    loss = completion_average(beta * kl - surrogate, completion_mask, num_completions)
    clipped = (ratio * advantages.unsqueeze(-1) > surrogate) & completion_mask
    return Loss(loss, kl.detach(), ratio.detach(), clipped)
