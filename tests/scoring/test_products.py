"""Products that a device computes wrongly if they sum over too many numbers: none may sum over more of them."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.algorithm.grpo import GRPO
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.report.opening import introduce
from grpo.runtime.device import TRAITS
from grpo.scoring import output_layer
from grpo.scoring import products as module
from grpo.scoring.attention import partial
from grpo.scoring.output_layer import linear_logprobs
from grpo.scoring.products import product
from grpo.scoring.scorer import Scorer
from tasks.arithmetic import Arithmetic
from tests.helpers.models import ragged_tokens, tiny_model
from tests.helpers.scoring import logprobs_of

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm)


class MostSummed(TorchDispatchMode):
    """Notes over how many numbers the longest sum of any matrix product goes."""

    def __init__(self, products=PRODUCTS):
        super().__init__()
        self.products, self.most = products, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in self.products:
            self.most = max(self.most, args[0].shape[-1])
        return function(*args, **(kwargs or {}))


def limit_cpu(monkeypatch, max_inner, **more):
    """Let the CPU have the limit of a device whose products sum over at most `max_inner` numbers rightly."""
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], max_inner=max_inner, **more))


@pytest.mark.parametrize("batch", [(), (3,)], ids=["two dimensions", "batches"])
@pytest.mark.parametrize("inner", [7, 8, 9, 14, 15])
def test_a_long_sum_is_computed_in_slices(batch, inner, monkeypatch):
    limit_cpu(monkeypatch, 8)
    monkeypatch.setattr(module, "SLICE", 7)
    x, y = (torch.randn(*batch, *shape, dtype=torch.float64) for shape in ((4, inner), (inner, 5)))
    out = torch.empty(*batch, 4, 5, dtype=torch.float64)
    with MostSummed() as seen:
        found = [product(x, y), product(x, y, out=out), out]
    assert seen.most <= 8
    for each in found:
        torch.testing.assert_close(each, x @ y)


def test_on_mps_no_product_of_the_output_layer_sums_over_a_real_vocabulary(monkeypatch):
    assert TRAITS["mps"].max_inner == 32_766  # pytorch's issue #195163: from 32,767 on
    limit_cpu(monkeypatch, TRAITS["mps"].max_inner)
    layer = nn.Linear(8, 33_000, bias=False)
    hidden, ids = torch.randn(64, 8, requires_grad=True), torch.randint(33_000, (64,))
    with MostSummed() as seen:
        linear_logprobs(layer, hidden, ids, 1.0)[0].sum().backward()
    assert 64 < seen.most < 32_767
    found = hidden.grad, layer.weight.grad
    wide, weight = hidden.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    (wide @ weight.T).log_softmax(-1).gather(-1, ids[:, None]).sum().backward()
    for a, b in zip(found, (wide.grad, weight.grad), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_nor_does_one_of_many_rows_with_a_small_vocabulary(monkeypatch):
    limit_cpu(monkeypatch, 60)
    monkeypatch.setattr(module, "SLICE", 50)
    layer, hidden = nn.Linear(8, 20), torch.randn(128, 8, requires_grad=True)
    with MostSummed() as seen:
        linear_logprobs(layer, hidden, torch.zeros(128, dtype=torch.long), 1.0)[0].sum().backward()
    assert seen.most <= 60


def test_nor_does_attention_of_all_tokens_to_a_common_beginning(monkeypatch):
    """In the gradient of the beginning's keys and values, each query of all tokens is one of the numbers summed."""
    for name in ("SHARED_FROM", "SHARED_FROM_16_BITS"):
        monkeypatch.setattr(f"grpo.scoring.tokens.{name}", 2)
    monkeypatch.setattr(partial, "FUSED_TYPES", ())  # the attention of other devices
    model, tokens = tiny_model("llama"), ragged_tokens((9, 7, 12), common_prefix=4)
    gradients, longest = [], []
    for limit in (None, 60):
        limit_cpu(monkeypatch, limit)
        monkeypatch.setattr(module, "SLICE", 50)
        model.zero_grad()
        with MostSummed((torch.ops.aten.bmm,)) as seen:  # only attention multiplies batches
            logprobs_of(model, tokens).sum().backward()
        longest.append(seen.most)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert longest[0] > 60 >= longest[1]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_a_device_with_a_limit_always_takes_the_fused_output_layer(monkeypatch):
    model, tokens = tiny_model("llama"), ragged_tokens()
    expected = logprobs_of(model, tokens)
    monkeypatch.setattr("grpo.scoring.scorer.fused_scores", lambda *_: (expected, expected))
    assert logprobs_of(model, tokens) is not expected, "few logits"
    limit_cpu(monkeypatch, 32_766)
    assert logprobs_of(model, tokens) is expected


@pytest.mark.parametrize(
    ("fuses", "limit", "least"),
    [(False, 40, (2, 0)), (False, 50, (99, 0)), (True, 40, (99, 0))],
    ids=["new torch", "small vocabulary", "fused"],
)
def test_training_that_would_take_the_plain_output_layer_is_refused_in_one_line(fuses, limit, least, monkeypatch):
    limit_cpu(monkeypatch, limit, least_torch=least)
    Scorer(shares_prompts=True, fuses_output=fuses).check_gradient(tiny_model("llama"))
    limit_cpu(monkeypatch, 40, least_torch=(99, 0))
    refusal = r"^on cpu, .* 50 entries: install torch 99\.0 or newer, or give --device cpu$"
    with pytest.raises(ValueError, match=refusal):
        Scorer(shares_prompts=True).check_gradient(tiny_model("llama"))


def test_a_run_checks_this_before_its_first_step_and_asks_for_a_newer_torch(monkeypatch, capsys):
    lm = load("starter", torch.device("cpu"))
    limit_cpu(monkeypatch, 4, least_torch=(99, 0))
    grpo = GRPO(resolve({"model": "starter"}), Arithmetic(), lm)
    environment = {"device": "cpu", "threads": 1, "precision": "float32", "processes": 1}
    introduce(grpo.config, lm, environment)
    assert capsys.readouterr().out.count("Please install torch 99.0 or newer: torch 2.") == 1
    monkeypatch.setattr(output_layer, "is_plain", lambda model: False)
    with pytest.raises(ValueError, match="would compute wrong gradients"):
        GRPO(resolve({"model": "starter"}), Arithmetic(), lm)
