"""Turn rewards into advantages: pure functions, in float64 because 1e8 and 1e8 + 1 are equal in float32."""

from collections.abc import Callable

import torch
from torch import Tensor

STD_FLOOR = 1e-4  # added to standard deviations, so that the divisor is never 0

# Each function returns the number that deviations from a group's mean are divided by, (N, 1) or (1, 1). Its arguments
# are the rewards (N, G) and a mask (N, G) of the completions that have a reward.
SCALES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "group": lambda groups, applies: _std(groups, applies, 1) + STD_FLOOR,
    "batch": lambda groups, applies: _std(groups, applies, None) + STD_FLOOR,  # REINFORCE++, arXiv:2501.03262
    "none": lambda groups, applies: torch.ones_like(groups[:, :1]),  # Dr. GRPO, arXiv:2503.20783, section 3.1
}


def group_advantages(rewards: Tensor, num_generations: int, scale: str = "group") -> Tensor:
    """Return the group-relative advantages, (B,) float32, of group-major `rewards` (B,).

    (r − mean) / (std + 1e-4) within each group of G, std with G − 1: DeepSeekMath, arXiv:2402.03300, section 4.1.2.
    With `scale` "batch" the std is taken over all B rewards; with "none" the deviations are not divided.

    A tied group, whose rewards are all equal, gets exactly 0. Otherwise a rounding error of its mean, divided by a
    std of almost 0, could become an advantage. A completion that no reward applies to has the reward NaN: it is left
    out of mean and std, and its advantage is 0.

    Raises ValueError for G below 2, where the std is not defined.
    """
    if num_generations < 2:
        raise ValueError(f"num_generations is {num_generations}; a group needs at least 2 completions")
    groups = rewards.double().view(-1, num_generations)  # (N, G)
    applies = ~groups.isnan()
    advantages = (groups - groups.nanmean(1, keepdim=True)) / SCALES[scale](groups, applies)
    return torch.where(~tied_groups(groups)[:, None] & applies, advantages, 0.0).view(-1).float()


def decoupled_advantages(parts: Tensor, weights: Tensor, num_generations: int, scale: str = "group") -> Tensor:
    """Return advantages, (B,) float32, for K rewards, comparing each reward separately within the groups.

    `parts` (B, K) are the rewards times their `weights` (K,). Group-relative advantages are computed for each reward
    without its weight, and added up with the weights. The sum is divided by its standard deviation over the batch:
    GDPO, arXiv:2601.05242, as in TRL. So completions with equal totals but different parts can differ in advantage.
    """
    total = torch.zeros(len(parts), dtype=torch.float64)
    for part, weight in zip(parts.double().unbind(1), weights.tolist(), strict=True):
        if weight:
            total += weight * group_advantages(part / weight, num_generations, scale).double()
    return (total / (total.std() + STD_FLOOR)).float()


def tied_groups(groups: Tensor) -> Tensor:
    """Return which of `groups` (N, G) have equal rewards, (N,) bool. Completions with the reward NaN are ignored."""
    return groups.nan_to_num(nan=-torch.inf).amax(1) <= groups.nan_to_num(nan=torch.inf).amin(1)


def _std(groups: Tensor, applies: Tensor, dim: int | None) -> Tensor:
    """Return the sample standard deviation of the rewards that apply: (N, 1) for `dim` 1, (1, 1) for None."""
    deviations = torch.where(applies, groups - groups.nanmean(dim, keepdim=True), 0.0)
    n = applies.sum(dim, keepdim=True)
    return (deviations.square().sum(dim, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
