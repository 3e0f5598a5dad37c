"""Models with convolutions or linear attention: a batch gives what each prompt gives alone, or is refused."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, RecurrentGemmaConfig

import train_grpo
from grpo.generation.decoding import Decoder
from grpo.generation.greedy import greedy
from grpo.generation.probe import check_batches, probe_scorer, supports_cache_expansion, supports_common_prefix
from grpo.generation.sampling import Generator, SamplingParams, sampling_uniforms
from grpo.model.language_model import LanguageModel
from grpo.record.metrics import load_metrics
from grpo.scoring.scorer import DENSE
from grpo.scoring.tokens import Tokens, left_pad
from tests.generation.test_common_prefix import some_prompts
from tests.helpers import zoo
from tests.helpers.models import VOCABULARY, tiny_model
from tests.helpers.scripts import invoke

CPU = torch.device("cpu")
PAD = 40  # The embedding of token 0 is zero, so a model that takes it for a token would not be noticed.


@pytest.mark.parametrize("kind", zoo.HYBRIDS)
def test_greedy_tokens_are_the_same_in_a_batch_and_alone(kind):
    prompts = some_prompts()
    lm = LanguageModel(tiny_model(kind), None, tuple(range(1, 9)), 0)
    for decoder in (Decoder(), Decoder(expands_cache=True)):
        batch = greedy(lm, prompts, 12, len(prompts), decoder)
        for row, prompt in enumerate(prompts):
            alone = greedy(lm, [prompt], 12, 1)
            assert batch.ids[row, : batch.lengths[row]].tolist() == alone.ids[0, : alone.lengths[0]].tolist()


@pytest.mark.parametrize("kind", zoo.HYBRIDS)
def test_samples_have_the_log_probabilities_of_rows_run_in_full(kind):
    model = tiny_model(kind)
    ids, mask = left_pad(some_prompts(), 0, CPU)
    check_batches(model, some_prompts()[0], PAD)
    assert supports_cache_expansion(model, ids, mask)
    assert not supports_common_prefix(model, some_prompts(), 0)
    assert probe_scorer(model, ids, mask) == DENSE
    # Some rows end early and are dropped.
    params = SamplingParams(12, range(1, 9), n=3)
    uniforms = sampling_uniforms(0, 1, 15, 12)
    sampled = Generator(model, Decoder(expands_cache=True))(ids, mask, params, uniforms)
    assert sampled.lengths.min() < sampled.lengths.max()
    rescored = DENSE.logprobs(model, Tokens(ids, mask, sampled.ids, sampled.mask), 1.0)
    torch.testing.assert_close(sampled.logprobs, rescored, atol=5e-5, rtol=0)


SIZES = zoo.SIZES | {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
REFUSED = {
    # It keeps its states outside of the cache, where rows cannot be dropped.
    "recurrent_gemma": RecurrentGemmaConfig(**SIZES, lru_width=32, block_types=("recurrent", "attention")),
    # Decoding with its states differs from running a row in full.
    "mamba": MambaConfig(**SIZES),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_decodes_differently_in_a_batch_is_refused(kind):
    config = REFUSED[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(ValueError, match=f"a {kind} model answers differently in a batch than alone"):
        check_batches(model, some_prompts()[0], PAD)


@pytest.mark.parametrize("kind", zoo.HYBRIDS)
def test_a_model_that_takes_padding_for_tokens_is_refused(kind, monkeypatch):
    model = tiny_model(kind)
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(module, "apply_mask_to_padding_states", lambda hidden, mask: hidden)
    with pytest.raises(ValueError, match="answers differently in a batch than alone"):
        check_batches(model, some_prompts()[0], PAD)


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_5"])
def test_a_run_trains_a_hybrid_model(kind, tmp_path):
    zoo.build(tmp_path / "model", kind)
    sizes = ["--num-iterations", 1, "--batch-size", 2, "--num-generations", 4, "--eval-problems", 4, "--train-anyway"]
    result = invoke(train_grpo.main, "--model", "model", *sizes, "--max-new-tokens", 12, folder=tmp_path)
    assert result.exit_code == 0, result.output + repr(result.exception)
    [step] = load_metrics(tmp_path)["steps"]
    assert step["kl"] == pytest.approx(0, abs=1e-6)
    assert step["sampler_gap"] < 2e-3  # rounding: in float64, decoding and full passes agree within 2e-12
