"""A shortcut that a model does not support is left out, with the reason. A fault in a shortcut ends the run."""

from functools import partial

import pytest
import torch
from torch import Tensor

from grpo.generation import decoding, probe
from grpo.generation.decoding import Decoder
from grpo.generation.probe import (
    probe_scorer,
    supports_cache_expansion,
    supports_common_prefix,
    supports_prefix_attention,
)
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.runtime.microbatch import split_microbatches
from grpo.runtime.shortcuts import FLOAT32, SIXTEEN_BITS, UnsupportedError, is_unsupported, why_refused
from grpo.scoring import scorer as scoring
from grpo.scoring.attention.layout import Layout
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


def test_a_tensor_on_the_wrong_device_ends_a_probe(monkeypatch):
    with pretended_device():
        model, tokens = tiny_model("llama").to(NAME), ragged_tokens((9, 12), common_prefix=4)
        ids, mask = tokens.prompt_ids.to(NAME), tokens.prompt_mask.to(NAME)
        prompts = [[3, 4, 5, 6, 7], [3, 4, 5, 6, 8]]
        assert probe_scorer(model, ids, mask).shares_prompts
        for module, tried in (
            (scoring, lambda: probe_scorer(model, ids, mask)),
            (decoding, lambda: supports_common_prefix(model, prompts, 0)),
        ):
            with monkeypatch.context() as patch:
                positions = partial(on_the_cpu, module.position_ids)
                patch.setattr(module, "position_ids", positions)
                with pytest.raises(RuntimeError, match="same device"):
                    tried()


def on_the_cpu(function, *args) -> Tensor:
    return function(*args).cpu()


@pytest.mark.parametrize("name", ["cpu", NAME])
def test_the_starter_supports_every_shortcut(name):
    with pretended_device():
        lm = load("starter", torch.device(name))
        scorer, decoder = probe.probe(lm, make_task(resolve({})))
    assert scorer == Scorer(shares_prompts=True, fuses_output=True)
    assert decoder == Decoder(expands_cache=True, shares_prefix=True, holds_prefix=True)


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


@pytest.mark.parametrize("least", [16, 2], ids=["short beginning", "beginning shared"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3", "phi3"])
def test_shortcuts_are_accepted_in_bfloat16_and_refused_if_a_token_too_many_is_seen(kind, least, monkeypatch, capsys):
    for name in ("SHARED_FROM", "SHARED_FROM_16_BITS"):
        monkeypatch.setattr(f"grpo.scoring.tokens.{name}", least)
    model, tokens = tiny_model(kind).to(torch.bfloat16), ragged_tokens((9, 12, 11, 14), common_prefix=4)
    ids, mask = tokens.prompt_ids, tokens.prompt_mask
    prompts = [row[seen].tolist() for row, seen in zip(ids, mask, strict=True)]
    assert probe_scorer(model, ids, mask) == DENSE, "the tolerance of float32 is too small"
    assert "In updates, prompts are computed for each of their completions: log-prob" in capsys.readouterr().out
    monkeypatch.setattr(probe, "tolerance_of", lambda model: SIXTEEN_BITS)
    assert probe_scorer(model, ids, mask) == Scorer(shares_prompts=True, fuses_output=True)
    assert supports_cache_expansion(model, ids, mask)
    assert supports_common_prefix(model, prompts, 0)
    assert supports_prefix_attention(model, ids, mask, 4) == (kind != "gemma3")
    capsys.readouterr()
    next_token_seen(monkeypatch)
    rows_mixed(monkeypatch)
    assert probe_scorer(model, ids, mask) == DENSE
    assert not supports_cache_expansion(model, ids, mask)
    assert "root mean square (allowed: 0.15)" in capsys.readouterr().out
