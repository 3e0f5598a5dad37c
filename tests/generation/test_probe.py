"""What a model supports: each shortcut is compared with the plain way, and left out if it fails or differs."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GptOssConfig,
    Lfm2Config,
    MambaConfig,
)

from grpo.generation import decoding
from grpo.generation.decoding import Decoder
from grpo.generation.probe import probe, probe_scorer, supports_cache_expansion
from grpo.model.loading import load
from grpo.runtime.shortcuts import UnsupportedError
from grpo.scoring.attention import packed as packed_attention
from grpo.scoring.scorer import DENSE, Scorer
from tasks.arithmetic import Arithmetic
from tests.helpers.models import VOCABULARY, ragged_tokens, tiny_model
from tests.helpers.scoring import logprobs_of
from tests.helpers.zoo import KINDS, SIZES, build

CPU = torch.device("cpu")
OTHER_SIZES = SIZES | {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}


@pytest.mark.parametrize("kind", ["starter", *KINDS])
def test_these_models_support_all_shortcuts_on_the_prompts_of_a_task(kind, tmp_path):
    lm = load(kind if kind == "starter" else str(build(tmp_path / kind, kind)), CPU)
    scorer, decoder = probe(lm, Arithmetic())
    assert scorer == Scorer(shares_prompts=True, fuses_output=True)
    assert decoder == Decoder(expands_cache=True, shares_prefix=True, holds_prefix=kind != "gemma3")


# --- packed rows ---


@pytest.mark.parametrize("kind", KINDS)
def test_these_models_support_packing_and_one_that_sees_other_tokens_falls_back(kind, monkeypatch):
    model, tokens = tiny_model(kind), ragged_tokens((9, 12))
    assert probe_scorer(model, tokens.prompt_ids, tokens.prompt_mask).shares_prompts
    true_of = packed_attention.Layout.of
    monkeypatch.setattr(packed_attention.Layout, "of", lambda prompts, *more: true_of(prompts.flip(0), *more))
    assert probe_scorer(model, tokens.prompt_ids, tokens.prompt_mask) == DENSE
    assert model.config._attn_implementation == "sdpa"


OTHERS = {
    "softcap": Gemma2Config(head_dim=8, **OTHER_SIZES),
    "attention sinks": GptOssConfig(head_dim=8, num_local_experts=2, num_experts_per_tok=1, **OTHER_SIZES),
    "a state space": MambaConfig(**OTHER_SIZES),
    "a bias by position": BloomConfig(**OTHER_SIZES),
    "convolutions": Lfm2Config(layer_types=["conv", "full_attention"], **OTHER_SIZES),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_model_that_does_more_than_plain_attention_is_refused(other):
    model, tokens = AutoModelForCausalLM.from_config(OTHERS[other]).eval(), ragged_tokens((9, 12))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="packed rows do not work with"):
        logprobs_of(model, tokens, 1.0)
    assert probe_scorer(model, tokens.prompt_ids, tokens.prompt_mask) == DENSE
    assert model.config._attn_implementation == before


# --- the cache of a prompt, copied for its completions ---


@pytest.mark.parametrize("kind", KINDS)
def test_these_models_support_cache_expansion_and_one_that_mixes_rows_falls_back(kind, monkeypatch):
    model, tokens = tiny_model(kind), ragged_tokens((9, 12))
    assert supports_cache_expansion(model, tokens.prompt_ids, tokens.prompt_mask)
    true_reserve = decoding.reserve

    def mixed(x, repeats, more=0):
        return true_reserve(x.roll(repeats - 1, 0), repeats, more)

    monkeypatch.setattr(decoding, "reserve", mixed)
    assert not supports_cache_expansion(model, tokens.prompt_ids, tokens.prompt_mask)


def test_a_model_that_refuses_to_copy_its_cache_does_not_support_cache_expansion(monkeypatch):
    model, tokens, true_reserve = tiny_model("llama"), ragged_tokens((9, 12)), decoding.reserve

    def refuse(x, repeats, more=0):
        if repeats > 1:
            raise UnsupportedError("no")
        return true_reserve(x, repeats, more)

    monkeypatch.setattr(decoding, "reserve", refuse)
    assert not supports_cache_expansion(model, tokens.prompt_ids, tokens.prompt_mask)
