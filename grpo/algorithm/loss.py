"""The GRPO objective, as pure functions of log-probabilities.

Per token (DeepSeekMath, arXiv:2402.03300, equation 3; Schulman's k3 from equation 4):

    objective = min(ratio · A, clip(ratio, 1 − ε, 1 + ε) · A) − β · KL

The objective is averaged over a completion's tokens, then over the completions. The loss is its negative. Its
published variants are settings: each is a function here and a choice in `grpo/config.py`. All arguments are (B, C)
float32 unless stated otherwise. Results are finite if the arguments are. A `mask` (B, C) is True for the tokens that
count.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.config import TrainConfig

MAX_LOG_RATIO = 20.0  # nats; exp(20) = 5e8 is finite, and no useful run comes near it


def token_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return Schulman's k3 for each token: exp(Δ) − Δ − 1 with Δ = ref_logprobs − logprobs; nats, never negative.

    The expected value of k3, on samples from the policy, is KL(policy ‖ reference)
    (http://joschu.net/blog/kl-approx.html). Its expected gradient, in the first inner update, is the gradient of
    KL(reference ‖ policy). With the opposite sign of Δ it would estimate χ² − KL, whose gradient is unbounded.

    Δ is clamped from above before the exponential, because a clamp after it would give 0 · inf = NaN in the gradient.
    It is not clamped from below, because there the linear term pulls back a token that has become too likely.
    """
    delta = (ref_logprobs - logprobs).clamp(max=MAX_LOG_RATIO)
    return delta.exp() - delta - 1


def corrected_kl(kl: Tensor, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Return k3 times the ratio to the policy that sampled; gradients flow through both factors.

    The gradient is an unbiased estimate of the gradient of KL(policy ‖ reference), whichever policy sampled:
    DeepSeek-V3.2, arXiv:2512.02556, section 3.1, equation 7. In the first inner update, where the ratio is 1, the
    gradient with respect to a token's log-probability is −Δ.
    """
    return kl * _exp(logprobs - old_logprobs)


# Each function returns the KL term of the loss. Its arguments are k3, logprobs and old_logprobs.
KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "k3": lambda kl, logprobs, old_logprobs: kl,
    "k3-corrected": corrected_kl,
}


def token_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return exp(logprobs − old_logprobs), the ratio to the policy that sampled; exactly 1 where both are equal."""
    return _exp(logprobs - old_logprobs)


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return the geometric mean of each completion's token ratios, the same in every column, (B, C).

    It is exp of the completion's mean of logprobs − old_logprobs: GSPO, arXiv:2507.18071, equation 7.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).sum(-1, keepdim=True)  # (B, 1)
    mean = log_ratio / mask.sum(-1, keepdim=True).clamp(min=1)
    return _exp(mean).expand_as(logprobs)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


RATIOS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"token": token_ratio, "sequence": sequence_ratio}


def clipped_surrogate(ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float) -> Tensor:
    """Return min(ratio · A, clip(ratio, 1 − ε, 1 + ε_high) · A), to be maximised; `advantages` is (B,).

    A ratio outside the clip range has no gradient if it has moved in the direction of A, and the full gradient if it
    has moved in the other direction (PPO, arXiv:1707.06347, equation 7). A larger ε_high lets unlikely tokens become
    likely faster (DAPO, arXiv:2503.14476, section 3.1).
    """
    a = advantages.unsqueeze(-1)  # (B, 1)
    return torch.minimum(ratio * a, ratio.clamp(1 - epsilon, 1 + epsilon_high) * a)


def cispo_surrogate(logprobs: Tensor, ratio: Tensor, advantages: Tensor, epsilon_high: float) -> Tensor:
    """Return sg(min(ratio, 1 + ε_high)) · A · logprobs, to be maximised; `advantages` is (B,).

    sg stops the gradient, so the ratio only weights the gradient of logprobs, and every token has a gradient. CISPO,
    arXiv:2506.13585, section 3.1, equations 4 and 5; without a lower bound, as in the paper's experiments.
    """
    return ratio.clamp(max=1 + epsilon_high).detach() * advantages.unsqueeze(-1) * logprobs


def gmpo_surrogate(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, epsilon: float, epsilon_high: float
) -> tuple[Tensor, Tensor]:
    """Return A · the geometric mean of a completion's clipped ratios, to be maximised, and which tokens are clipped.

    The first result has the same value in every column of a row, the second is (B, C) bool. The logarithm of a ratio
    is clipped to at most ε_high if A > 0, else to at least −ε. So --epsilon 0.4 is the paper's range (e^−0.4, e^0.4):
    GMPO, arXiv:2507.20673, equation 4 and algorithm 1.
    """
    a = advantages.unsqueeze(-1)  # (B, 1)
    clipped = torch.where(a > 0, log_ratio.clamp(max=epsilon_high), log_ratio.clamp(min=-epsilon))
    total = torch.where(mask, clipped, 0.0).sum(-1, keepdim=True)
    surrogate = a * _exp(total / mask.sum(-1, keepdim=True).clamp(min=1))
    return surrogate.expand_as(log_ratio), (clipped != log_ratio) & mask


@dataclass(frozen=True)
class StepSizes:
    """The denominators of a whole step: with them, micro-batches of any size add up to the same gradient."""

    num_completions: int  # how many completions have a reward
    num_tokens: int  # how many completion tokens count
    max_new_tokens: int


def average_by_completion(values: Tensor, mask: Tensor, sizes: StepSizes) -> Tensor:
    """Average over the tokens of each completion, then over the completions: GRPO."""
    return (_sums(values, mask) / mask.sum(-1).clamp(min=1)).sum() / sizes.num_completions


def average_by_token(values: Tensor, mask: Tensor, sizes: StepSizes) -> Tensor:
    """Average over all tokens of the step, so long completions count more: DAPO, arXiv:2503.14476, equation 8."""
    return _sums(values, mask).sum() / max(1, sizes.num_tokens)


def average_by_constant(values: Tensor, mask: Tensor, sizes: StepSizes) -> Tensor:
    """Divide sums by completions · token limit, so no length is favoured: Dr. GRPO, arXiv:2503.20783, section 3.1."""
    return _sums(values, mask).sum() / (sizes.num_completions * sizes.max_new_tokens)


def _sums(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(-1)  # (B,)


# Each function returns a scalar: what the rows of a micro-batch add to the step's average of `values` (B, C).
AVERAGES: dict[str, Callable[[Tensor, Tensor, StepSizes], Tensor]] = {
    "completion": average_by_completion,
    "token": average_by_token,
    "constant": average_by_constant,
}


@dataclass(frozen=True)
class TokenLoss:
    """The loss of each token, and values to log, (B, C) each; only `loss` has a gradient."""

    loss: Tensor  # the negated objective, not yet averaged
    kl: Tensor
    ratio: Tensor
    clipped: Tensor  # bool: no gradient from the surrogate, only from the KL (CISPO: the gradient's weight is capped)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    config: TrainConfig,
    beta: float,
) -> TokenLoss:
    """Return the negated objective of each token, with values to log; `beta` is the step's weight of the KL.

    `ref_logprobs` is None if there is no reference (β = 0). `advantages` is (B,), `completion_mask` is (B, C) bool.
    """
    assert logprobs.shape == old_logprobs.shape == completion_mask.shape
    assert advantages.shape == logprobs.shape[:1]
    ratio = RATIOS[config.ratio](logprobs, old_logprobs, completion_mask)
    high = config.epsilon_high or config.epsilon
    if config.surrogate == "cispo":
        surrogate = cispo_surrogate(logprobs, ratio, advantages, high)
        clipped = ratio > 1 + high
    elif config.surrogate == "gmpo":
        log_ratio = logprobs - old_logprobs
        surrogate, clipped = gmpo_surrogate(log_ratio, advantages, completion_mask, config.epsilon, high)
    else:
        surrogate = clipped_surrogate(ratio, advantages, config.epsilon, high)
        clipped = ratio * advantages.unsqueeze(-1) > surrogate
    kl = torch.zeros_like(logprobs) if ref_logprobs is None else token_kl(logprobs, ref_logprobs)
    penalty = KL_ESTIMATORS[config.kl_estimator](kl, logprobs, old_logprobs)
    return TokenLoss(beta * penalty - surrogate, kl.detach(), ratio.detach(), clipped & completion_mask)
