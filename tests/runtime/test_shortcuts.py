"""Shortcuts that a model does not support are left out, with a reason; faults of the project end the run."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grpo.generation import decoding, probe
from grpo.generation.decoding import Decoder
from grpo.generation.probe import (
    probe_scorer,
    supports_cache_expansion,
    supports_common_prefix,
    supports_prefix_attention,
    tolerance_of,
)
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.runtime.microbatch import split_microbatches
from grpo.runtime.shortcuts import FLOAT32, FOUR_BITS, SIXTEEN_BITS, UnsupportedError, is_unsupported, why_refused
from grpo.scoring.attention.layout import Layout
from grpo.scoring.attention.tree import Tree
from grpo.scoring.layers import fuse_layers
from grpo.scoring.scorer import DENSE, Scorer
from grpo.scoring.tokens import left_pad
from tasks.registry import make_task
from tests.helpers.models import ragged_tokens, tiny_model
from tests.helpers.pretended_device import NAME, pretended_device

CPU = torch.device("cpu")


def raised_by(call) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("the call raised nothing")


def test_errors_of_a_models_code_mean_that_a_shortcut_is_not_supported_and_errors_of_this_project_do_not():
    model = tiny_model("llama")
    ids = torch.ones(1, 3, dtype=torch.long)
    assert is_unsupported(raised_by(lambda: model(input_ids=ids, position_ids=torch.zeros(2, 5, dtype=torch.long))))
    assert is_unsupported(UnsupportedError("no such attention"))
    assert is_unsupported(NotImplementedError("The operator 'aten::foo' is not implemented for the MPS device"))
    assert not is_unsupported(raised_by(lambda: split_microbatches("rows", 2, 2)))
    assert not is_unsupported(raised_by(lambda: left_pad([[1]], 0, "no device")))
    for message in (
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
        "indices should be either on cpu or on the same device as the indexed tensor (cuda:0)",
        "Placeholder storage has not been allocated on MPS device!",
    ):
        assert not is_unsupported(RuntimeError(message))
    assert not is_unsupported(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_unsupported(RuntimeError("MPS backend out of memory"))


@pytest.mark.parametrize("shots", [0, 4])
@pytest.mark.parametrize("name", ["cpu", NAME])
def test_the_starter_supports_all_shortcuts_on_the_cpu_and_on_another_device(name, shots, capsys):
    with pretended_device():
        lm = load("starter", torch.device(name))
        scorer, decoder = probe.probe(lm, make_task(resolve({"model": "starter", "shots": shots})))
        assert scorer == Scorer(shares_prompts=True, fuses_output=True)
        assert decoder == Decoder(expands_cache=True, shares_prefix=True, holds_prefix=True)
        probe.check_batches(lm.model, list(range(3, 12)), lm.pad_id)
        model, cache, mask, repeats, logits = prefilled(lm.model)
        assert probe.why_graph_refused(model, cache, mask, repeats, logits) == ""
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("common", [4, 20])
def test_other_kinds_of_layers_support_the_same_shortcuts_on_another_device(common):
    tokens = ragged_tokens((common + 5, common + 8), common_prefix=common)
    for kind, expected in (("gemma3", Scorer(shares_prompts=True, fuses_output=True)), ("lfm2", DENSE)):
        model = tiny_model(kind)
        model.compute_dtype = torch.bfloat16  # then updates compute a beginning of 16 tokens or more once
        for name in ("cpu", NAME):
            with pretended_device():
                ids, mask = tokens.prompt_ids.to(name), tokens.prompt_mask.to(name)
                assert probe_scorer(model.to(name), ids, mask) == expected
                assert supports_cache_expansion(model, ids, mask)


def prefilled(model: PreTrainedModel) -> tuple[PreTrainedModel, DynamicCache, Tensor, int, Tensor]:
    """Return the arguments of `why_graph_refused` for a model."""
    ids, mask = left_pad([[3, 4, 5, 6, 7], [3, 4, 5]], 0, model.device)
    with torch.no_grad():
        cache, logits = decoding.prefill(model, ids, mask)
    return model, cache, mask, 2, logits.repeat_interleave(2, 0)


def test_a_tensor_on_the_wrong_device_ends_a_probe(monkeypatch):
    true_of, true_cache = Layout.of, decoding.prefix_cache
    prompts = [[3, 4, 5, 6, 7], [3, 4, 5, 6, 8]]
    with pretended_device():
        model = tiny_model("llama").to(NAME)
        ids, mask = left_pad(prompts, 0, model.device)
        assert probe_scorer(model, ids, mask).shares_prompts
        assert supports_common_prefix(model, prompts, 0)
        monkeypatch.setattr(Layout, "of", lambda *args: true_of(*args[:-1], CPU))
        with pytest.raises(RuntimeError, match="same device"):
            probe_scorer(model, ids, mask)
        monkeypatch.setattr(decoding, "prefix_cache", lambda m, x, mask, n: true_cache(m, x, mask.cpu(), n))
        with pytest.raises(RuntimeError, match="same device"):
            supports_common_prefix(model, prompts, 0)


# --- tolerances ---


def test_the_reason_names_the_error_or_the_difference_and_the_tolerance():
    zeros = torch.zeros(4)
    assert why_refused(lambda: zeros + 5e-4, zeros, FLOAT32) == ""
    assert why_refused(lambda: zeros + torch.tensor([0, 0.1, 0, 0.2]), zeros, SIXTEEN_BITS) == ""
    said = why_refused(lambda: zeros + torch.tensor([0, 0, 0, 0.082]), zeros, FLOAT32)
    assert said == "log-probabilities differ by 0.082 nats (allowed: 0.001)"
    said = why_refused(lambda: zeros - 0.2, zeros, SIXTEEN_BITS)
    assert said == "log-probabilities differ by 0.2 nats, root mean square (allowed: 0.15)"
    assert "nan" in why_refused(lambda: zeros / 0, zeros, FLOAT32)
    assert "nan" in why_refused(lambda: zeros / 0, zeros, SIXTEEN_BITS)


def next_token_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each completion token attend to the token after it, when rows are scored."""
    true_biases = Layout.biases

    def biases(self: Layout, *args: object) -> tuple[Tensor, Tensor]:
        prompts, completions = true_biases(self, *args)
        columns = self.completion_index.shape[1]
        seen = completions[..., -columns:].clone()
        seen[..., 1:] = torch.maximum(seen[..., 1:], seen[..., :-1].clone())
        return prompts, torch.cat([completions[..., :-columns], seen], -1)

    monkeypatch.setattr(Layout, "biases", biases)


def rows_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each completion the cache of another prompt."""
    true_reserve = decoding.reserve
    monkeypatch.setattr(decoding, "reserve", lambda x, n, more=0: true_reserve(x.roll(n - 1, 0), n, more))


@pytest.mark.parametrize("common", [4, 20], ids=["short beginning", "beginning computed once in updates"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3", "phi3"])
def test_in_bfloat16_right_shortcuts_are_accepted_and_wrong_ones_refused(kind, common, monkeypatch, capsys):
    model = tiny_model(kind).to(torch.bfloat16)
    model.compute_dtype = torch.bfloat16  # as in a sharded model, whose probes run in bfloat16
    lengths = [common + more for more in (5, 8, 7, 10)]
    tokens = ragged_tokens(tuple(lengths), common_prefix=common)
    ids, mask = tokens.prompt_ids, tokens.prompt_mask
    prompts = [row[seen].tolist() for row, seen in zip(ids, mask, strict=True)]
    trees, true_parts = [], Tree.parts
    monkeypatch.setattr(Tree, "parts", lambda self, *args: trees.append(self) or true_parts(self, *args))

    assert probe_scorer(model, ids, mask) == DENSE, "the tolerance of float32 is too small"
    assert bool(trees) == (common == 20)
    assert "In updates, prompts are computed for each of their completions: log-prob" in capsys.readouterr().out
    monkeypatch.setattr(probe, "tolerance_of", lambda model: SIXTEEN_BITS)
    assert probe_scorer(model, ids, mask) == Scorer(shares_prompts=True, fuses_output=True)
    assert supports_cache_expansion(model, ids, mask)
    assert supports_common_prefix(model, prompts, 0)
    assert capsys.readouterr().out == ""
    assert supports_prefix_attention(model, ids, mask, common) == (kind != "gemma3")
    is_said = "the common beginning of the prompts is held for each completion" in capsys.readouterr().out
    assert is_said == (kind == "gemma3" and common == 20), "rollouts would not hold a short beginning once"

    next_token_seen(monkeypatch)
    rows_mixed(monkeypatch)
    assert probe_scorer(model, ids, mask) == DENSE
    assert not supports_cache_expansion(model, ids, mask)
    assert "root mean square (allowed: 0.15)" in capsys.readouterr().out


def test_the_tolerance_is_that_of_the_precision_in_which_a_probe_runs(monkeypatch):
    model = tiny_model("llama")
    model.compute_dtype = torch.bfloat16
    assert tolerance_of(model) == FLOAT32, "the weights of a model that is not sharded are cast for steps only"
    for dtype, expected in ((torch.float32, FLOAT32), (torch.bfloat16, FOUR_BITS)):
        model.config.quantization_config = SimpleNamespace(bnb_4bit_compute_dtype=dtype)
        assert tolerance_of(model) == expected
    monkeypatch.setattr(probe, "is_sharded", lambda model: True)
    assert tolerance_of(model) == SIXTEEN_BITS


def test_layers_are_fused_on_another_device_as_on_the_cpu(monkeypatch):
    model = tiny_model("llama")
    expected = fuse_layers(copy.deepcopy(model))
    with pretended_device():
        assert fuse_layers(copy.deepcopy(model).to(NAME)) == expected > 0
        true_linspace = torch.linspace
        monkeypatch.setattr(torch, "linspace", lambda *args, device: true_linspace(*args))
        with pytest.raises(RuntimeError, match="same device"):
            fuse_layers(model.to(NAME))
