"""The GRPO objective, as pure functions of log-probabilities.

Per token (DeepSeekMath, arXiv:2402.03300, equation 3; Schulman's k3 from equation 4):

    objective = min(ratio · A, clip(ratio, 1 − ε, 1 + ε) · A) − β · KL

averaged over a completion's tokens, then over the completions; the loss is its negative. The published variants are
settings: each is a function here and a choice in `grpo/config.py`. All arguments are
(B, C) float32 unless said otherwise, all results finite wherever the inputs are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.config import TrainConfig

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far beyond what any run survives, and still finite


def token_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return Schulman's k3 for each token: exp(Δ) − Δ − 1 with Δ = ref_logprobs − logprobs; nats, never negative.

    On samples from the policy its mean is KL(policy ‖ reference) (http://joschu.net/blog/kl-approx.html).
    As a loss its gradient on the first pass, in expectation, is that of KL(reference ‖ policy). With Δ the
    other way round it would estimate χ² − KL, whose gradient grows without bound. Δ is clamped from above, before the
    exponential: a clamp after it still gives 0 · inf = NaN in the gradient, and one of the exponential alone would
    push tokens down that are 20 nats less likely than under the reference. It is not clamped from below, where the
    linear term pulls back a token that the policy is 20 nats surer of.
    """
    delta = (ref_logprobs - logprobs).clamp(max=MAX_LOG_RATIO)
    return delta.exp() - delta - 1


def corrected_kl(kl: Tensor, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Return k3 times the ratio to the policy that sampled, with the gradient of both factors.

    Its gradient is an unbiased estimate of that of KL(policy ‖ reference), whichever policy sampled: DeepSeek-V3.2,
    arXiv:2512.02556, section 3.1, equation 7. On the first pass, where the ratio is 1, it is −Δ a token.
    """
    return kl * _exp(logprobs - old_logprobs)


# the KL term of the loss, from k3, logprobs and old_logprobs
KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "k3": lambda kl, logprobs, old_logprobs: kl,
    "k3-corrected": corrected_kl,
}


def token_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return exp(logprobs − old_logprobs), policy against sampling policy; exactly 1 where they are equal."""
    return _exp(logprobs - old_logprobs)


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return one ratio a completion, the geometric mean of those of its tokens, in every column (B, C).

    exp of the mean of logprobs − old_logprobs over the completion: GSPO, arXiv:2507.18071, equation 7.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).sum(-1, keepdim=True)  # (B, 1)
    mean = log_ratio / mask.sum(-1, keepdim=True).clamp(min=1)
    return _exp(mean).expand_as(logprobs)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


RATIOS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"token": token_ratio, "sequence": sequence_ratio}


def clipped_surrogate(ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float) -> Tensor:
    """Return min(ratio · A, clip(ratio, 1 − ε, 1 + ε_high) · A), to be maximised; `advantages` is (B,).

    The minimum makes it right for both signs of A: no gradient where the ratio has already moved past the
    range in the direction that A asks for, full gradient where it has moved the other way. (PPO,
    arXiv:1707.06347, equation 7; a larger ε_high leaves unlikely tokens more room to grow: DAPO,
    arXiv:2503.14476, section 3.1.)
    """
    a = advantages.unsqueeze(-1)  # (B, 1)
    return torch.minimum(ratio * a, ratio.clamp(1 - epsilon, 1 + epsilon_high) * a)


def cispo_surrogate(logprobs: Tensor, ratio: Tensor, advantages: Tensor, epsilon_high: float) -> Tensor:
    """Return sg(min(ratio, 1 + ε_high)) · A · logprobs, to be maximised; `advantages` is (B,).

    The ratio is a weight without gradient, bounded from above alone, so that no token is left out: CISPO,
    arXiv:2506.13585, section 3.1, equations 4 and 5, without a lower bound as there.
    """
    return ratio.clamp(max=1 + epsilon_high).detach() * advantages.unsqueeze(-1) * logprobs


def gmpo_surrogate(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, epsilon: float, epsilon_high: float
) -> tuple[Tensor, Tensor]:
    """Return A times the geometric mean of a completion's clipped ratios, in every column, to be maximised.

    Also return which tokens are clipped, (B, C) bool. The logarithm of a ratio is clipped, to at most ε_high where
    A > 0 and to at least −ε elsewhere, so --epsilon 0.4 is the (e^−0.4, e^0.4) of the paper: GMPO, arXiv:2507.20673,
    equation 4 and algorithm 1.
    """
    a = advantages.unsqueeze(-1)  # (B, 1)
    clipped = torch.where(a > 0, log_ratio.clamp(max=epsilon_high), log_ratio.clamp(min=-epsilon))
    total = torch.where(mask, clipped, 0.0).sum(-1, keepdim=True)
    surrogate = a * _exp(total / mask.sum(-1, keepdim=True).clamp(min=1))
    return surrogate.expand_as(log_ratio), (clipped != log_ratio) & mask


@dataclass(frozen=True)
class StepSizes:
    """Denominators of a whole step, over all its micro-batches and processes.

    With them, micro-batches of 1 × B and B × 1 give the same gradient.
    """

    num_completions: int  # B
    num_tokens: int  # of the completions, as far as they count
    max_new_tokens: int


def average_by_completion(values: Tensor, mask: Tensor, sizes: StepSizes) -> Tensor:
    """Average over each completion's own tokens, then over completions (GRPO)."""
    return (_sums(values, mask) / mask.sum(-1).clamp(min=1)).sum() / sizes.num_completions


def average_by_token(values: Tensor, mask: Tensor, sizes: StepSizes) -> Tensor:
    """Average over all tokens of the step, so that long completions count more.

    DAPO, arXiv:2503.14476, equation 8.
    """
    return _sums(values, mask).sum() / max(1, sizes.num_tokens)


def average_by_constant(values: Tensor, mask: Tensor, sizes: StepSizes) -> Tensor:
    """Divide by the longest possible length, so that no length is favoured.

    Dr. GRPO, arXiv:2503.20783, section 3.1.
    """
    return _sums(values, mask).sum() / (sizes.num_completions * sizes.max_new_tokens)


def _sums(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(-1)  # (B,)


# each returns the share that these rows have in the step's average of `values` (B, C)
AVERAGES: dict[str, Callable[[Tensor, Tensor, StepSizes], Tensor]] = {
    "completion": average_by_completion,
    "token": average_by_token,
    "constant": average_by_constant,
}


@dataclass(frozen=True)
class TokenLoss:
    """The negated objective of each token, (B, C), before it is averaged, and what to log of it."""

    loss: Tensor  # with gradient
    kl: Tensor  # no gradient
    ratio: Tensor  # no gradient
    clipped: Tensor  # bool: the clipped term is the smaller one, so this token has no gradient (CISPO: a bounded one)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    config: TrainConfig,
    beta: float,
) -> TokenLoss:
    """Return the negated objective of each token; `beta` is that of this step.

    `ref_logprobs` is None without a reference (β = 0); `advantages` is (B,), `completion_mask` (B, C) bool.
    """
    assert logprobs.shape == old_logprobs.shape == completion_mask.shape
    assert advantages.shape == logprobs.shape[:1]
    ratio = RATIOS[config.ratio](logprobs, old_logprobs, completion_mask)
    high = config.epsilon_high or config.epsilon
    if config.surrogate == "cispo":
        surrogate, clipped = cispo_surrogate(logprobs, ratio, advantages, high), ratio > 1 + high
    elif config.surrogate == "gmpo":
        log_ratio = logprobs - old_logprobs
        surrogate, clipped = gmpo_surrogate(log_ratio, advantages, completion_mask, config.epsilon, high)
    else:
        surrogate = clipped_surrogate(ratio, advantages, config.epsilon, high)
        clipped = ratio * advantages.unsqueeze(-1) > surrogate
    kl = torch.zeros_like(logprobs) if ref_logprobs is None else token_kl(logprobs, ref_logprobs)
    penalty = KL_ESTIMATORS[config.kl_estimator](kl, logprobs, old_logprobs)
    return TokenLoss(beta * penalty - surrogate, kl.detach(), ratio.detach(), clipped & completion_mask)
