"""Add trainable weights to a frozen model (LoRA, arXiv:2106.09685), which may be held in 4 bits. Needs peft.

The reference is the policy with its adapter off, so no second model is held.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from grpo.config import TrainConfig
from grpo.runtime.console import suppress_warnings
from grpo.runtime.device import TRAITS
from grpo.runtime.ranks import ONE, Ranks, full_tensor

ADAPTER = "adapter"  # The adapter is in this folder inside saved_model/.
ADAPTER_CONFIG = "adapter_config.json"
MERGE_WITH_PEFT = "PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)"


def four_bits(device: torch.device) -> dict[str, Any]:
    """Return options for `from_pretrained` to hold the linear layers in 4 bits (NF4: QLoRA, arXiv:2305.14314).

    Raises ValueError, with the command to install bitsandbytes, if it is missing.
    """
    try:
        with suppress_warnings():
            import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError("--load-in-4bit needs bitsandbytes: pip install 'bitsandbytes>=0.48,<0.51'") from None
    dtype = torch.bfloat16 if device.type == "cuda" and TRAITS["cuda"].multiplies_bfloat16(device) else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def add_adapter(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel:
    """Return the model with an adapter. Only the adapter is trained; before training it changes no output.

    Raises ValueError if peft is missing, if no layer has one of the names in `lora_targets`, or if a name
    belongs to the embedding or the output layer, and these two share one weight.
    """
    try:
        with suppress_warnings():
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
        # On a CPU, the first pass would repack 4-bit layers for inference; from then on they would have no gradient.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    tied = tied_layers(model)
    torch.manual_seed(config.seed)  # Of an adapter's two factors, one starts as random numbers, the other as zeros.
    try:
        with suppress_warnings():
            adapted = get_peft_model(model, lora).eval()
    except ValueError as error:
        raise ValueError(f"--lora-targets {targets!r} cannot be used: {' '.join(str(error).split())[:200]}") from None
    for name in tied:
        # Two layers would use the merged weight, but the adapter changes only one of them.
        if any(f".{name}.lora_" in parameter for parameter in trainable(adapted)):
            raise ValueError(
                f"--lora-targets {targets!r} cannot be used: {name.rpartition('.')[2]} shares its weight with "
                "another layer of this model, so its adapter cannot be merged; leave it out"
            )
    return adapted


def tied_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the embedding and the output layer if they share one weight; else an empty list."""
    inputs = model.get_input_embeddings()
    outputs = model.get_output_embeddings()
    if outputs is None or inputs.weight is not outputs.weight:
        return []
    return [name for name, layer in model.named_modules() if layer in (inputs, outputs)]


@torch.no_grad()
def merge_saved_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Add the LoRA adapter that peft saved in a folder to the weights of its base model, in place.

    Raises ValueError, with the code that merges it with peft, unless it is a plain LoRA adapter of untied layers.
    """
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    factors = load_file(folder / "adapter_model.safetensors")
    layers = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
    expected = {f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"}
    tied = {f"base_model.model.{name}" for name in tied_layers(model)} & set(layers)
    varies = [name for name in ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save") if config.get(name)]
    if config.get("peft_type") != "LORA" or set(factors) != expected or tied or varies:
        raise ValueError(f"this kind of adapter is not merged here; merge it with peft: {MERGE_WITH_PEFT}")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    for layer in layers:
        weight = model.get_submodule(layer.removeprefix("base_model.model.")).weight
        second = factors[f"{layer}.lora_B.weight"].float()
        first = factors[f"{layer}.lora_A.weight"].float()
        if config.get("fan_in_fan_out"):  # the layer holds its weight transposed
            weight = weight.T
        if weight.shape != (len(second), first.shape[-1]):
            raise ValueError(f"the adapter does not fit its base model: the shape of {layer} differs")
        weight += scale * second @ first


def read_adapter(model: nn.Module, folder: Path) -> None:
    """Replace the weights of a model's adapter by the weights that peft saved in a folder."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def has_adapter(model: nn.Module) -> bool:
    """Return whether a model has an adapter, as models from `add_adapter` do."""
    return hasattr(model, "peft_config")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merged(model: nn.Module, ranks: Ranks = ONE) -> PreTrainedModel:
    """Return a plain model on the CPU with float32 weights, the adapter merged in.

    `model` keeps its weights to the bit: adding the adapter in place and subtracting it again would round them. If
    `model` is on the CPU, the two models share all weights that have no adapter. Another device never holds more than
    two merged weights. All ranks must call this; only rank 0 gets weights.
    """
    base = model.get_base_model() if has_adapter(model) else model
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = ranks.collect(
        (name.replace(".base_layer.", "."), _merged_weight(base, name, parameter))
        for name, parameter in base.named_parameters()
        if ".lora_" not in name
    )
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    for name, buffer in base.named_buffers():  # Buffers, such as rotary frequencies, are not among the weights.
        layer, _, leaf = name.rpartition(".")
        plain.get_submodule(layer).register_buffer(leaf, buffer.cpu(), persistent=False)
    plain.generation_config = copy.deepcopy(base.generation_config)
    missing = [name for name, parameter in plain.named_parameters() if parameter.is_meta]
    assert not missing or not ranks.is_main, missing
    return plain.eval()


@torch.no_grad()
def _merged_weight(base: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """Return a weight in float32 on the CPU, dequantised, gathered from all ranks, with its adapter if it has one."""
    weight = parameter.detach()
    if hasattr(parameter, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(parameter.data, parameter.quant_state)
    weight = full_tensor(weight).cpu().float()
    layer, _, leaf = name.rpartition(".base_layer.")
    if leaf != "weight":
        return weight
    return weight + full_tensor(base.get_submodule(layer).get_delta_weight("default")).cpu().float()
