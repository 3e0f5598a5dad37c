"""Sampling: frequencies, uniforms, ends of rows, and that the scored policy gives the same probabilities."""

import pytest
import torch
from scipy.stats import chisquare

from grpo.generation import sampling
from grpo.generation.decoding import CachedDecoding, Decoder
from grpo.generation.probe import probe
from grpo.generation.sampling import Generator, SamplingParams, draw, sample_inverse_cdf, sampling_uniforms, shrunk
from grpo.model.loading import load
from grpo.scoring.tokens import Tokens, common_prefix_length, left_pad
from tasks.arithmetic import Arithmetic
from tests.helpers import zoo
from tests.helpers.generation import generate, same_completions
from tests.helpers.models import VOCABULARY, ragged_tokens, tiny_model
from tests.helpers.scoring import logprobs_of

CPU = torch.device("cpu")


def test_frequencies_match_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -20.0])
    n = 200_000
    tokens = sample_inverse_cdf((logits / 0.8).softmax(-1).expand(n, -1), sampling_uniforms(0, 0, n, 1)[:, 0])
    counts = torch.bincount(tokens, minlength=6).double()
    expected = (logits / 0.8).double().softmax(-1) * n
    keep = expected > 5  # the last token is expected 1e-7 times
    result = chisquare(counts[keep].numpy(), (expected[keep] * counts[keep].sum() / expected[keep].sum()).numpy())
    assert result.pvalue > 1e-3


def test_the_inverse_of_the_cumulative_softmax_by_hand():
    # probabilities 1/4, 0, 1/4, 1/2: borders at 0.25, 0.25, 0.5, 1; a token of probability 0 is never sampled
    probabilities = torch.tensor([[0.25, 0.0, 0.25, 0.5]]).log().softmax(-1).expand(6, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sample_inverse_cdf(probabilities, uniforms).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("in_cache", [1, 14, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_drawn_a_few_at_a_time_are_those_drawn_at_once(in_cache, temperature, monkeypatch):
    monkeypatch.setattr(sampling, "CACHE_PROBABILITIES", in_cache)
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    uniforms = sampling_uniforms(0, 0, 5, 1)[:, 0]
    tokens, logprobs = draw(logits, uniforms, temperature)
    probabilities = (logits / temperature).softmax(-1)
    assert torch.equal(tokens, sample_inverse_cdf(probabilities, uniforms))
    assert torch.equal(logprobs, probabilities[range(5), tokens].log())


def test_uniforms_are_a_function_of_seed_and_step_only():
    a, b = sampling_uniforms(3, 7, 8, 16), sampling_uniforms(3, 7, 8, 16)
    assert torch.equal(a, b)
    assert not torch.equal(a, sampling_uniforms(3, 8, 8, 16))
    assert not torch.equal(a, sampling_uniforms(4, 7, 8, 16))
    assert 0 <= a.min() <= a.max() < 1
    # the same on every machine: PCG64 is specified, these are its numbers
    assert sampling_uniforms(0, 0, 1, 2).tolist() == [[0.6369616873214543, 0.2697867137638703]]
    assert sampling_uniforms(7, 3, 1, 2).tolist() == [[0.9750335537195014, 0.8845672371187709]]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_and_rescored_logprobs_agree(kind, temperature):
    model, tokens = tiny_model(kind), ragged_tokens()
    uniforms = sampling_uniforms(0, 0, 12, 14)
    sampled = generate(model, tokens, uniforms, limit=14, temperature=temperature, ends=(1, 3, 5))
    rollout = Tokens(tokens.prompt_ids, tokens.prompt_mask, sampled.ids, sampled.mask)
    rescored = logprobs_of(model, rollout, temperature)
    assert sampled.lengths.unique().numel() > 1, "rows of different lengths, or the test shows little"
    # the rounding of a logit is divided by the temperature
    mask, tolerance = sampled.mask, 1e-5 / temperature
    torch.testing.assert_close(sampled.logprobs[mask], rescored[mask], atol=tolerance, rtol=0)


def test_every_end_id_ends_a_row_and_is_inside_the_mask():
    model, tokens = tiny_model("llama"), ragged_tokens()
    sampled = generate(model, tokens, sampling_uniforms(1, 0, 12, 40), limit=40, ends=(5, 6, 7))
    assert sampled.ended.any()
    for ids, length, ended in zip(*(x.tolist() for x in (sampled.ids, sampled.lengths, sampled.ended)), strict=True):
        assert (ids[length - 1] in (5, 6, 7)) == ended
        assert not set(ids[: length - 1]) & {5, 6, 7}
        assert ended or length == 40
    assert torch.equal(sampled.mask.sum(-1), sampled.lengths)


def test_rows_do_not_depend_on_the_rows_beside_them():
    # a retry with fewer rows, or another split of the batch, sees the same completions
    model, tokens = tiny_model("qwen2"), ragged_tokens((6, 6, 6))
    uniforms = sampling_uniforms(0, 0, 12, 10)
    whole = generate(model, tokens, uniforms, limit=10)
    for group in range(3):
        prompt, rows = slice(3 * group, 3 * group + 3), slice(4 * group, 4 * group + 4)
        alone = generate(model, tokens.slice_rows(prompt), uniforms[rows], limit=10)
        assert torch.equal(whole.ids[rows, : alone.ids.shape[1]], alone.ids)
        assert torch.equal(whole.lengths[rows], alone.lengths)


def test_rows_that_have_ended_are_dropped_in_few_sizes_and_change_no_other(monkeypatch):
    assert {shrunk(64, n) for n in range(65)} == {64, 48, 36, 27, 20, 15, 11, 8, 6, 4, 3, 2, 1}
    assert all(n <= shrunk(64, n) for n in range(65))
    assert (shrunk(64, 49), shrunk(64, 48), shrunk(36, 28), shrunk(36, 20), shrunk(1, 0)) == (64, 48, 36, 20, 1)
    kept = []
    keep = CachedDecoding.keep
    monkeypatch.setattr(CachedDecoding, "keep", lambda self, rows: kept.append(len(rows)) or keep(self, rows))
    model, tokens = tiny_model("qwen2"), ragged_tokens((6, 6, 6))
    uniforms = sampling_uniforms(0, 0, 12, 10)
    dropped = generate(model, tokens, uniforms, limit=10)
    assert kept
    assert set(kept) <= {9, 6, 4, 3, 2, 1}
    monkeypatch.setattr(sampling, "shrunk", lambda rows, running: rows)
    assert same_completions(generate(model, tokens, uniforms, limit=10), dropped)


def test_prompts_run_once_a_completion_sample_the_same_completions():
    model, tokens = tiny_model("llama"), ragged_tokens()
    uniforms = sampling_uniforms(0, 0, 12, 8)
    expanded, plain = (
        generate(model, tokens, uniforms, decoder=Decoder(expands_cache=expansion)) for expansion in (True, False)
    )
    assert torch.equal(expanded.ids, plain.ids)


@pytest.mark.parametrize("kind", ["starter", *zoo.KINDS])
def test_a_model_samples_the_same_with_the_probed_shortcuts_and_without_any(kind, tmp_path):
    lm, task = load(kind if kind == "starter" else str(zoo.build(tmp_path / kind, kind)), CPU), Arithmetic()
    _, probed = probe(lm, task)
    assert probed.expands_cache
    assert probed.shares_prefix
    prompts = lm.prompts([task.messages(problem.question) for problem in task.held_out("test", 3)])
    prefix, params = common_prefix_length(prompts), SamplingParams(16, lm.end_ids, 4)
    assert prefix > 0
    uniforms = sampling_uniforms(0, 0, 12, 16)
    shortcuts, plain = (
        Generator(lm.model, decoder)(
            *left_pad(prompts, lm.pad_id, CPU),
            params,
            uniforms,
            common_prefix=prefix if decoder.shares_prefix else 0,
        )
        for decoder in (probed, Decoder())
    )
    assert same_completions(shortcuts, plain)
    torch.testing.assert_close(shortcuts.logprobs, plain.logprobs, atol=1e-4, rtol=0)


def test_a_generation_config_with_top_k_is_not_inherited():
    model, tokens = tiny_model("llama"), ragged_tokens()
    uniforms = sampling_uniforms(0, 0, 12, 8)
    before = generate(model, tokens, uniforms).ids
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0)
    assert torch.equal(before, generate(model, tokens, uniforms).ids)
    assert before.unique().numel() > VOCABULARY // 4, "the plain softmax reaches many tokens"


def test_sampling_settings_of_a_loaded_model_are_not_inherited(tmp_path):
    lm = load(str(zoo.build(tmp_path / "m", "qwen2")), CPU)
    assert lm.model.generation_config.top_k == 2
    ids, mask = left_pad(lm.prompts([Arithmetic().messages("What is (4 - 9) * 6?")]), lm.pad_id, lm.model.device)
    sampled = Generator(lm.model)(ids, mask, SamplingParams(1, lm.end_ids, 64), sampling_uniforms(0, 0, 64, 1))
    assert len(set(sampled.ids[:, 0].tolist())) > 10
    expected = lm.model(ids).logits[0, -1].log_softmax(-1)[sampled.ids[:, 0]]
    torch.testing.assert_close(sampled.logprobs[:, 0], expected, atol=1e-5, rtol=0)
