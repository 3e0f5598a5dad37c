"""The shared prefix against the dense path, and both against one row at a time."""

from dataclasses import replace

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

from grpo import logprobs as module
from grpo import packing
from grpo.logprobs import Tokens, can_share, completion_logprobs, token_entropy, token_logprobs
from grpo.packing import SCORES
from tests.conftest import VOCABULARY, ragged_tokens, tiny_model
from tests.zoo import KINDS, SIZES, WINDOW

OTHER_SIZES = SIZES | {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}


def gradient(model, tokens, shared):
    """The gradient of a weighted sum of the masked log-probabilities, as one vector."""
    model.zero_grad()
    values, _ = completion_logprobs(model, tokens, 0.7, shared=shared)
    weights = torch.linspace(-1, 2, values.numel()).view_as(values)
    torch.where(tokens.completion_mask, values * weights, 0.0).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 2, 12])
def test_shared_prefix_equals_dense_in_value_and_gradient(kind, columns):
    # 12 columns on prompts of up to 9 tokens reach beyond Gemma 3's window
    assert WINDOW < 9
    model, tokens = tiny_model(kind), ragged_tokens(columns=columns)
    shared = completion_logprobs(model, tokens, 0.7, shared=True, entropy=True)
    dense = completion_logprobs(model, tokens, 0.7, shared=False, entropy=True)
    for ours, oracle in zip(shared, dense, strict=True):
        torch.testing.assert_close(ours, oracle, atol=1e-5, rtol=1e-5)
        assert not ours[~tokens.completion_mask].any()
    a, b = gradient(model, tokens, True), gradient(model, tokens, False)
    assert ((a - b).norm() / b.norm()).item() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scores", [SCORES, 0], ids=["in memory", "fused"])
@pytest.mark.parametrize(("lengths", "generations"), [((7, 4, 9), 3), ((3,), 2), ((1, 12), 8)])
def test_they_differ_by_the_rounding_of_numbers_alone(kind, scores, lengths, generations, monkeypatch):
    # in float64 nothing is left of it, but that of the log-softmax, which is taken in float32
    monkeypatch.setattr(packing, "SCORES", scores)
    model, tokens = tiny_model(kind).double(), ragged_tokens(lengths, generations, columns=9)
    shared, dense = (completion_logprobs(model, tokens, 1.0, shared=shared)[0] for shared in (True, False))
    torch.testing.assert_close(shared, dense, atol=1e-5, rtol=1e-6)
    a, b = gradient(model, tokens, True), gradient(model, tokens, False)
    assert ((a - b).norm() / b.norm()).item() < 1e-6


def test_a_completion_of_which_nothing_is_learned_changes_no_other():
    # as `--mask-truncated` leaves it
    model, tokens = tiny_model("qwen2"), ragged_tokens()
    whole, _ = completion_logprobs(model, tokens, 1.0)
    mask = tokens.completion_mask.clone()
    mask[4] = False
    values, _ = completion_logprobs(model, replace(tokens, completion_mask=mask), 1.0)
    torch.testing.assert_close(values, torch.where(mask, whole, 0.0), atol=1e-5, rtol=0)


def test_linear_layers_see_real_tokens_only_and_the_head_those_that_are_read():
    model, tokens = tiny_model("llama"), ragged_tokens(extra_padding=5)
    seen = []
    for layer in (model.model.layers[1].mlp.up_proj, model.lm_head):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.shape[:2].numel()))
    completion_logprobs(model, tokens, 1.0)
    inputs = int(tokens.completion_mask[:, 1:].sum())  # all tokens but the last of each
    assert seen == [7 + 4 + 9 + inputs, 3 + inputs]


def test_the_same_bits_each_time():
    model, tokens = tiny_model("qwen2"), ragged_tokens()
    assert torch.equal(gradient(model, tokens, True), gradient(model, tokens, True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_each_row_alone_without_padding_or_cache(kind):
    # the plainest computation there is: one row, no padding, no mask, no positions, no cache
    model, tokens = tiny_model(kind), ragged_tokens()
    batched, _ = completion_logprobs(model, tokens, 1.0)
    for row in range(tokens.completion_ids.shape[0]):
        group = row // tokens.num_generations
        prompt = tokens.prompt_ids[group][tokens.prompt_mask[group]]
        completion = tokens.completion_ids[row][tokens.completion_mask[row]]
        with torch.no_grad():
            logits = model(torch.cat([prompt, completion])[None]).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, completion[:, None]).squeeze(-1)
        torch.testing.assert_close(batched[row, : len(completion)], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [True, False])
def test_left_padding_changes_nothing(kind, shared):
    model = tiny_model(kind)
    plain, _ = completion_logprobs(model, ragged_tokens(), 1.0, shared=shared)
    padded, _ = completion_logprobs(model, ragged_tokens(extra_padding=5), 1.0, shared=shared)
    mask = ragged_tokens().completion_mask
    torch.testing.assert_close(plain[mask], padded[mask], atol=1e-5, rtol=0)


def test_log_softmax_by_hand():
    # logits log 1, log 2, log 5 at temperature 1: probabilities 1/8, 2/8, 5/8
    logits = torch.tensor([[[1.0, 2.0, 5.0]]]).log()
    assert token_logprobs(logits, torch.tensor([[2]]), 1.0).exp().item() == pytest.approx(5 / 8)
    # at temperature 0.5 the weights are squared: 1, 4, 25
    assert token_logprobs(logits, torch.tensor([[1]]), 0.5).exp().item() == pytest.approx(4 / 30)
    expected = -sum(p * torch.tensor(p).log().item() for p in (1 / 8, 2 / 8, 5 / 8))
    assert token_entropy(logits, 1.0).item() == pytest.approx(expected, abs=1e-6)


def test_chunks_change_neither_value_nor_gradient(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(5, 3, 11, generator=generator), torch.randint(0, 11, (5, 3), generator=generator)
    results = []
    for chunk in (2**24, 40):
        monkeypatch.setattr(module, "CHUNK", chunk)
        x = logits.clone().requires_grad_()
        values = token_logprobs(x, ids, 0.9)
        values.square().sum().backward()
        results.append((values.detach(), x.grad, token_entropy(logits, 0.9)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_slice_of_groups_is_trimmed_and_scores_the_same():
    model, tokens = tiny_model("llama"), ragged_tokens((3, 9, 5), columns=7, seed=3)
    whole, _ = completion_logprobs(model, tokens, 1.0)
    part = tokens.part(slice(6, 9))
    assert part.prompt_ids.shape[1] == 5
    values, _ = completion_logprobs(model, part, 1.0)
    mask = part.completion_mask
    torch.testing.assert_close(values[mask], whole[6:, : mask.shape[1]][mask], atol=1e-5, rtol=0)


def test_a_part_of_a_group_runs_its_prompt_again_and_scores_the_same():
    model, tokens = tiny_model("llama"), ragged_tokens((3, 9, 5), columns=7, seed=3)
    whole, _ = completion_logprobs(model, tokens, 1.0)
    part = tokens.part(slice(4, 6))
    assert part.num_generations == 2
    assert part.prompt_ids.shape == (1, 9)
    values, _ = completion_logprobs(model, part, 1.0)
    mask = part.completion_mask
    torch.testing.assert_close(values[mask], whole[4:6, : mask.shape[1]][mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_these_models_can_share_and_one_that_sees_other_tokens_falls_back(kind, monkeypatch):
    model, tokens = tiny_model(kind), ragged_tokens((9, 12))
    assert can_share(model, tokens.prompt_ids, tokens.prompt_mask)
    true_of = packing.Layout.of
    monkeypatch.setattr(packing.Layout, "of", lambda prompts, inputs: true_of(prompts.flip(0), inputs))
    assert not can_share(model, tokens.prompt_ids, tokens.prompt_mask)
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
    with pytest.raises(ValueError, match="no shared prefix with"):
        completion_logprobs(model, tokens, 1.0)
    assert not can_share(model, tokens.prompt_ids, tokens.prompt_mask)
    assert model.config._attn_implementation == before


def test_groups_are_rows_in_order():
    tokens = ragged_tokens((4, 4), num_generations=2)
    second = tokens.part(slice(2, 4))
    assert isinstance(second, Tokens)
    assert torch.equal(second.prompt_ids, tokens.prompt_ids[1:])
    width = second.completion_ids.shape[1]
    assert torch.equal(second.completion_ids, tokens.completion_ids[2:, :width])
