"""The fused output layer against the plain way in float64, and models that it does not fit."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.config import TrainConfig
from grpo.generation.probe import probe_scorer
from grpo.model.lora import add_adapter
from grpo.runtime.precision import in_precision, set_precision
from grpo.scoring import output_layer as module
from grpo.scoring.output_layer import linear_logprobs
from grpo.scoring.scorer import Scorer, token_entropy
from tests.helpers.models import ragged_tokens, tiny_model
from tests.helpers.products import Products
from tests.helpers.scoring import logprobs_of, scores_of
from tests.helpers.zoo import KINDS

CPU = torch.device("cpu")


@pytest.fixture(params=[(2**24, 2**19), (40, 20)], ids=["at once", "in chunks of blocks"])
def sizes(request, monkeypatch):
    """Set how many logits are in memory: all, or 3 rows of 13 at a time and one row of them in float32."""
    monkeypatch.setattr(module, "MAX_PRODUCT", request.param[0])
    monkeypatch.setattr(module, "CACHE_LOGITS", request.param[1])


def a_layer(bias: bool, dtype: torch.dtype) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 13, bias=bias, dtype=dtype)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype)
    hidden = torch.randn(8, 6, generator=generator, dtype=dtype, requires_grad=True)
    return layer, hidden, torch.randint(13, (8,), generator=generator)


def plain(layer, hidden, ids, temperature):
    """Compute log-probabilities and entropies from all logits."""
    logp = (layer(hidden) / temperature).log_softmax(-1)
    return logp.gather(-1, ids[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def test_by_hand():
    # logits (ln 3, 0) at temperature 1: probabilities 3/4 and 1/4
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data = torch.tensor([[math.log(3.0)], [0.0]])
    hidden = torch.ones(2, 1, requires_grad=True)
    logprobs, entropy = linear_logprobs(layer, hidden, torch.tensor([0, 1]), 1.0)
    torch.testing.assert_close(logprobs, torch.tensor([0.75, 0.25]).log())
    torch.testing.assert_close(entropy, torch.full((2,), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    # d log p0 / d logits = (1 - 3/4, -1/4), d log p1 / d logits = (-3/4, 1 - 1/4); the weights get their sum
    logprobs.sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[-0.5], [0.5]]))
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.25], [-0.75]]) * math.log(3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_plain_way(bias, temperature, sizes):
    layer, hidden, ids = a_layer(bias, torch.float32)
    precise = copy.deepcopy(layer).double()
    weights = torch.linspace(-1, 2, len(ids))
    logprobs, entropy = linear_logprobs(layer, hidden, ids, temperature)
    expected, expected_entropy = plain(precise, hidden.double(), ids, temperature)
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad((logprobs * weights).sum(), [hidden, *layer.parameters()])
    wanted = torch.autograd.grad((expected * weights).sum(), [hidden, *precise.parameters()])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)


def test_a_very_unlikely_token_has_a_finite_log_probability():
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data = torch.tensor([[200.0], [0.0]])
    logprobs, entropy = linear_logprobs(layer, torch.ones(1, 1), torch.tensor([1]), 1.0)
    assert logprobs.tolist() == [-200.0]
    assert entropy.tolist() == [0.0]


def test_frozen_weights_get_no_gradient(sizes):
    layer, hidden, ids = a_layer(True, torch.float32)
    layer.requires_grad_(False)
    linear_logprobs(layer, hidden, ids, 1.0)[0].sum().backward()
    assert hidden.grad is not None
    assert layer.weight.grad is layer.bias.grad is None


def test_with_bfloat16_weights_the_product_is_in_bfloat16_and_the_rest_in_float32(sizes):
    layer, hidden, ids = a_layer(True, torch.float32)
    linear_logprobs(layer, hidden, ids, 1.0)[0].sum().backward()
    found = [linear_logprobs(layer, hidden, ids, 1.0)[0].detach(), layer.weight.grad, layer.bias.grad, hidden.grad]
    lower, in_16 = copy.deepcopy(layer).bfloat16(), hidden.detach().bfloat16().requires_grad_()
    lower.zero_grad()
    logprobs, entropy = linear_logprobs(lower, in_16, ids, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    logprobs.sum().backward()
    for a, b in zip(found, [logprobs.detach(), lower.weight.grad, lower.bias.grad, in_16.grad], strict=True):
        assert 0 < ((a - b).norm() / a.norm()).item() < 0.03


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_a_model_scores_the_same_with_it_and_without(kind, temperature, monkeypatch):
    model, tokens, found = tiny_model(kind), ragged_tokens((9, 7, 12)), []
    monkeypatch.setattr(module, "MAX_PRODUCT", 64)
    for chunk in (2**24, 64):  # with 64, the logits are too many to hold all of them
        monkeypatch.setattr("grpo.scoring.scorer.CHUNK", chunk)
        model.zero_grad()
        logprobs, entropy = scores_of(model, tokens, temperature)
        (logprobs * torch.linspace(-1, 1, len(logprobs))[:, None]).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((logprobs.detach(), entropy, gradient / gradient.norm()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """Note the most elements of any float32 tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.most = max(self.most, x.numel())
        return out


def test_logits_of_all_tokens_are_never_in_memory(monkeypatch):
    monkeypatch.setattr(module, "MAX_PRODUCT", 8 * 13)
    monkeypatch.setattr(module, "CACHE_LOGITS", 2 * 13)
    layer, _, _ = a_layer(False, torch.float32)
    hidden = torch.randn(64, 6, requires_grad=True)
    with Largest() as seen:
        linear_logprobs(layer, hidden, torch.zeros(64, dtype=torch.long), 1.0)[0].sum().backward()
    assert seen.most < 64 * 13 / 2
    with Largest() as seen:
        linear_logprobs(layer.bfloat16(), hidden.detach().bfloat16(), torch.zeros(64, dtype=torch.long), 1.0)
    assert seen.most <= 64 * 6  # the size of the hidden states


def test_a_few_rows_more_or_less_are_products_of_the_same_sizes():
    layer, _, _ = a_layer(False, torch.float32)
    with Products(torch.ops.aten.mm) as seen:
        for rows in range(65, 129):
            hidden = torch.randn(rows, 6, requires_grad=True)
            linear_logprobs(layer, hidden, torch.zeros(rows, dtype=torch.long), 1.0)[0].sum().backward()
            assert hidden.grad.shape == (rows, 6)
    assert seen.shapes == {((128, 6), (6, 13)), ((128, 13), (13, 6)), ((13, 128), (128, 6))}


class Softcapped(nn.Module):
    """A model that changes its logits, in place or not."""

    def __init__(self, model, in_place):
        super().__init__()
        self.model, self.in_place = model, in_place

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("model", "in_place") else getattr(self.model, name)

    def forward(self, **inputs):
        out = self.model(**inputs)
        if self.in_place:
            with torch.no_grad():
                out.logits.mul_(0.5)
        else:
            out.logits = 20 * torch.tanh(out.logits / 20)
        return out


@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_that_changes_its_logits_takes_the_plain_way_and_the_probe_says_so(in_place, capsys):
    model, tokens = Softcapped(tiny_model("llama"), in_place).eval(), ragged_tokens()
    assert probe_scorer(model, tokens.prompt_ids, tokens.prompt_mask) == Scorer(shares_prompts=True)
    assert capsys.readouterr().out.count("changes its logits") == 1
    found = [Scorer(shares).logprobs(model, tokens, 1.0).detach() for shares in (True, False)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_an_output_layer_of_another_kind_takes_the_plain_way(monkeypatch, capsys):
    class Other(nn.Linear):
        """An output layer with an adapter or in 4 bits has another class, like this one."""

    model, tokens = tiny_model("llama"), ragged_tokens()
    assert probe_scorer(model, tokens.prompt_ids, tokens.prompt_mask).fuses_output
    model.lm_head.__class__ = Other
    monkeypatch.setattr("grpo.scoring.scorer.linear_logprobs", None)  # calling it would fail
    assert probe_scorer(model, tokens.prompt_ids, tokens.prompt_mask) == Scorer(shares_prompts=True)
    assert capsys.readouterr().out == ""


def test_an_adapted_model_is_asked_for_the_hidden_states_of_the_model_that_it_wraps(monkeypatch):
    monkeypatch.setattr("grpo.scoring.scorer.CHUNK", 64)
    model, tokens = tiny_model("llama"), ragged_tokens()
    adapted = add_adapter(model, TrainConfig(lora_rank=2, lora_targets="q_proj,v_proj"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    assert probe_scorer(adapted, tokens.prompt_ids, tokens.prompt_mask).fuses_output
    torch.testing.assert_close(
        logprobs_of(adapted, tokens), logprobs_of(adapted, tokens, shared=False), atol=1e-5, rtol=1e-5
    )


def test_bfloat16_through_the_fused_layer_of_a_model(monkeypatch):
    monkeypatch.setattr("grpo.scoring.scorer.CHUNK", 64)
    model, tokens = tiny_model("qwen3"), ragged_tokens()
    exact = logprobs_of(model, tokens, 1.0)
    set_precision(model, "bfloat16", CPU)
    with in_precision(model):
        found = logprobs_of(model, tokens, 1.0)
    assert 0 < (found - exact).abs().max() < 0.1


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_value_and_gradient_of_the_entropy_are_those_of_the_plain_way_in_float64(temperature, sizes):
    layer, hidden, ids = a_layer(True, torch.float64)
    weights = torch.linspace(-1, 2, len(ids), dtype=torch.float64)
    found = []
    for fused in (True, False):
        layer.zero_grad()
        hidden.grad = None
        if fused:
            logprobs, entropy = linear_logprobs(layer, hidden, ids, temperature)
        else:
            log_p = (layer(hidden) / temperature).log_softmax(-1)
            logprobs, entropy = log_p.gather(-1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        ((logprobs + 0.3 * entropy) * weights).sum().backward()
        found.append((entropy.detach(), hidden.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_the_entropy_alone_may_be_the_loss(sizes):
    layer, hidden, ids = a_layer(False, torch.float32)
    linear_logprobs(layer, hidden, ids, 1.0)[1].sum().backward()
    fused = hidden.grad.clone()
    hidden.grad = None
    token_entropy(layer(hidden), 1.0).sum().backward()
    torch.testing.assert_close(fused, hidden.grad, atol=1e-5, rtol=1e-4)
    x = torch.tensor([[0.0, -torch.inf, 1.0, -200.0]], requires_grad=True)  # the second token has probability 0
    token_entropy(x, 1.0).sum().backward()
    assert x.grad.isfinite().all()
