"""What all prompts begin with is run once, with the same logits, cache and greedy tokens as in each prompt."""

from dataclasses import replace

import pytest
import torch

from grpo.generation.decoding import Decoder, begin_after_prefix, prefill
from grpo.generation.greedy import greedy
from grpo.generation.probe import supports_common_prefix, supports_prefix_attention
from grpo.generation.sampling import Generator, SamplingParams, sampling_uniforms
from grpo.model.language_model import LanguageModel
from grpo.runtime.device import TRAITS
from grpo.scoring import tokens
from grpo.scoring.attention.common_prefix import CommonPrefix
from grpo.scoring.tokens import common_prefix_length, left_pad
from tests.helpers import zoo
from tests.helpers.models import tiny_model


def some_prompts(lengths=(9, 14, 7, 20, 9), prefix=5):
    """Return random prompts that all begin with the same `prefix` tokens and differ in the next one."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(3, 50, (prefix,), generator=generator).tolist()
    return [[*start, 3 + i, *torch.randint(3, 50, (n,), generator=generator).tolist()] for i, n in enumerate(lengths)]


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("prefix", [1, 3, 5])
def test_a_common_prefix_gives_the_same_logits_and_cache(kind, prefix):
    model, prompts = tiny_model(kind), some_prompts()
    ids, mask = left_pad(prompts, 0, torch.device("cpu"))
    with torch.no_grad():
        _, separate = prefill(model, ids, mask)
        cache, shared = prefill(model, ids, mask, prefix)
    torch.testing.assert_close(shared, separate, atol=2e-5, rtol=1e-4)
    assert cache.get_seq_length() == ids.shape[1]
    assert supports_common_prefix(model, prompts, 0)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_greedy_tokens_are_the_same_shared_separate_and_alone(kind):
    lm, prompts = LanguageModel(tiny_model(kind), None, (1,), 0), some_prompts()
    separate, shared = (greedy(lm, prompts, 12, 3, Decoder(shares_prefix=shares)) for shares in (False, True))
    for row, prompt in enumerate(prompts):
        alone = greedy(lm, [prompt], 12, 1)
        expected = alone.ids[0, : alone.lengths[0]].tolist()
        for found in (separate, shared):
            assert found.ids[row, : found.lengths[row]].tolist() == expected


@pytest.mark.parametrize("kind", [kind for kind in zoo.KINDS if kind != "gemma3"])
@pytest.mark.parametrize("generations", [1, 3])
def test_a_beginning_held_once_gives_the_same_samples(kind, generations, monkeypatch):
    monkeypatch.setattr(tokens, "SHARED_FROM", 5)
    model, prompts = tiny_model(kind), some_prompts()
    ids, mask = left_pad(prompts, 0, torch.device("cpu"))
    assert supports_prefix_attention(model, ids, mask, 5)
    held = []
    decoders = [Decoder(expands_cache=True, shares_prefix=True, holds_prefix=holds) for holds in (False, True)]
    true_attend = CommonPrefix.attend
    monkeypatch.setattr(CommonPrefix, "attend", lambda *args: held.append(True) or true_attend(*args))
    params, uniforms = SamplingParams(12, range(1, 9), generations), sampling_uniforms(0, 1, 5 * generations, 12)
    # some rows end early and are dropped; in passes of two groups, every row may have padding
    for rows in (None, 2 * generations):
        copied, once = (Generator(model, decoder)(ids, mask, params, uniforms, rows, 5) for decoder in decoders)
        assert torch.equal(copied.ids, once.ids)
        assert copied.lengths.min() < copied.lengths.max()
        torch.testing.assert_close(copied.logprobs, once.logprobs, atol=3e-5, rtol=0)
    assert held


@pytest.mark.parametrize(("least", "holds"), [(5 * 3 * 4, True), (5 * 3 * 4 + 1, False)])
def test_a_beginning_is_held_once_only_if_its_copies_have_as_many_tokens_as_the_device_asks_for(
    least, holds, monkeypatch
):
    monkeypatch.setattr(tokens, "SHARED_FROM", 1)
    monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], copied_tokens=least))
    ids, mask = left_pad(some_prompts(prefix=4), 0, torch.device("cpu"))  # 5 prompts
    decoder = Decoder(expands_cache=True, holds_prefix=True)
    decoding, _ = decoder.begin(tiny_model("qwen2"), ids, mask, repeats=3, columns=2, common_prefix=4)
    assert (decoding.prefix is not None) == holds


def test_a_beginning_held_once_is_refused_where_layers_keep_a_window_only():
    ids, mask = left_pad(some_prompts(), 0, torch.device("cpu"))
    assert not supports_prefix_attention(tiny_model("gemma3"), ids, mask, 5)


def test_a_beginning_held_once_takes_the_memory_of_one_copy():
    model, prompts = tiny_model("llama"), some_prompts(lengths=(9, 9, 9), prefix=20)
    ids, mask = left_pad(prompts, 0, torch.device("cpu"))
    with torch.no_grad():
        decoding, _ = begin_after_prefix(model, ids, mask, 4, 8, 20)
    assert decoding.prefix.keys[0].shape == (2, 20, 8)
    assert decoding.cache.layers[0].keys.shape == (12, 2, 10, 8)  # the tokens after the prefix alone


def test_the_common_prefix_leaves_each_prompt_a_token():
    assert common_prefix_length([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_prefix_length([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix_length([[1, 2], [1, 2, 3]]) == 1
    assert common_prefix_length([[1], [2]]) == 0


def test_a_model_without_a_cache_of_keys_and_values_does_not_support_it():
    class Stateful(torch.nn.Module):
        """A model without a cache of keys and values."""

        device = torch.device("cpu")
        config = tiny_model("llama").config

        def forward(self, input_ids, past_key_values, **_):
            past_key_values.layers = [object()]
            logits = torch.zeros(*input_ids.shape, 50)
            return type("Output", (), {"logits": logits})

    assert not supports_common_prefix(Stateful(), some_prompts(), 0)
