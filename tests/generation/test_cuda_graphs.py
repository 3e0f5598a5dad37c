"""Decoding in tensors of constant shape, as CUDA graphs replay it, but run without graphs, against the plain way."""

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from grpo.algorithm.grpo import GRPO
from grpo.generation import probe as probe_module
from grpo.generation.cuda_graphs import CudaGraphDecoding
from grpo.generation.decoding import Decoder, prefill
from grpo.generation.probe import GRAPH_TOKENS, probe, supports_cuda_graphs, why_graph_refused
from grpo.generation.sampling import sampling_uniforms
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.runtime.device import TRAITS
from grpo.runtime.shortcuts import UnsupportedError
from tasks.arithmetic import Arithmetic
from tests.helpers import zoo
from tests.helpers.generation import generate, same_completions
from tests.helpers.models import ragged_tokens, tiny_model

CPU = torch.device("cpu")
COLUMNS = 24  # past Gemma's window of 6


def generate_with(model, tokens, uniforms, check_every=0, **supported):
    """Return completions of a model with only these shortcuts."""
    settings = {"limit": COLUMNS, "ends": range(3, 8), "check_every": check_every}
    return generate(model, tokens, uniforms, **settings, decoder=Decoder(**supported))


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("lengths", [(7, 4, 9), (5, 5)], ids=["ragged", "even"])
@pytest.mark.parametrize("expansion", [True, False])
def test_the_graph_decoder_samples_what_the_cached_one_does(kind, lengths, expansion, monkeypatch):
    model, tokens = tiny_model(kind), ragged_tokens(lengths)
    uniforms = sampling_uniforms(0, 0, 4 * len(lengths), COLUMNS)
    cached = generate_with(model, tokens, uniforms, expands_cache=expansion)
    calls, true_call = [], CudaGraphDecoding.__call__
    monkeypatch.setattr(CudaGraphDecoding, "__call__", lambda *args: calls.append(1) or true_call(*args))
    supported = {"expands_cache": expansion, "uses_cuda_graphs": True}
    for check_every in (1, 16):
        calls.clear()
        static = generate_with(model, tokens, uniforms, check_every, **supported)
        assert len(calls) > GRAPH_TOKENS
        assert same_completions(static, cached)
        torch.testing.assert_close(static.logprobs, cached.logprobs, atol=1e-5, rtol=0)


class Recorded(TorchDispatchMode):
    """Record which operations are called with which shapes, in order."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = tree_map(lambda x: x.shape if isinstance(x, torch.Tensor) else x, (args, kwargs))
        self.calls.append((function.overloadpacket._qualified_op_name, given))
        return function(*args, **(kwargs or {}))


def prefilled(kind, lengths=(7, 4, 9)):
    """Return the arguments of `why_graph_refused` for a tiny model."""
    model, tokens = tiny_model(kind), ragged_tokens(lengths)
    with torch.no_grad():
        cache, logits = prefill(model, tokens.prompt_ids, tokens.prompt_mask)
    return model, cache, tokens.prompt_mask, 2, logits.repeat_interleave(2, 0)


def addresses(decoder):
    """Return the addresses of the tensors that a graph reads and writes."""
    layers = (x for layer in decoder.cache.layers for x in (layer.keys, layer.values))
    return [x.data_ptr() for x in (decoder.tokens, decoder.mask, decoder.position, *layers)]


@torch.no_grad()
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_every_token_makes_the_same_calls_on_the_same_shapes_and_addresses(kind):
    # a graph replays the calls of one token; it cannot record a number that the host reads
    model, cache, mask, repeats, logits = prefilled(kind)
    decoder, calls = CudaGraphDecoding(model, cache, mask, repeats, COLUMNS), []
    before = addresses(decoder)
    for _ in range(COLUMNS):
        with Recorded() as recorded:
            logits = decoder(logits.argmax(-1))
        calls.append(recorded.calls)
    assert len(calls[0]) > 50
    assert all(call == calls[0] for call in calls)
    assert not {name for name, _ in calls[0]} & {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
    assert addresses(decoder) == before


# --- the probe ---


@torch.no_grad()
def test_the_probe_leaves_the_cache_unchanged():
    model, cache, mask, repeats, logits = prefilled("llama")
    before = [layer.keys.clone() for layer in cache.layers]
    assert not why_graph_refused(model, cache, mask, repeats, logits)
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


@torch.no_grad()
def test_a_model_that_cannot_be_recorded_is_not_supported_but_too_little_memory_is_another_matter(monkeypatch):
    decoding = CudaGraphDecoding(*prefilled("llama")[:4], 1)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    for error, expected in (
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), UnsupportedError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ):
        monkeypatch.setattr(decoding, "_forward", Mock(side_effect=error))
        with pytest.raises(expected):
            decoding._record()


@torch.no_grad()
@pytest.mark.parametrize("error", [UnsupportedError("a CUDA graph cannot record a pass"), None], ids=str)
def test_the_probe_finds_a_graph_that_fails_or_differs(error, monkeypatch):
    true_forward = CudaGraphDecoding._forward

    def forward(self):
        if error is not None:
            raise error
        true_forward(self)
        if self.done == GRAPH_TOKENS:  # a replay that fails late
            self.logits = self.logits.roll(1, 0)

    monkeypatch.setattr(CudaGraphDecoding, "_forward", forward)
    assert ("cannot record" if error else "differ by") in why_graph_refused(*prefilled("llama"))


@torch.no_grad()
def test_running_out_of_memory_in_the_probe_is_raised(monkeypatch):
    def forward(self):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(CudaGraphDecoding, "_forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        why_graph_refused(*prefilled("llama"))


def test_without_cuda_the_probe_says_so_once_and_the_model_decodes_without_graphs(capsys):
    lm, task, tokens = load("starter", CPU), Arithmetic(), ragged_tokens()
    _, without = probe(lm, task)
    assert capsys.readouterr().out == ""
    _, asked = probe(lm, task, cuda_graphs=True)
    assert asked == without
    assert not asked.uses_cuda_graphs
    uniforms = sampling_uniforms(0, 0, 12, COLUMNS)
    plain = generate_with(lm.model, tokens, uniforms, **vars(without))
    for _ in range(2):
        assert torch.equal(generate_with(lm.model, tokens, uniforms, **vars(asked)).ids, plain.ids)
    assert capsys.readouterr().out.count("CUDA graphs") == 1
    assert not supports_cuda_graphs(lm.model, tokens.prompt_ids, tokens.prompt_mask)


@pytest.mark.parametrize("found", [True, False])
def test_a_run_probes_once_at_the_start_and_only_if_the_settings_ask_for_graphs(found, monkeypatch):
    probes, decoders, true_init = [], [], CudaGraphDecoding.__init__
    monkeypatch.setattr(probe_module, "supports_cuda_graphs", lambda *_: probes.append(1) or found)
    monkeypatch.setattr(CudaGraphDecoding, "__init__", lambda *args: decoders.append(1) or true_init(*args))
    settings = {"model": "starter", "batch_size": 2, "num_generations": 2}
    for asked in (False, True):
        made = GRPO(resolve({**settings, "cuda_graphs": asked}), Arithmetic(), load("starter", CPU))
        assert len(probes) == asked
        assert made.decoder.uses_cuda_graphs == (asked and found)
        for step in (1, 2):
            made.step(step)
        assert len(probes) == asked
        assert bool(decoders) == (asked and found)


def test_several_devices_never_decode_by_graphs(monkeypatch):
    monkeypatch.setattr(probe_module, "is_sharded", lambda model: True)
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], has_graphs=True))
    monkeypatch.setattr(probe_module, "why_graph_refused", lambda *_: "")
    _, decoder = probe(load("starter", CPU), Arithmetic(), cuda_graphs=True)
    assert not decoder.uses_cuda_graphs
