"""LoRA, 4-bit bases and gradient checkpointing: the trained weights, the reference and the saved model."""

import os
import signal
import sys
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import train_grpo
from grpo.algorithm import grpo as grpo_module
from grpo.algorithm.grpo import GRPO
from grpo.algorithm.reference import frozen_copy
from grpo.config import TrainConfig
from grpo.evaluation.evaluator import Evaluator
from grpo.model.language_model import LanguageModel
from grpo.model.loading import load
from grpo.model.lora import ADAPTER, add_adapter, four_bits, merged, trainable
from grpo.model_card import resolve
from grpo.scoring import scorer
from grpo.step_probe import measured_step
from tasks.arithmetic import Arithmetic
from tests.helpers.models import ragged_tokens, tiny_model
from tests.helpers.on_card import OnCard, put_on_card
from tests.helpers.runs import kept_gradients
from tests.helpers.scoring import logprobs_of

CPU = torch.device("cpu")
SMALL = {"model": "starter", "batch_size": 2, "num_generations": 4, "num_inner_updates": 2, "learning_rate": 1e-3}
TINY = ["--num-iterations", "4", "--batch-size", "2", "--num-generations", "4", "--num-inner-updates", "2"]
TINY += ["--eval-problems", "4", "--save-every", "2", "--show-every", "0", "--learning-rate", "1e-3"]
LORA = ["--lora-rank", "4"]


def make_grpo(**settings):
    """Return GRPO of the starter with these settings."""
    config = resolve({**SMALL, **settings})
    lm = load("starter", CPU, **(four_bits(CPU) if config.load_in_4bit else {}))
    if config.lora_rank:
        lm = LanguageModel(add_adapter(lm.model, config), lm.tokenizer, lm.end_ids, lm.pad_id)
    return GRPO(config, Arithmetic(), lm)


def logprobs(model):
    """Return the log-probabilities of random completion tokens, in one dimension."""
    with torch.no_grad():
        return logprobs_of(model, ragged_tokens(), 1.0)[ragged_tokens().completion_mask]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3"])
def test_adapter_off_equals_the_base_to_the_bit_and_merged_equals_adapter_on(kind):
    base = frozen_copy(tiny_model(kind))  # without gradients, because torch sums in another order with them
    model = add_adapter(tiny_model(kind), TrainConfig(lora_rank=4))
    assert torch.equal(logprobs(model), logprobs(base)), "nothing is added before training"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert (logprobs(model) - logprobs(base)).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logprobs(model), logprobs(base))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert (logprobs(merged(model)) - logprobs(model)).abs().max() < 3e-5  # random layers amplify rounding
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_only_the_adapter_is_trained_and_no_second_model_is_held(monkeypatch):
    monkeypatch.setattr(grpo_module, "frozen_copy", lambda model: pytest.fail("a copy was made"))
    made = make_grpo(lora_rank=4)
    base = {name: p.clone() for name, p in made.policy.named_parameters() if ".lora_" not in name}
    _, first = measured_step(made, 1)
    _, second = measured_step(made, 2)
    assert made.reference.frozen is None
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-5, "the reference is the model without the adapter"
    after = dict(made.policy.named_parameters())
    assert all(torch.equal(base[name], after[name]) for name in base)
    adapter = [p for name, p in after.items() if ".lora_B" in name]
    assert adapter
    assert all(p.abs().max() > 0 for p in adapter)


def test_of_a_trained_adapter_off_is_the_base_to_the_bit_and_merged_within_1e_5():
    made = make_grpo(lora_rank=4, num_inner_updates=5)
    rollouts = [made.step(step).rollout for step in range(1, 7)]
    tokens, model = rollouts[-1].tokens, made.policy

    @torch.no_grad()
    def scores(of):
        return logprobs_of(of, tokens, 1.0)[tokens.completion_mask]

    assert (scores(merged(model)) - scores(model)).abs().max() < 1e-5
    base = scores(frozen_copy(load("starter", CPU).model))
    assert (scores(model) - base).abs().max() > 0.1, "it was trained"
    with model.disable_adapter():
        assert torch.equal(scores(model), base)


def test_without_beta_no_reference_is_made(monkeypatch):
    monkeypatch.setattr(grpo_module, "frozen_copy", lambda model: pytest.fail("a copy was made"))
    _, entry = measured_step(make_grpo(beta=0.0), 1)
    assert entry["kl"] is None


def test_a_base_in_4_bits_is_trained_by_its_adapter_and_saved_in_full():
    pytest.importorskip("bitsandbytes")
    made = make_grpo(lora_rank=4, load_in_4bit=True)
    kinds = {type(module).__name__ for module in made.policy.modules()}
    assert "Linear4bit" in kinds
    plain = merged(made.policy)  # before training, it is the base, dequantised
    assert all(p.dtype == torch.float32 for p in plain.parameters())
    assert not hasattr(plain.config, "quantization_config")
    same = add_adapter(plain, made.config)
    for model in (made.policy, same):
        logprobs(model)  # a run begins with such a pass, and later passes still need a gradient
        logprobs_of(model, ragged_tokens(), 1.0).sum().backward()
    for four, full in zip(trainable(made.policy).values(), trainable(same).values(), strict=True):
        torch.testing.assert_close(four.grad, full.grad, atol=1e-3, rtol=1e-3)
    made.step(1)
    torch.testing.assert_close(logprobs(merged(made.policy)), logprobs(made.policy), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_card_holds_at_most_two_merged_weights_at_a_time(load_in_4bit, monkeypatch):
    if load_in_4bit:
        functional = pytest.importorskip("bitsandbytes").functional
    model = make_grpo(lora_rank=4, load_in_4bit=load_in_4bit).policy
    for name, weight in trainable(model).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight)
    expected = merged(model).state_dict()
    put_on_card(model)
    if load_in_4bit:
        true_function = functional.dequantize_4bit
        monkeypatch.setattr(functional, "dequantize_4bit", lambda *args: OnCard.hold(true_function(*args)))
    before = OnCard.peak
    plain = merged(model)
    largest = max(weight.nbytes for name, weight in expected.items() if "proj" in name)
    assert largest <= OnCard.peak - before <= 2 * largest
    assert not any(isinstance(tensor, OnCard) for tensor in (*plain.parameters(), *plain.buffers()))
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("more", [{}, {"lora_rank": 4}], ids=str)
def test_gradient_checkpointing_gives_the_same_gradient(more, monkeypatch):
    one = {**more, "num_inner_updates": 1, "learning_rate": 0.0, "clip_grad_norm": 1e9}
    plain, saving = make_grpo(**one), make_grpo(**one, gradient_checkpointing=True)
    seen = []
    layer = type(next(m for m in saving.policy.modules() if type(m).__name__ == "LlamaDecoderLayer"))
    true_forward = layer.forward

    def forward(self, *args, **kwargs):
        seen.append(self.training)
        return true_forward(self, *args, **kwargs)

    gradients = [kept_gradients(made) for made in (plain, saving)]
    plain.step(1)
    monkeypatch.setattr(layer, "forward", forward)
    monkeypatch.setattr(scorer, "dense_logits", lambda *_: pytest.fail("the rows were not packed"))
    saving.step(1)
    assert True in seen, "it works in train mode only"
    assert False in seen, "sampling in train mode would drop the cache"
    assert not saving.policy.training
    [expected], [found] = gradients
    assert expected.norm() > 0
    assert ((expected - found).norm() / expected.norm()).item() < 1e-5


@pytest.fixture
def train(tmp_path):
    """Start a tiny run with an adapter, as a user does."""

    def run(name, *more):
        return CliRunner().invoke(train_grpo.main, [*TINY, *LORA, *more, "--output-dir", str(tmp_path / name)])

    return run


def test_a_run_saves_the_merged_model_with_the_adapter_beside_it_and_resumes_to_the_bit(train, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rising = iter(range(1, 100))
    true_validate = Evaluator.validate
    monkeypatch.setattr(Evaluator, "validate", lambda *args: {**true_validate(*args), "accuracy": next(rising) / 100})
    assert train("whole").exit_code == 0
    assert train("cut", "--num-iterations", "3").exit_code == 0
    result = train("cut")
    assert result.exit_code == 0, result.output
    for name in ("policy", "optimizer"):
        path = f"checkpoints/step-00000004/{name}.safetensors"
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "cut" / path).read_bytes()
    checkpoint = load_file(tmp_path / "whole/checkpoints/step-00000004/policy.safetensors")
    assert all(".lora_" in name for name in checkpoint)
    saved = tmp_path / "whole" / "saved_model"
    adapted = PeftModel.from_pretrained(load("starter", CPU).model, saved / ADAPTER)
    loaded = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=False)
    torch.testing.assert_close(logprobs(loaded), logprobs(adapted), atol=1e-5, rtol=1e-6)  # some values are -30
    assert (logprobs(loaded) - logprobs(load("starter", CPU).model)).abs().max() > 1e-3, "it was trained"


def test_the_test_of_a_run_in_4_bits_measures_the_best_adapter_and_loads_no_whole_model(train, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    falling, tested = iter(range(100, 0, -1)), []
    true_validate, true_test = Evaluator.validate, Evaluator.test
    monkeypatch.setattr(
        Evaluator, "validate", lambda *args: {**true_validate(*args), "accuracy": next(falling) / 100}
    )

    def test(self, lm):
        tested.append({name: weight.detach().clone() for name, weight in trainable(lm.model).items()})
        return true_test(self, lm)

    monkeypatch.setattr(Evaluator, "test", test)
    result = train("four", "--load-in-4bit", "--num-iterations", "1", "--num-inner-updates", "1")
    assert result.exit_code == 0, result.output
    before, after = tested
    saved = load_file(tmp_path / "four" / "saved_model" / ADAPTER / "adapter_model.safetensors")
    last = load_file(tmp_path / "four" / "checkpoints/step-00000001/policy.safetensors")
    assert any(not torch.equal(last[name], weight) for name, weight in before.items()), "it was trained"
    assert all(torch.equal(after[name], weight) for name, weight in before.items()), "the best was the first"
    assert all(torch.equal(saved[name.replace(".default.", ".")], weight) for name, weight in after.items())


def test_a_run_in_4_bits_that_is_stopped_in_its_last_test_goes_on_if_the_best_adapter_is_there(
    train, tmp_path, monkeypatch
):
    pytest.importorskip("bitsandbytes")
    falling, tested = iter(range(100, 0, -1)), []
    true_validate, true_test = Evaluator.validate, Evaluator.test
    monkeypatch.setattr(
        Evaluator, "validate", lambda *args: {**true_validate(*args), "accuracy": next(falling) / 100}
    )

    def test(self, lm):
        tested.append({name: weight.detach().clone() for name, weight in trainable(lm.model).items()})
        if len(tested) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return true_test(self, lm)

    monkeypatch.setattr(Evaluator, "test", test)
    run = partial(train, "four", "--load-in-4bit", "--num-iterations", "1", "--num-inner-updates", "1")
    assert run().exit_code == 130
    adapter, aside = tmp_path / "four" / "saved_model" / ADAPTER, tmp_path / "aside"
    adapter.rename(aside)
    result = run()
    assert result.exit_code == 1
    assert f"{adapter} was deleted or moved during the run" in result.stderr
    aside.rename(adapter)
    result = run()
    assert result.exit_code == 0, result.output
    assert len(tested) == 3
    assert all(torch.equal(tested[2][name], weight) for name, weight in tested[0].items()), "the best was the first"


@pytest.mark.parametrize(
    ("package", "args"), [("peft", LORA), ("bitsandbytes", [*LORA, "--load-in-4bit"])], ids=["peft", "bitsandbytes"]
)
def test_a_missing_package_is_answered_by_the_line_that_installs_it(package, args, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    result = CliRunner().invoke(train_grpo.main, [*args, "--output-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert f"pip install '{package}" in result.stderr


@pytest.mark.parametrize("targets", ["no_such_layer", ",", " "])
def test_names_that_no_layer_has_are_refused(targets, tmp_path):
    result = CliRunner().invoke(train_grpo.main, [*LORA, "--lora-targets", targets, "--output-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "--lora-targets" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_end_of_a_tied_model_is_refused_and_one_of_an_untied_model_is_merged(target):
    config = TrainConfig(lora_rank=4, lora_targets=f"q_proj,{target}")
    with pytest.raises(ValueError, match=f"{target} shares its weight with another layer of this model"):
        add_adapter(tiny_model("qwen2"), config)
    model = add_adapter(tiny_model("llama"), config)
    with torch.no_grad():
        for weight in trainable(model).values():
            weight.normal_(std=0.1)
    torch.testing.assert_close(logprobs(model), logprobs(merged(model)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"lora_rank": 4, "ref_model_sync_steps": 2}], ids=str)
def test_settings_that_exclude_each_other_are_refused(settings):
    with pytest.raises(ValueError, match="--lora-rank"):
        TrainConfig(**settings)
