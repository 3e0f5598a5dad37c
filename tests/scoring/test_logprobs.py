"""Log-probabilities of packed rows against those of dense rows, and both against one row at a time."""

import math
from dataclasses import replace

import pytest
import torch

from grpo.generation.decoding import begin_after_prefix, prefill
from grpo.scoring import scorer as scorer_module
from grpo.scoring import tokens as tokens_module
from grpo.scoring.attention import packed as packed_attention
from grpo.scoring.scorer import token_entropy, token_logprobs
from grpo.scoring.tokens import shared_beginning
from tests.helpers.models import VOCABULARY, ragged_tokens, tiny_model
from tests.helpers.products import Products
from tests.helpers.scoring import logprobs_of, scores_of
from tests.helpers.zoo import KINDS, WINDOW


def gradient(model, tokens, packed):
    """Return the gradient of a weighted sum of the masked log-probabilities, as one vector."""
    model.zero_grad()
    values = logprobs_of(model, tokens, 0.7, shared=packed)
    weights = torch.linspace(-1, 2, values.numel()).view_as(values)
    torch.where(tokens.completion_mask, values * weights, 0.0).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 2, 12])
def test_packed_equals_dense_in_value_and_gradient(kind, columns):
    # 12 columns on prompts of up to 9 tokens reach beyond Gemma 3's window
    assert WINDOW < 9
    model, tokens = tiny_model(kind), ragged_tokens(columns=columns)
    packed = scores_of(model, tokens, 0.7, shared=True)
    dense = scores_of(model, tokens, 0.7, shared=False)
    for ours, oracle in zip(packed, dense, strict=True):
        torch.testing.assert_close(ours, oracle, atol=1e-5, rtol=1e-5)
        assert not ours[~tokens.completion_mask].any()
    a, b = gradient(model, tokens, True), gradient(model, tokens, False)
    assert ((a - b).norm() / b.norm()).item() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scores", [packed_attention.SCORES, 0], ids=["in memory", "fused"])
@pytest.mark.parametrize(("lengths", "generations"), [((7, 4, 9), 3), ((3,), 2), ((1, 12), 8)])
def test_packed_and_dense_differ_only_by_rounding(kind, scores, lengths, generations, monkeypatch):
    # in float64 only the rounding of the log-softmax is left, which is computed in float32
    monkeypatch.setattr(packed_attention, "SCORES", scores)
    model, tokens = tiny_model(kind).double(), ragged_tokens(lengths, generations, columns=9)
    packed, dense = (logprobs_of(model, tokens, 1.0, shared=packed) for packed in (True, False))
    torch.testing.assert_close(packed, dense, atol=1e-5, rtol=1e-6)
    a, b = gradient(model, tokens, True), gradient(model, tokens, False)
    assert ((a - b).norm() / b.norm()).item() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("lengths", "generations"), [((9, 7, 12), 3), ((7, 7), 1)])
def test_a_common_beginning_is_run_once_and_changes_no_value_or_gradient(kind, lengths, generations, monkeypatch):
    # In float64 only the rounding of the log-softmax is left. Of 7 tokens 6 are common, and the window is 6.
    monkeypatch.setattr(tokens_module, "SHARED_FROM", 2)
    model = tiny_model(kind).double()
    tokens = ragged_tokens(lengths, generations, columns=9, extra_padding=2, common_prefix=6)
    assert shared_beginning(tokens.prompt_ids, tokens.prompt_mask, least=2) == 6
    packed, dense = (logprobs_of(model, tokens, 1.0, shared=packed) for packed in (True, False))
    torch.testing.assert_close(packed, dense, atol=1e-5, rtol=1e-6)
    a, b = gradient(model, tokens, True), gradient(model, tokens, False)
    assert ((a - b).norm() / b.norm()).item() < 1e-6
    assert torch.equal(a, gradient(model, tokens, True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_common_beginning_in_float32(kind, monkeypatch):
    monkeypatch.setattr(tokens_module, "SHARED_FROM", 2)
    model, tokens = tiny_model(kind), ragged_tokens((9, 7, 12), columns=9, common_prefix=6)
    packed, dense = (logprobs_of(model, tokens, 1.0, shared=packed) for packed in (True, False))
    torch.testing.assert_close(packed, dense, atol=1e-5, rtol=1e-5)
    a, b = gradient(model, tokens, True), gradient(model, tokens, False)
    assert ((a - b).norm() / b.norm()).item() < 1e-5


def test_linear_layers_see_a_common_beginning_once_if_it_is_long_enough(monkeypatch):
    model, tokens = tiny_model("llama"), ragged_tokens((9, 7, 12), common_prefix=6)
    seen = []
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda layer, inputs, out: seen.append(out.shape[1]))
    for shared_from in (7, 6):
        monkeypatch.setattr(tokens_module, "SHARED_FROM", shared_from)
        logprobs_of(model, tokens, 1.0)
    assert seen[0] - seen[1] == 2 * 6 - 1  # two of three prompts do without it, and there is one filler token


def test_a_completion_without_tokens_in_the_loss_changes_no_other():
    # --mask-truncated-completions makes such completions
    model, tokens = tiny_model("qwen2"), ragged_tokens()
    whole = logprobs_of(model, tokens, 1.0)
    mask = tokens.completion_mask.clone()
    mask[4] = False
    values = logprobs_of(model, replace(tokens, completion_mask=mask), 1.0)
    torch.testing.assert_close(values, torch.where(mask, whole, 0.0), atol=1e-5, rtol=0)


def test_linear_layers_see_only_real_tokens_and_the_output_layer_only_tokens_whose_logits_are_needed():
    model, tokens = tiny_model("llama"), ragged_tokens(extra_padding=5)
    seen = []
    for layer in (model.model.layers[1].mlp.up_proj, model.lm_head):
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.shape[:2].numel()))
    logprobs_of(model, tokens, 1.0)
    inputs = int(tokens.completion_mask[:, 1:].sum())  # all tokens but the last of each
    assert seen == [7 + 4 + 9 + inputs, 3 + inputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_output_layer_is_never_copied_for_each_row(dtype):
    # torch copies it if the rows are slices of hidden states: see `last_columns`
    model, tokens = tiny_model("llama").to(dtype).requires_grad_(False), ragged_tokens()
    with torch.no_grad(), Products(torch.ops.aten.bmm) as seen:
        logprobs_of(model, tokens, 1.0, shared=False)
        prefill(model, tokens.prompt_ids, tokens.prompt_mask)
        begin_after_prefix(model, tokens.prompt_ids, tokens.prompt_mask, 1, 1, 1)
    assert VOCABULARY not in {second[-1] for _, second in seen.shapes}


def test_gradients_have_the_same_bits_each_time():
    model, tokens = tiny_model("qwen2"), ragged_tokens()
    assert torch.equal(gradient(model, tokens, True), gradient(model, tokens, True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_each_row_alone_without_padding_or_cache(kind):
    # the plainest computation: one row without padding, mask, positions or cache
    model, tokens = tiny_model(kind), ragged_tokens()
    batched = logprobs_of(model, tokens, 1.0)
    for row in range(tokens.completion_ids.shape[0]):
        group = row // tokens.num_generations
        prompt = tokens.prompt_ids[group][tokens.prompt_mask[group]]
        completion = tokens.completion_ids[row][tokens.completion_mask[row]]
        with torch.no_grad():
            logits = model(torch.cat([prompt, completion])[None]).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, completion[:, None]).squeeze(-1)
        torch.testing.assert_close(batched[row, : len(completion)], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [True, False])
def test_left_padding_changes_nothing(kind, packed):
    model = tiny_model(kind)
    plain = logprobs_of(model, ragged_tokens(), 1.0, shared=packed)
    padded = logprobs_of(model, ragged_tokens(extra_padding=5), 1.0, shared=packed)
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
        monkeypatch.setattr(scorer_module, "CHUNK", chunk)
        x = logits.clone().requires_grad_()
        values = token_logprobs(x, ids, 0.9)
        values.square().sum().backward()
        results.append((values.detach(), x.grad, token_entropy(logits, 0.9)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_slice_of_groups_is_trimmed_and_scores_the_same():
    model, tokens = tiny_model("llama"), ragged_tokens((3, 9, 5), columns=7, seed=3)
    whole = logprobs_of(model, tokens, 1.0)
    part = tokens.slice_rows(slice(6, 9))
    assert part.prompt_ids.shape[1] == 5
    values = logprobs_of(model, part, 1.0)
    mask = part.completion_mask
    torch.testing.assert_close(values[mask], whole[6:, : mask.shape[1]][mask], atol=1e-5, rtol=0)


def test_a_part_of_a_group_runs_its_prompt_again_and_scores_the_same():
    model, tokens = tiny_model("llama"), ragged_tokens((3, 9, 5), columns=7, seed=3)
    whole = logprobs_of(model, tokens, 1.0)
    part = tokens.slice_rows(slice(4, 6))
    assert part.num_generations == 2
    assert part.prompt_ids.shape == (1, 9)
    values = logprobs_of(model, part, 1.0)
    mask = part.completion_mask
    torch.testing.assert_close(values[mask], whole[4:6, : mask.shape[1]][mask], atol=1e-5, rtol=0)


def test_a_token_of_probability_0_adds_nothing_to_the_entropy():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert token_entropy(logits, 1.0).item() == pytest.approx(math.log(2))
