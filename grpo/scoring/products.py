"""Matrix products that sum over many numbers, such as a vocabulary or all tokens of a pass.

On the GPUs of M1 and M2, a product is wrong if it sums over 32,767 numbers or more and both dimensions of the result
are 16 or more: memory behind the operands is added to the sums. PyTorch's issues #177116 and #193487 report this for
two dimensions, up to torch 2.13, and #195163 for batches, in torch 2.14 too.
"""

import torch
from torch import Tensor

from grpo.runtime.device import TRAITS

SLICE = 2**14  # On a device with such a limit, at most this many numbers are summed at a time.


def product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Return x @ y of (M, K) and (K, N), or of (B, M, K) and (B, K, N); also write it to `out` if it is given.

    If K is above the limit of the device, the product is a sum of products over slices of K. In float32, this changes
    only rounding.
    """
    multiply = torch.mm if x.dim() == 2 else torch.bmm
    limit = TRAITS[x.device.type].max_inner
    if limit is None or x.shape[-1] <= limit:
        return multiply(x, y, out=out)
    total = multiply(x[..., :SLICE], y[..., :SLICE, :], out=out)
    for start in range(SLICE, x.shape[-1], SLICE):
        total += multiply(x[..., start : start + SLICE], y[..., start : start + SLICE, :])
    return total
