"""From rewards to advantages. Pure functions."""

from collections.abc import Callable

from torch import Tensor, ones_like, where, zeros_like

STD_FLOOR = 1e-4

# what deviations from the group's mean are divided by, from `groups` (N, G)
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "group": lambda groups: groups.std(1, keepdim=True) + STD_FLOOR,
    "batch": lambda groups: groups.std() + STD_FLOOR,  # REINFORCE++, arXiv:2501.03262
    "none": lambda groups: ones_like(groups[:, :1]),  # Dr. GRPO, arXiv:2503.20783, section 3.1
}


def group_advantages(rewards: Tensor, num_generations: int, scale: str = "group") -> Tensor:
    """Return group-relative advantages, (B,) float32, from `rewards` (B,), group-major.

    (r − mean) / (std + 1e-4) within each group of G, std with G − 1: DeepSeekMath, arXiv:2402.03300,
    section 4.1.2. With `scale` "batch" the std is that of all B rewards; with "none" it is r − mean, so that groups
    of little spread are not blown up. Exactly 0 for a group whose rewards are all equal: in float32 the mean of eight
    rewards of 0.2 is off by one unit in the last place, and dividing that residue by the floor makes a signal.

    Raises ValueError for G below 2, whose std is not defined.
    """
    if num_generations < 2:
        raise ValueError(f"num_generations is {num_generations}; a group needs at least 2 to be compared")
    groups = rewards.float().view(-1, num_generations)  # (N, G)
    spread = groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)  # (N, 1)
    advantages = (groups - groups.mean(1, keepdim=True)) / SCALES[scale](groups)
    return where(spread > 0, advantages, zeros_like(advantages)).view(-1)
