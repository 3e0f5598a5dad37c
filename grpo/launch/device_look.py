"""Compare a device with the CPU before a run: sampled tokens, log-probabilities, and the gradient of one batch.

A device, or the library for it, may compute wrong numbers without an error. On some Macs, for example, torch before
2.14 adds memory past the operands to matrix products over 32,767 numbers or more, such as the gradient behind the
logits of a large vocabulary. The look samples, scores and updates a made-up model with the functions, the shortcuts
and the precision of the run. The model is tiny apart from its vocabulary. The CPU computes in float32.
"""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from grpo.algorithm.loss import StepSizes
from grpo.algorithm.update import Batch, Updater
from grpo.config import TrainConfig
from grpo.generation.decoding import Decoder
from grpo.generation.sampling import Generator, SamplingParams, sampling_uniforms
from grpo.runtime.console import say
from grpo.runtime.microbatch import AdaptiveMicrobatch
from grpo.runtime.precision import in_precision, set_precision
from grpo.runtime.ranks import ONE
from grpo.scoring.attention.packed import enable
from grpo.scoring.layers import fuse_layers
from grpo.scoring.scorer import Scorer, dense_logits
from grpo.scoring.tokens import Tokens

VOCABULARY = 40_000  # above the 32,767 from which products are wrong on some Macs
HIDDEN = 32
LAYERS = 2
WEIGHT_STD = 0.15
LOGIT_STD = 4.5  # The entropy is then 3 nats: most sampled tokens are so likely that a wrong draw shows.
PROMPTS = 4
GROUP = 8
COMMON = 64  # All prompts begin with this number of equal tokens, enough for the decoder to run them once.
PROMPT_LENGTH = COMMON + 8
COLUMNS = 16
END_IDS = tuple(range(0, VOCABULARY, 50))  # About 1 token in 50 ends its row, so that rows differ in length.
REFERENCE_DISTANCE = 0.5  # nats between policy and reference, so that the KL has a gradient
FAST = Scorer(shares_prompts=True, fuses_output=True)  # what the CPU computes with; the tests compare it with DENSE


@dataclass(frozen=True)
class Tolerance:
    """The largest differences from the CPU that rounding explains, with a margin."""

    cumulative: float  # distance of a random number from the interval of its token in the cumulative distribution
    logprob: float  # nats, of any token
    gradient: float  # norm of the difference of a weight's gradient, divided by the norm of the gradient


# On the CPU itself, the largest differences are 8e-6, 2e-5 and 1e-5 in float32, and 0.05, 0.3 and 0.06 in bfloat16.
TOLERANCES = {"float32": Tolerance(1e-4, 1e-3, 1e-3), "bfloat16": Tolerance(0.15, 1.0, 0.2)}


def check_device(device: torch.device, precision: str, scorer: Scorer, decoder: Decoder, trust: bool = False) -> None:
    """Raise ValueError, in one line, if the device computes other results than the CPU; say that it does not.

    With `trust`, the line is printed instead.
    """
    start = time.perf_counter()
    differences = device_differences(device, precision, scorer, decoder)
    if not differences:
        seconds = time.perf_counter() - start
        say(f"{device.type} samples, scores and updates a made-up model as the CPU does ({seconds:.1f} s).")
        return
    said = f"{device.type} does not compute what the CPU computes, in {precision}: {'; '.join(differences)}"
    if not trust:
        raise ValueError(
            f"{said}. Training would go wrong: use --device cpu or another version of torch, and report this line; "
            "--trust-device trains nevertheless"
        )
    say(f"{said}. The run goes on, because of --trust-device.")


def device_differences(device: torch.device, precision: str, scorer: Scorer, decoder: Decoder) -> list[str]:
    """Return in words what the device computes differently from the CPU; an empty list if nothing."""
    reference = made_up_model()
    model = copy.deepcopy(reference).to(device)
    set_precision(model, precision, device)
    if precision != "float32":
        fuse_layers(model)  # as `load` does
    if scorer.shares_prompts:
        enable(model)
    enable(reference)
    tolerance = TOLERANCES[precision]
    uniforms = sampling_uniforms(0, 0, PROMPTS * GROUP, COLUMNS)
    tokens, sampled = _sample(model, replace(decoder, ranks=ONE), uniforms)
    on_device = tokens.to(device)
    mask = tokens.completion_mask
    differences = []
    wrong = (_distances(reference, tokens, uniforms) > tolerance.cumulative)[mask]
    if wrong.any():
        differences.append(
            f"{int(wrong.sum())} of {len(wrong)} sampled tokens are not the tokens that the same random numbers give"
        )
    expected, expected_gradients = _update(reference, FAST, tokens, sampled, PROMPTS * GROUP)
    looks = [("sampling", sampled, None)]
    # A pass over all rows has enough logits for the fused output layer. A pass over one group may have too few.
    for name, rows in (("an update", PROMPTS * GROUP), ("an update in small passes", GROUP)):
        looks.append((name, *_update(model, scorer, on_device, sampled, rows)))
    for name, logprobs, gradients in looks:
        difference = (logprobs - expected)[mask].abs().max().item()
        if not difference <= tolerance.logprob:  # `not <=`, because NaN is a difference too
            differences.append(f"the log-probabilities of {name} differ by up to {difference:.2g} nats")
        if gradients is not None:
            weight, share = _largest_difference(gradients, expected_gradients)
            if not share <= tolerance.gradient:
                differences.append(f"the gradient of {weight} in {name} differs by {share:.2g} of its norm")
    return differences


def made_up_model() -> PreTrainedModel:
    """Return a Llama-shaped model on the CPU, tiny apart from its vocabulary, with the same random weights always."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=PROMPT_LENGTH + COLUMNS,
        initializer_range=WEIGHT_STD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= LOGIT_STD / (WEIGHT_STD * HIDDEN**0.5)
    return model


def _sample(model: PreTrainedModel, decoder: Decoder, uniforms: Tensor) -> tuple[Tokens, Tensor]:
    """Sample completions on the model's device; return their tokens and log-probabilities (B, C), on the CPU."""
    ids = torch.randint(VOCABULARY, (PROMPTS, PROMPT_LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, :COMMON] = ids[0, :COMMON]
    mask = torch.ones_like(ids, dtype=torch.bool)
    params = SamplingParams(COLUMNS, END_IDS, GROUP)
    with in_precision(model):
        prompts = ids.to(model.device), mask.to(model.device)
        completions = Generator(model, decoder)(*prompts, params, uniforms, common_prefix=COMMON)
    return Tokens(ids, mask, completions.ids.cpu(), completions.mask.cpu()), completions.logprobs.cpu()


@torch.no_grad()
def _distances(model: PreTrainedModel, tokens: Tokens, uniforms: Tensor) -> Tensor:
    """Return how far each uniform lies outside the interval of its token in the cumulative distribution, (B, C).

    It is 0 or negative if the uniform lies inside: then the token is the one that the uniform gives.
    """
    first, rest = dense_logits(model, tokens)
    logits = torch.cat([first[:, None], rest], 1)  # (B, C, V)
    distances = torch.zeros(tokens.completion_ids.shape)
    for column in range(logits.shape[1]):
        p = logits[:, column].softmax(-1)
        ids = tokens.completion_ids[:, column : column + 1]  # (B, 1)
        below = torch.where(torch.arange(VOCABULARY) < ids, p, 0.0).sum(-1)
        above = below + p.gather(-1, ids).squeeze(-1)
        uniform = uniforms[:, column].float()
        distances[:, column] = torch.maximum(below - uniform, uniform - above)
    return distances


def _update(
    model: PreTrainedModel, scorer: Scorer, tokens: Tokens, sampled: Tensor, rows_per_pass: int
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Compute the gradient of an update; return log-probabilities (B, C) and gradients by weight, on the CPU.

    The learning rate is 0, so the weights stay the same.
    """
    rows, device = PROMPTS * GROUP, model.device
    config = TrainConfig(learning_rate=0.0, clip_grad_norm=1e30, max_new_tokens=COLUMNS)
    microbatch = AdaptiveMicrobatch("the look at the device", rows, GROUP)
    updater = Updater(model, config, scorer, microbatch)
    sizes = StepSizes(rows, int(tokens.completion_mask.sum()), COLUMNS)
    advantages = torch.linspace(-1, 1, rows).to(device)
    batch = Batch(tokens, advantages, sizes, ref_logprobs=(sampled - REFERENCE_DISTANCE).to(device))
    update = updater.inner_update(batch, config.beta, rows_per_pass)
    gradients = {name: weight.grad.cpu() for name, weight in model.named_parameters()}
    return update.logprobs.cpu(), gradients


def _largest_difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, float]:
    """Return the weight whose gradient differs most, and by what part of its norm; NaN counts as infinite."""
    shares = {}
    for name, gradient in expected.items():
        share = ((actual[name] - gradient).norm() / gradient.norm()).item()
        shares[name] = share if share == share else float("inf")
    weight = max(shares, key=shares.get)
    return weight, shares[weight]
