"""RMSNorm and gated MLP with their own backward pass: computed by hand, against autograd, and in whole models."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import rms_norm, silu
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from grpo.generation.decoding import Decoder
from grpo.model.loading import load
from grpo.runtime.device import TRAITS
from grpo.scoring import layers
from grpo.scoring.layers import GatedProduct, RMSNorm, fuse_layers
from tests.helpers.models import ragged_tokens, tiny_model
from tests.helpers.scoring import logprobs_of
from tests.helpers.zoo import KINDS

NORMS = {
    "llama": 7,
    "qwen2": 7,
    "qwen3": 13,
    "phi3": 7,
    "gemma3": 0,
    "gpt2": 0,
}  # two norms a layer, two more in qwen3, and one at the end
MLPS = {"llama": 3, "qwen2": 3, "qwen3": 3, "phi3": 0, "gemma3": 0, "gpt2": 0}  # phi3 has one projection for both


def test_a_norm_by_hand():
    # mean of squares (9 + 16) / 2 = 12.5, and 3.5 of epsilon: 16, so each is divided by 4
    x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    weight = torch.tensor([2.0, 1.0], requires_grad=True)
    y = RMSNorm.apply(x, weight, 3.5)
    torch.testing.assert_close(y, torch.tensor([[1.5, 1.0]]))
    y.backward(torch.tensor([[1.0, 0.0]]))
    # n = (3/4, 1); v = (2, 0); mean(n v) = 3/4; dx = (2 - 9/16, -3/4) / 4
    torch.testing.assert_close(x.grad, torch.tensor([[23 / 64, -3 / 16]]))
    torch.testing.assert_close(weight.grad, torch.tensor([0.75, 0.0]))


def test_a_gated_product_by_hand():
    # silu(0) = 0 with slope 1/2
    gate, up, weight = torch.zeros(1, 1), torch.full((1, 1), 3.0), torch.full((1, 1), 5.0)
    for x in (gate, up, weight):
        x.requires_grad_()
    out = GatedProduct.apply(gate, up, weight)
    assert out.item() == 0
    out.backward(torch.ones(1, 1))
    assert (gate.grad.item(), up.grad.item(), weight.grad.item()) == (3 * 5 / 2, 0, 0)


def test_both_have_the_gradients_of_finite_differences():
    torch.manual_seed(0)
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-2), (x, weight))
    shapes = (2, 3, 5), (2, 3, 5), (4, 5)
    gate, up, down = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(GatedProduct.apply, (gate, up, down))


def test_frozen_weights_get_no_gradient():
    x, weight, down = torch.randn(2, 4, requires_grad=True), torch.ones(4), torch.ones(3, 4)
    (RMSNorm.apply(x, weight, 1e-5).sum() + GatedProduct.apply(x, x, down).sum()).backward()
    assert weight.grad is None
    assert down.grad is None
    assert x.grad is not None


def test_in_bfloat16_the_gradients_are_as_near_to_float32_as_those_of_the_layer_written_out():
    torch.manual_seed(0)
    x, weight, grad = torch.randn(64, 96), torch.rand(96) + 0.5, torch.randn(64, 96)

    def written_out(x, weight):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return weight * wide.to(x.dtype)

    def gradients(norm, dtype):
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, weight)]
        norm(*leaves).backward(grad.to(dtype))
        return [leaf.grad.float() for leaf in leaves]

    exact = gradients(written_out, torch.float32)
    plain = gradients(written_out, torch.bfloat16)
    ours = gradients(lambda x, w: RMSNorm.apply(x, w, 1e-5), torch.bfloat16)
    for true, other, own in zip(exact, plain, ours, strict=True):
        assert (own - true).norm() <= 1.05 * (other - true).norm()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in NORMS])
def test_a_whole_model_gives_the_same_log_probabilities_and_gradients(kind):
    plain = tiny_model(kind)
    for name, parameter in plain.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    fused = copy.deepcopy(plain)
    assert fuse_layers(fused) == NORMS[kind] + MLPS[kind]
    fused = copy.deepcopy(fused)  # as for a reference: its layers use the weights of the copy
    tokens, results = ragged_tokens(), []
    for model in (plain, fused):
        logprobs = logprobs_of(model, tokens, 1.0, shared=True)
        (logprobs * torch.linspace(-1, 1, logprobs.numel()).view(logprobs.shape)).sum().backward()
        results.append((logprobs, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    for name, grad in results[0][1].items():
        assert (results[1][1][name] - grad).norm() <= 1e-5 * grad.norm(), name


def test_a_norm_that_scales_by_one_plus_weight_and_an_mlp_of_another_kind_stay_as_they_are():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(8)), 1e-6

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)

    class MLP(nn.Module):
        def __init__(self, act, bias=False):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 6), nn.Linear(8, 6)
            self.down_proj, self.act_fn = nn.Linear(6, 8, bias=bias), act

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model = nn.ModuleList([Norm(), MLP(torch.tanh), MLP(silu, bias=True)])
    assert fuse_layers(model) == 0
    assert not any("forward" in vars(module) for module in model)
    assert fuse_layers(nn.ModuleList([MLP(silu)])) == 1


def test_an_adapter_that_is_added_later_is_used():
    torch.manual_seed(0)
    model = tiny_model("llama")
    fuse_layers(model)
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 32)
    before = mlp(x)

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1

    mlp.down_proj = Adapter(mlp.down_proj)
    torch.testing.assert_close(mlp(x), before + 1)


@pytest.mark.parametrize(("precision", "fused"), [("float32", False), ("bfloat16", True)])
def test_a_loaded_model_has_fused_layers_in_bfloat16_only(precision, fused):
    model = load("starter", torch.device("cpu"), precision).model
    norms = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
    assert {"forward" in vars(module) for module in norms} == {fused}


# --- on a device with a single operation for the norm ---


@pytest.fixture
def fused_norm(monkeypatch):
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], has_fused_norm=True))


@pytest.mark.usefixtures("fused_norm")
def test_the_norm_of_the_device_by_hand_and_in_the_gradients_of_finite_differences():
    test_a_norm_by_hand()
    test_both_have_the_gradients_of_finite_differences()


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
@pytest.mark.parametrize(("dtype", "places"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_the_norm_of_the_device_has_the_values_of_transformers(fused_norm, epsilon, dtype, places):
    # In bfloat16, transformers rounds before and after the product with the weight, by up to 2^-9 each, and the
    # device once. Small and large inputs show where epsilon is added, and that the mean is computed in float32.
    torch.manual_seed(0)
    norm = Qwen2RMSNorm(96, eps=epsilon).to(dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    for scale in (1e-3, 1.0, 300.0):
        x = (scale * torch.randn(16, 96)).to(dtype)
        actual = RMSNorm.apply(x, norm.weight, epsilon)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, norm(x), rtol=places, atol=1e-9)


@pytest.mark.usefixtures("fused_norm")
def test_a_decoded_token_of_24_layers_in_bfloat16_launches_at_most_700_operations(monkeypatch):
    launches = 0

    class Launches(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal launches
            makes_view = any(x.alias_info and not x.alias_info.is_write for x in function._schema.returns)
            launches += not makes_view and function is not torch.ops.aten._unsafe_view.default
            return function(*args, **(kwargs or {}))

    def one_operation(*arguments):
        nonlocal launches
        launches += 1
        with _disable_current_modes():
            return rms_norm(*arguments)

    monkeypatch.setattr(layers, "rms_norm", one_operation)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 24}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    assert fuse_layers(model) == 49 + 24
    model = model.bfloat16()
    ids = torch.arange(8).view(2, 4)
    decoding, logits = Decoder(expands_cache=True).begin(model, ids, torch.ones_like(ids, dtype=torch.bool), 2, 4)
    launches = 0
    with torch.no_grad(), Launches():
        decoding(logits.argmax(-1))
    assert 24 * 20 < launches <= 700
