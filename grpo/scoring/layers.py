"""RMSNorm and gated MLP, each as one function with a backward pass by hand, for passes in 16 bits.

Written out in elementary operations, an RMSNorm keeps its input in float32 and three more tensors until its backward
pass, and takes a dozen passes over them there; a gated MLP keeps four tensors of its inner size. Here the norm keeps
its input and one number a token, and the MLP the outputs of its two projections: the rest is computed again.

Float32 passes keep the layers of transformers, so that their results stay as they were to the bit.

What did not pay in an update of smollm2 on 2 cores (4.3 s): some rows of the backward passes at a time, so that they
stay in the cache; weights' gradients as products of contiguous matrices, which take half the time (3.4 ms instead of
6.8) and as much again to transpose; torch.compile, which takes a layer but for its attention from 17 and 48 ms
(forward, backward, 1,984 tokens) to 13 and 35, so 13% off an update, and needs a C++ compiler and 26 s. Products
alone are 6 and 17 ms.
"""

from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import silu
from transformers import PreTrainedModel

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # of the trial, in float32


@torch.no_grad()
def fuse_layers(model: PreTrainedModel) -> int:
    """Replace the forward pass of each norm and MLP that computes the same; return how many that are.

    A layer of the right attributes is tried on a few numbers, on its device: others with the same names scale by
    1 + weight, or have another activation.
    """
    fused = 0
    for module in model.modules():
        if _has(module, "weight", "variance_epsilon"):
            forward, size = _norm_forward, module.weight.numel()
        elif _has(module, "gate_proj", "up_proj", "down_proj", "act_fn") and _is_linear(module.down_proj):
            forward, size = _mlp_forward, module.down_proj.weight.shape[0]
        else:
            continue
        device = next(module.parameters()).device
        trial = torch.linspace(-2, 3, 2 * size, device=device).view(2, size)
        try:
            same = torch.allclose(forward(module, trial), module(trial), **TOLERANCE)
        except Exception:  # a layer of another kind, which may raise anything: it keeps its own
            same = False
        if same:
            module.forward = MethodType(forward, module)  # of a copy of the model, the copy's
            fused += 1
    return fused


def _has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _is_linear(layer: nn.Module) -> bool:
    """Return whether a layer is a plain product: no adapter, no 4 bits, no bias."""
    return type(layer) is nn.Linear and layer.bias is None


def _norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if not _is_linear(self.down_proj):  # an adapter came later
        return self.down_proj(self.act_fn(gate) * up)
    return gated_product(gate, up, self.down_proj.weight)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + epsilon), (…, D): in float32, but for the product with the weight."""
    return _RMSNorm.apply(x, weight, epsilon)


def gated_product(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """Return (silu(gate) * up) @ weight.T: gate and up are (…, I), weight is (D, I), the result (…, D)."""
    return _GatedProduct.apply(gate, up, weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Return the normalised x, scaled."""
        y = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        squares = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_()
        inverse = squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()  # (…, 1)
        ctx.save_for_backward(x, weight, inverse)
        return y.mul_(inverse).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With n = x * inverse, v = grad * weight: dx = inverse * (v - n * mean(n * v)), dweight = sum(grad * n)."""
        x, weight, inverse = ctx.saved_tensors
        normal = x * inverse  # in its precision, float32 or more
        grad, wide = grad.to(normal.dtype), weight.to(normal.dtype)
        products = (grad * normal).flatten(0, -2)  # (tokens, D)
        of_weight = products.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = (products @ wide).view(inverse.shape).div_(x.shape[-1])
        of_x = (grad * wide).addcmul_(normal, mean, value=-1).mul_(inverse)
        return of_x.to(x.dtype), of_weight, None


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """Return the product."""
        ctx.save_for_backward(gate, up, weight)
        return silu(gate).mul_(up) @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of gate, up and weight."""
        gate, up, weight = ctx.saved_tensors
        active, of_inner = silu(gate), grad @ weight
        of_weight = None
        if ctx.needs_input_grad[2]:
            of_weight = grad.flatten(0, -2).T @ (active * up).flatten(0, -2)
        of_up = active.mul_(of_inner)
        return torch.ops.aten.silu_backward(of_inner.mul_(up), gate), of_up, of_weight
