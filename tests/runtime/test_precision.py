"""The precision of passes: how it is chosen, and what it changes."""

import copy
from dataclasses import replace

import pytest
import torch

import inference
from grpo.algorithm.reference import frozen_copy
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.runtime import device as module
from grpo.runtime.device import TRAITS, cpu_multiplies_bfloat16
from grpo.runtime.precision import in_precision, precision, set_precision
from tests.helpers.models import ragged_tokens, tiny_model
from tests.helpers.scoring import logprobs_of, scores_of

CPU = torch.device("cpu")


def product(model) -> torch.dtype:
    """Return the data type of the values in a pass of the model."""
    with in_precision(model):
        return model(torch.ones(1, 2, dtype=torch.long)).logits.dtype


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_passes_are_in_the_precision_that_is_asked_for_and_so_are_those_of_a_copy(name):
    model = tiny_model("llama")
    set_precision(model, name, CPU)
    for each in (model, copy.deepcopy(model)):
        assert precision(each) == name
        assert product(each) == getattr(torch, name)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["float16", "load", "", 3, None, []])
def test_another_precision_such_as_a_models_folder_may_name_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=r"^--precision is .*; it must be auto, float32 or bfloat16$"):
        set_precision(tiny_model("llama"), name, CPU)


REFUSAL = r"^bfloat16 cannot be used on \w+, .* give --device cpu, or train with --precision float32$"


def test_bfloat16_is_refused_on_mps_where_attention_would_see_later_tokens():
    with pytest.raises(ValueError, match=REFUSAL):
        set_precision(tiny_model("llama"), "bfloat16", torch.device("mps"))
    set_precision(tiny_model("llama"), "float32", torch.device("mps"))


def test_so_is_bfloat16_that_a_models_folder_names(monkeypatch):
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], has_bfloat16=False))
    with pytest.raises(ValueError, match=REFUSAL):
        inference.load_model("starter", {"settings": {"precision": "bfloat16"}}, "cpu")


def test_a_model_that_was_never_asked_is_in_float32():
    assert precision(tiny_model("llama")) == "float32"
    assert product(tiny_model("llama")) == torch.float32


@pytest.mark.parametrize(("has_instructions", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_on_a_cpu_asks_for_its_instructions(has_instructions, expected, monkeypatch):
    monkeypatch.setattr(module, "cpu_multiplies_bfloat16", lambda: has_instructions)
    model = tiny_model("llama")
    set_precision(model, "auto", CPU)
    assert precision(model) == expected
    set_precision(model, "auto", torch.device("mps"))
    assert precision(model) == "float32"


@pytest.mark.parametrize("names", [{"_is_amx_tile_supported"}, {"_is_avx512_bf16_supported"}, set()])
def test_the_instructions_are_amx_or_avx512_bf16(names, monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in names, raising=False)
    assert cpu_multiplies_bfloat16() == bool(names)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")  # another version of torch may lack it
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not cpu_multiplies_bfloat16()


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_auto_on_cuda_asks_the_card(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = tiny_model("llama")
    set_precision(model, "auto", torch.device("cuda"))
    assert precision(model) == expected


def test_the_starter_stays_in_float32_and_so_does_what_is_trained_from_it():
    config = resolve({"model": "starter"})
    assert config.precision == "float32"
    assert config.inheritable_settings()["precision"] == "float32"
    assert precision(load("starter", CPU, config.precision).model) == "float32"
    assert resolve({"model": "no/such-model"}).precision == "auto"


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2"])
def test_in_bfloat16_log_probabilities_and_gradients_differ_by_its_rounding_alone(kind, packed, monkeypatch):
    for name in ("SHARED_FROM", "SHARED_FROM_16_BITS"):
        monkeypatch.setattr(f"grpo.scoring.tokens.{name}", 2)
    tokens, found = ragged_tokens((9, 7, 12), common_prefix=4), {}
    for name in ("float32", "bfloat16"):
        model = tiny_model(kind)
        set_precision(model, name, CPU)
        with in_precision(model):
            logprobs, entropy = scores_of(model, tokens, 1.0, shared=packed)
            assert logprobs.dtype == entropy.dtype == torch.float32
            logprobs.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[name] = logprobs.detach(), entropy, gradient
    for a, b in zip(found["float32"], found["bfloat16"], strict=True):
        difference = ((a - b).norm() / a.norm()).item()
        assert 0 < difference < 0.1  # bfloat16 has 8 bits: each of many roundings is off by at most 0.4%


def test_weights_are_the_models_own_after_a_pass_and_their_gradient_is_float32():
    model = tiny_model("llama")
    set_precision(model, "bfloat16", CPU)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="in the middle"), in_precision(model):
        raise RuntimeError("in the middle")
    with in_precision(model):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        model(torch.ones(1, 3, dtype=torch.long)).logits.float().sum().backward()
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.grad.dtype == torch.float32


def test_a_weight_with_two_places_gets_the_gradient_of_both():
    model, ids = tiny_model("llama"), torch.tensor([[1, 2, 3]])
    model.lm_head.weight = model.model.embed_tokens.weight
    gradients = []
    for name in ("float32", "bfloat16"):
        set_precision(model, name, CPU)
        model.zero_grad()
        with in_precision(model):
            model(ids).logits.float().log_softmax(-1)[..., 0].sum().backward()
        gradients.append(model.lm_head.weight.grad.clone())
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert 0 < difference < 0.05


def test_recomputed_activations_are_in_the_same_precision():
    model, tokens, found = tiny_model("llama"), ragged_tokens((9, 7, 12)), []
    set_precision(model, "bfloat16", CPU)
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        model.zero_grad()
        with in_precision(model):
            logprobs_of(model, tokens, 1.0).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*found)


def test_a_model_that_is_not_trained_is_held_in_its_precision_and_computes_the_same():
    model, tokens = tiny_model("gemma3"), ragged_tokens((9, 7, 12))
    set_precision(model, "bfloat16", CPU)
    frozen = frozen_copy(model)
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in frozen.buffers()} == {b.dtype for b in model.buffers()}
    scores = []
    for each in (model, frozen):
        with torch.no_grad(), in_precision(each):
            scores.append(logprobs_of(each, tokens, 1.0))
    assert torch.equal(*scores)
