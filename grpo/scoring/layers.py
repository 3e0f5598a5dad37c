"""RMSNorm and gated MLP for passes in 16 bits, each as one function with its own backward pass.

Written out in elementary operations, an RMSNorm keeps its input in float32 and three more tensors until the backward
pass, which reads or writes them a dozen times; a gated MLP keeps four tensors of its inner size. Here the norm keeps
its input and one number per token, and the MLP keeps the outputs of its first two projections. The backward pass
computes the rest again. Passes in float32 use the layers of transformers and give exactly their results.
"""

from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import rms_norm, silu
from transformers import PreTrainedModel

from grpo.runtime.device import TRAITS
from grpo.runtime.shortcuts import is_on_wrong_device

# Largest difference between a layer and its fused version, compared in float32.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@torch.no_grad()
def fuse_layers(model: PreTrainedModel) -> int:
    """Replace the forward passes of norms and MLPs by fused ones that compute the same; return how many are replaced.

    Each layer with the expected attributes is tried on a few numbers, on its device, because some norms scale by
    1 + weight and some MLPs have another activation.
    """
    fused = 0
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            layer = module
            forward = _norm_forward
        elif hasattr(module, "down_proj") and _is_linear(module.down_proj):
            layer = module.down_proj
            forward = _mlp_forward
        else:
            continue
        try:
            trial = torch.linspace(-2, 3, 2 * len(layer.weight), device=layer.weight.device).view(2, -1)
            same = torch.allclose(forward(module, trial), module(trial), **TOLERANCE)
        except Exception as error:  # a layer of an unexpected kind may raise any exception
            if is_on_wrong_device(error):
                raise
            same = False
        if same:
            module.forward = MethodType(forward, module)  # in a deep copy, a method belongs to the copied layer
            fused += 1
    return fused


def _is_linear(layer: nn.Module) -> bool:
    """Return whether a layer is a plain matrix product: no adapter, no bias, not in 4 bits."""
    return type(layer) is nn.Linear and layer.bias is None


def _norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


def _mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    gate = self.gate_proj(x)
    up = self.up_proj(x)
    if not _is_linear(self.down_proj):  # an adapter was added after the trial
        return self.down_proj(self.act_fn(gate) * up)
    return GatedProduct.apply(gate, up, self.down_proj.weight)


def _inverse(x: Tensor, epsilon: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + epsilon) over the last dimension, (…, 1)."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()


class RMSNorm(torch.autograd.Function):
    """`RMSNorm.apply(x, weight, epsilon)` returns weight * x / sqrt(mean(x^2) + epsilon), (…, D).

    Everything except the product with the weight is computed in float32. If the device has a single operation for
    the norm, it is used, because decoding a token takes as long as launching its operations; it computes the product
    in float32 too, and the backward pass computes the inverse root again.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.epsilon = epsilon
        if TRAITS[x.device.type].has_fused_norm and weight.dtype == x.dtype:
            ctx.save_for_backward(x, weight, None)
            return rms_norm(x, x.shape[-1:], weight, epsilon)
        y = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        inverse = _inverse(y, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return y.mul_(inverse).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        # With n = x * inverse and v = grad * weight, the gradient of x is inverse * (v - n * mean(n * v)), and the
        # gradient of the weight is sum(grad * n).
        x, weight, inverse = ctx.saved_tensors
        if inverse is None:
            inverse = _inverse(x.to(torch.promote_types(x.dtype, torch.float32)), ctx.epsilon)
        normal = x * inverse  # float32 or float64, like `inverse`
        grad = grad.to(normal.dtype)
        wide_weight = weight.to(normal.dtype)
        products = (grad * normal).flatten(0, -2)  # (tokens, D)
        grad_weight = products.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = (products @ wide_weight).view(inverse.shape).div_(x.shape[-1])
        grad_x = (grad * wide_weight).addcmul_(normal, mean, value=-1).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None


class GatedProduct(torch.autograd.Function):
    """`GatedProduct.apply(gate, up, weight)` returns (silu(gate) * up) @ weight.T; gate (…, I), weight (D, I)."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return silu(gate).mul_(up) @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        active = silu(gate)
        grad_inner = grad @ weight
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = grad.flatten(0, -2).T @ (active * up).flatten(0, -2)
        grad_up = active.mul_(grad_inner)
        return torch.ops.aten.silu_backward(grad_inner.mul_(up), gate), grad_up, grad_weight
