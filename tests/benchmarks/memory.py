"""Measure the memory that a parameter takes for each way of training: `python -m tests.benchmarks.memory`.

Each way takes one step on a Llama-shaped model with random weights, in a process of its own. Completions are few and
short, so that weights, gradients and moments take most of the memory. The memory of the same step on the starter is
subtracted.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch

from grpo.model.loading import load
from tests.benchmarks.work import random_model

SHAPE = (8, 896, 14, 2, 4864)  # layers, hidden size, query heads, key heads, MLP size
VOCABULARY = 32_768
ROOT = Path(__file__).parents[2]
FEW = "--num-iterations 1 --batch-size 2 --num-generations 2 --max-new-tokens 4 --num-inner-updates 1 --eval-every 1"
FEW += " --eval-problems 2 --max-operand 1 --train-anyway"
WAYS = {
    "full": [],
    "full, --beta 0": ["--beta", "0"],
    "full, --shard, 2 processes": ["--shard"],
    "LoRA": ["--lora-rank", "8"],
    "LoRA, --shard, 2 processes": ["--lora-rank", "8", "--shard"],
    "LoRA, 4-bit": ["--lora-rank", "8", "--load-in-4bit"],
}


def peak(model: str, options: list[str], folder: Path) -> int:
    """Return the peak memory of a run, bytes; of several processes, that of the first, which also writes."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if "--shard" in options else []
    command = [sys.executable, *launch, str(ROOT / "train_grpo.py"), "--model", model, *FEW.split(), *options]
    subprocess.run([*command, "--output-dir", str(folder)], check=True, capture_output=True, cwd=ROOT)
    return json.loads((folder / "grpo_metrics.json").read_text(encoding="utf-8"))["finished"]["peak_memory"]


@click.command()
def main() -> None:
    """Print a line for each way of training."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = load(str(random_model(folder / "model", SHAPE, VOCABULARY)), torch.device("cpu")).model
        parameters = model.num_parameters()
        click.echo(f"{parameters / 1e6:.0f}M parameters, float32, on the CPU")
        for number, (way, options) in enumerate(WAYS.items()):
            without = peak("starter", options, folder / f"starter-{number}")
            held = peak(str(folder / "model"), options, folder / f"run-{number}") - without
            click.echo(f"{way:28} {held / 2**30:6.2f} GiB, {held / parameters:5.1f} bytes a parameter")


if __name__ == "__main__":
    main()
