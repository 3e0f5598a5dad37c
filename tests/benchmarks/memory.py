"""How much memory a parameter takes, by the way of training: `python -m tests.benchmarks.memory`.

One step of each way on a Llama-shaped model with random weights, in a process of its own, on few and short
completions, so that it is weights, gradients and moments that count. What the same process holds with the starter in
the place of the model is taken off.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo.config import STARTER
from grpo.models import load

ROOT = Path(__file__).parents[2]
FEW = "--num-iterations 1 --batch-size 2 --num-generations 2 --max-new-tokens 4 --num-inner-updates 1 --eval-every 1"
FEW += " --eval-problems 2 --max-operand 1"
WAYS = {
    "full": [],
    "full, --beta 0": ["--beta", "0"],
    "full, --shard, 2 processes": ["--shard"],
    "LoRA": ["--lora-rank", "8"],
    "LoRA, --shard, 2 processes": ["--lora-rank", "8", "--shard"],
    "LoRA, 4-bit": ["--lora-rank", "8", "--load-in-4bit"],
}


def make_model(folder: Path) -> int:
    """Write a model with random weights and the starter's tokenizer; returns its parameters."""
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 8, "vocab_size": 32_768}
    sizes |= {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 512}
    tokens = {"bos_token_id": None, "eos_token_id": 299, "pad_token_id": 297}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, tie_word_embeddings=True))
    model.save_pretrained(folder)
    load(str(STARTER), torch.device("cpu")).tokenizer.save_pretrained(folder)
    return model.num_parameters()


def peak(model: str, options: list[str], folder: Path) -> int:
    """The most bytes that a process of the run held: the first one of several, which also writes."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if "--shard" in options else []
    command = [sys.executable, *launch, str(ROOT / "train_grpo.py"), "--model", model, *FEW.split(), *options]
    subprocess.run([*command, "--output-dir", str(folder)], check=True, capture_output=True, cwd=ROOT)
    return json.loads((folder / "grpo_metrics.json").read_text(encoding="utf-8"))["finished"]["peak_memory"]


@click.command()
def main() -> None:
    """Print a line for each way."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = make_model(folder / "model")
        click.echo(f"{parameters / 1e6:.0f}M parameters, float32, on the CPU")
        for number, (way, options) in enumerate(WAYS.items()):
            without = peak("starter", options, folder / f"starter-{number}")
            held = peak(str(folder / "model"), options, folder / f"run-{number}") - without
            click.echo(f"{way:28} {held / 2**30:6.2f} GiB, {held / parameters:5.1f} bytes a parameter")


if __name__ == "__main__":
    main()
