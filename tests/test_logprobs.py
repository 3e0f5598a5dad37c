"""The shared prefix against the dense path, and both against one row at a time."""

import pytest
import torch

from grpo import logprobs as module
from grpo.logprobs import Tokens, can_share, completion_logprobs, token_entropy, token_logprobs
from tests.conftest import ragged_tokens, tiny_model
from tests.zoo import KINDS, WINDOW


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
    shared, shared_entropy = completion_logprobs(model, tokens, 0.7, shared=True, entropy=True)
    dense, dense_entropy = completion_logprobs(model, tokens, 0.7, shared=False, entropy=True)
    mask = tokens.completion_mask
    torch.testing.assert_close(shared[mask], dense[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(shared_entropy[mask], dense_entropy[mask], atol=1e-5, rtol=0)
    a, b = gradient(model, tokens, True), gradient(model, tokens, False)
    assert ((a - b).norm() / b.norm()).item() < 1e-5


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
def test_these_models_can_share_and_a_model_whose_cache_lies_falls_back(kind, monkeypatch):
    model, tokens = tiny_model(kind), ragged_tokens((9, 12))
    assert can_share(model, tokens.prompt_ids, tokens.prompt_mask)
    monkeypatch.setattr(module, "DynamicCache", lambda: None)  # a model that keeps no such cache
    assert not can_share(model, tokens.prompt_ids, tokens.prompt_mask)


def test_groups_are_rows_in_order():
    tokens = ragged_tokens((4, 4), num_generations=2)
    second = tokens.part(slice(2, 4))
    assert isinstance(second, Tokens)
    assert torch.equal(second.prompt_ids, tokens.prompt_ids[1:])
    width = second.completion_ids.shape[1]
    assert torch.equal(second.completion_ids, tokens.completion_ids[2:, :width])
