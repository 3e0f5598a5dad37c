"""Decoding over a cache of one shape: what CUDA graphs would replay, run here without them, against the plain way."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from grpo import graphs, sampling
from grpo.graphs import StaticSteps, agrees, can_replay
from grpo.sampling import generate, prefill, token_noise
from tests import zoo
from tests.conftest import ragged_tokens, tiny_model

COLUMNS = 24  # past Gemma's window of 6


def draw(model, tokens, noise, **more):
    return generate(
        model,
        tokens.prompt_ids,
        tokens.prompt_mask,
        num_generations=4,
        max_new_tokens=COLUMNS,
        end_ids=range(3, 8),
        noise=noise,
        **more,
    )


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("lengths", [(7, 4, 9), (5, 5)], ids=["ragged", "even"])
@pytest.mark.parametrize("shared", [True, False])
def test_static_steps_draw_what_plain_ones_do(kind, lengths, shared, monkeypatch):
    model, tokens = tiny_model(kind), ragged_tokens(lengths)
    noise = token_noise(0, 0, 4 * len(lengths), COLUMNS)
    plain = draw(model, tokens, noise, shared=shared)
    monkeypatch.setattr(sampling, "can_replay", agrees)
    used = []
    monkeypatch.setattr(StaticSteps, "__call__", lambda *a, call=StaticSteps.__call__: used.append(1) or call(*a))
    for check_every in (1, 16):
        used.clear()
        static = draw(model, tokens, noise, shared=shared, graphs=True, check_every=check_every)
        assert len(used) > graphs.TRIED, "not for the trial alone"
        for name in ("ids", "lengths", "ended"):
            assert torch.equal(getattr(static, name), getattr(plain, name))
        torch.testing.assert_close(static.logprobs, plain.logprobs, atol=1e-5, rtol=0)


class Recorded(TorchDispatchMode):
    """What is called with which shapes, in order."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = tree_map(lambda x: x.shape if isinstance(x, torch.Tensor) else x, (args, kwargs))
        self.calls.append((function.overloadpacket._qualified_op_name, given))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_every_token_is_the_same_calls_on_the_same_shapes_and_places(kind):
    # what a graph replays is one token's; a number that is read back cannot be recorded at all
    model, cache, mask, repeats, logits = on(kind)
    steps, calls = StaticSteps(model, cache, mask, repeats, COLUMNS), []
    places = [steps.tokens, steps.mask, steps.position, *(x for y in steps.cache.layers for x in (y.keys, y.values))]
    at = [place.data_ptr() for place in places]
    for _ in range(COLUMNS):
        with Recorded() as recorded:
            logits = steps(logits.argmax(-1))
        calls.append(recorded.calls)
    assert len(calls[0]) > 50
    assert all(call == calls[0] for call in calls)
    assert not {name for name, _ in calls[0]} & {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
    places = [steps.tokens, steps.mask, steps.position, *(x for y in steps.cache.layers for x in (y.keys, y.values))]
    assert [place.data_ptr() for place in places] == at


def on(kind, lengths=(7, 4, 9)):
    model, tokens = tiny_model(kind), ragged_tokens(lengths)
    with torch.no_grad():
        cache, logits = prefill(model, tokens.prompt_ids, tokens.prompt_mask)
    return model, cache, tokens.prompt_mask, 2, logits.repeat_interleave(2, 0)


@torch.no_grad()
def test_the_trial_leaves_the_cache_as_it_was():
    model, cache, mask, repeats, logits = on("llama")
    before = [layer.keys.clone() for layer in cache.layers]
    assert agrees(model, cache, mask, repeats, logits)
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing"), None], ids=str)
def test_what_refuses_or_differs_is_found_by_the_trial(error, monkeypatch):
    true_forward = StaticSteps._forward

    def forward(self):
        if error is not None:
            raise error
        true_forward(self)
        if self.done == graphs.TRIED:  # a replay that goes wrong late
            self.logits = self.logits.roll(1, 0)

    monkeypatch.setattr(StaticSteps, "_forward", forward)
    assert not agrees(*on("llama"))


@torch.no_grad()
def test_running_out_of_memory_in_the_trial_is_no_refusal(monkeypatch):
    def forward(self):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(StaticSteps, "_forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        agrees(*on("llama"))


def test_without_cuda_it_is_said_once_and_done_without(capsys):
    model, tokens = tiny_model("llama"), ragged_tokens()
    noise = token_noise(0, 0, 12, COLUMNS)
    plain = draw(model, tokens, noise)
    assert capsys.readouterr().out == ""
    for _ in range(2):
        assert torch.equal(draw(model, tokens, noise, graphs=True).ids, plain.ids)
    assert capsys.readouterr().out.count("CUDA graphs") == 1
    assert not can_replay(*on("llama"))


def test_several_devices_never_decode_by_graphs(monkeypatch):
    monkeypatch.setattr(sampling, "can_replay", lambda *_: pytest.fail("asked"))
    model, tokens = tiny_model("llama"), ragged_tokens()
    draw(model, tokens, None, graphs=True, more=lambda running: running)
