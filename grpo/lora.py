"""Training a few added weights over a frozen base (LoRA, arXiv:2106.09685), which may be held in 4 bits. Needs peft.

The reference is the policy with its adapter off, so no second model is held.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from grpo import ranks
from grpo.config import TrainConfig
from grpo.sharding import for_the_first, whole

ADAPTER = "adapter"  # the folder beside the merged weights


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' warnings to each other, which nobody who trains can do anything about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def four_bits(device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told to hold the linear layers in 4 bits (NF4: QLoRA, arXiv:2305.14314).

    Raises ValueError with the line that installs bitsandbytes, where it is missing.
    """
    try:
        with quiet():
            import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError("--load-in-4bit needs bitsandbytes: pip install 'bitsandbytes>=0.48,<0.51'") from None
    bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def add_adapter(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    """The model with an adapter, which is all that is trained; what it computes is the same until then.

    Raises ValueError where peft is missing, or no layer has the names asked for.
    """
    try:
        with quiet():
            from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("--lora-rank needs peft: pip install 'peft>=0.18,<0.22'") from None
    targets = config.lora_targets
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        task_type="CAUSAL_LM",
    )
    for layer in model.modules():
        # on a CPU, 4-bit layers are repacked for inference by their first pass, for good: no gradient after it
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    torch.manual_seed(config.seed)  # one of the two factors starts at random, the other at 0
    try:
        with quiet():
            return get_peft_model(model, lora).eval()
    except ValueError as error:
        raise ValueError(f"lora_targets {targets!r} cannot be: {' '.join(str(error).split())[:200]}") from None


def has_adapter(model: nn.Module) -> bool:
    """Whether `add_adapter` made this model."""
    return hasattr(model, "peft_config")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merged(model: nn.Module) -> PreTrainedModel:
    """A plain model with float32 weights, the adapter added in, and put together on the CPU where it was sharded.

    `model` itself stays as it is, to the bit: adding in place and taking away again would round the base. The
    weights that were not adapted are shared. Of several processes, all have to ask; only the first one's has weights.
    """
    base = model.get_base_model() if has_adapter(model) else model
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = for_the_first(
        (name.replace(".base_layer.", "."), _merged_weight(base, name, parameter))
        for name, parameter in base.named_parameters()
        if ".lora_" not in name
    )
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    for name, buffer in base.named_buffers():  # rotary frequencies and the like, which no file holds
        layer, _, leaf = name.rpartition(".")
        plain.get_submodule(layer).register_buffer(leaf, buffer, persistent=False)
    plain.generation_config = copy.deepcopy(base.generation_config)
    left = [name for name, parameter in plain.named_parameters() if parameter.is_meta]
    assert not left or not ranks.is_first(), left
    return plain.eval()


def save_adapter(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapter alone, as peft loads it, into the folder of the merged model; `weights` are its own."""
    model.save_pretrained(folder / ADAPTER, state_dict=dict(weights))
    (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # a form with nothing filled in


@torch.no_grad()
def _merged_weight(base: nn.Module, name: str, parameter: Tensor) -> Tensor:
    weight = parameter.detach()
    if hasattr(parameter, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(parameter.data, parameter.quant_state)
    weight = whole(weight).float()
    layer, _, leaf = name.rpartition(".base_layer.")
    if leaf != "weight":
        return weight
    return weight + whole(base.get_submodule(layer).get_delta_weight("default")).float()
