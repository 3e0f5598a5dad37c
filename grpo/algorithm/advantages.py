"""From rewards to advantages. Pure functions, in float64: rewards of 1e8 that differ by 1 are equal in float32."""

from collections.abc import Callable

import torch
from torch import Tensor

STD_FLOOR = 1e-4

# what deviations from the group's mean are divided by, from `groups` (N, G) and which of them count
SCALES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "group": lambda groups, counts: _std(groups, counts, 1) + STD_FLOOR,
    "batch": lambda groups, counts: _std(groups, counts, None) + STD_FLOOR,  # REINFORCE++, arXiv:2501.03262
    "none": lambda groups, counts: torch.ones_like(groups[:, :1]),  # Dr. GRPO, arXiv:2503.20783, section 3.1
}


def group_advantages(rewards: Tensor, num_generations: int, scale: str = "group") -> Tensor:
    """Return group-relative advantages, (B,) float32, from `rewards` (B,), group-major.

    (r − mean) / (std + 1e-4) within each group of G, std with G − 1: DeepSeekMath, arXiv:2402.03300,
    section 4.1.2. With `scale` "batch" the std is that of all B rewards; with "none" it is r − mean, so that groups
    of little spread are not blown up. Exactly 0 for a group whose rewards are all equal: in floating point the mean
    of eight rewards of 0.2 is off by one unit in the last place, and dividing that residue by the floor makes a
    signal.
    A reward of NaN means that none applies to the completion: it has no part in mean and std, and its advantage is 0.

    Raises ValueError for G below 2, whose std is not defined.
    """
    if num_generations < 2:
        raise ValueError(f"num_generations is {num_generations}; a group needs at least 2 to be compared")
    groups = rewards.double().view(-1, num_generations)  # (N, G)
    counts = ~groups.isnan()
    advantages = (groups - groups.nanmean(1, keepdim=True)) / SCALES[scale](groups, counts)
    return torch.where(~tied_groups(groups)[:, None] & counts, advantages, 0.0).view(-1).float()


def decoupled_advantages(parts: Tensor, weights: Tensor, num_generations: int, scale: str = "group") -> Tensor:
    """Return advantages, (B,) float32, of reward parts (B, K) that are compared in the group one by one.

    A part is its reward times its weight. Each reward, without its weight, gets its own group-relative advantage;
    their sum, weighted by `weights` (K,), has mean 0 and is divided by its standard deviation over the batch: GDPO,
    arXiv:2601.05242, as in TRL. Two completions of equal total differ here if their parts do.
    """
    total = torch.zeros(len(parts), dtype=torch.float64)
    for part, weight in zip(parts.double().unbind(1), weights.tolist(), strict=True):
        if weight:
            total += weight * group_advantages(part / weight, num_generations, scale).double()
    return (total / (total.std() + STD_FLOOR)).float()


def tied_groups(groups: Tensor) -> Tensor:
    """Return which groups (N, G) have equal rewards, (N,) bool; NaN, which is no reward, has no part in it."""
    return groups.nan_to_num(nan=-torch.inf).amax(1) <= groups.nan_to_num(nan=torch.inf).amin(1)


def _std(groups: Tensor, counts: Tensor, dim: int | None) -> Tensor:
    """Return the standard deviation, with n − 1, of the rewards that count: (N, 1), or a scalar of all."""
    deviations = torch.where(counts, groups - groups.nanmean(dim, keepdim=True), 0.0)
    n = counts.sum(dim, keepdim=True)
    return (deviations.square().sum(dim, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
