"""Check by one command what only a device can show: `python -m tests.benchmarks.device_check`.

The checks are: whether the device computes what the CPU computes, supports all shortcuts, and computes the same with
them; worked examples, adapters, CUDA graphs, the retries after memory runs out, a resume to the bit, the default run;
and the speed of a step in the shapes of Qwen2.5, with --trl compared with TRL. Each check is a line of the table,
which is written after each check. A check that fails does not stop the others, and none begins after the time is
over. On a CPU, CUDA graphs and running out of memory in a step are not checked; `--quick` takes two minutes there.
"""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from grpo.algorithm.grpo import GRPO
from grpo.algorithm.reference import logprobs_in_passes
from grpo.generation.decoding import Decoder
from grpo.generation.probe import probe
from grpo.launch.device_look import FAST, device_differences
from grpo.model.loading import load
from grpo.model.saving import SAVED_MODEL
from grpo.model_card import resolve
from grpo.record.metrics import load_metrics
from grpo.runtime.device import TRAITS, choose_device
from grpo.runtime.precision import set_precision
from grpo.scoring.scorer import DENSE
from grpo.step_probe import measured_step
from tasks.arithmetic import Arithmetic
from tests.benchmarks import report
from tests.benchmarks.__main__ import ROOT, WARM_UP, hardware, speed, trl_python
from tests.benchmarks.work import SHAPES, Size, Spec, random_model
from tests.helpers.scoring import scorer_for

MAX_PACKED_DIFFERENCE = 1e-3  # nats, of any token, between packed and dense rows in float32
MAX_MEAN_BF16_DIFFERENCE = 0.05  # nats, on average over tokens, between bfloat16 and float32
MAX_WEIGHT_DIFFERENCE = 1e-6  # passes of other sizes round differently
SHORTCUTS = FAST, Decoder(expands_cache=True, shares_prefix=True, holds_prefix=True)
STEPS = 20  # timed in each shape
SHORT = ["--batch-size", "2", "--num-generations", "4", "--eval-problems", "8"]
SHORT += ["--save-every", "3", "--eval-every", "3"]


@dataclass(frozen=True)
class Check:
    """The device that is checked, a folder for runs, and how thorough the checks are."""

    device: torch.device
    folder: Path
    quick: bool
    python_of_trl: str | None


def same_numbers(check: Check) -> str:
    """Compare packed with dense rows in float32, and bfloat16 with float32, on a rollout of the starter."""
    lm = load("starter", check.device)
    grpo = GRPO(resolve({"model": "starter", "device": check.device.type}), Arithmetic(), lm)
    tokens = grpo.step(1).batch.tokens
    mask = tokens.completion_mask
    sharing = scorer_for(lm.model)
    dense, packed = (logprobs_in_passes(scorer, lm.model, tokens, 1.0, len(mask)) for scorer in (DENSE, sharing))
    set_precision(lm.model, "bfloat16", check.device)
    lower = logprobs_in_passes(sharing, lm.model, tokens, 1.0, len(mask))
    apart, rounding = (dense - packed)[mask].abs().max().item(), (lower - packed)[mask].abs().mean().item()
    said = f"packed {apart:.1e} nats at most, bfloat16 {rounding:.4f} on average"
    if apart > MAX_PACKED_DIFFERENCE or rounding > MAX_MEAN_BF16_DIFFERENCE:
        raise ValueError(said)
    return said


def like_the_cpu(check: Check) -> str:
    """Compare tokens, log-probabilities and gradients of a made-up model, with a large vocabulary, with the CPU's."""
    precisions = ["float32"] + ["bfloat16"] * TRAITS[check.device.type].has_bfloat16
    for precision in precisions:
        if differences := device_differences(check.device, precision, *SHORTCUTS):
            raise ValueError(f"in {precision}, {'; '.join(differences)}")
    return f"tokens, log-probabilities and gradients, {' and '.join(precisions)}"


def capabilities(check: Check) -> str:
    """Assert that the starter supports every shortcut on the device."""
    found = probe(load("starter", check.device), Arithmetic())
    if found != SHORTCUTS:
        raise ValueError(f"not all shortcuts are supported: {found[0]}, {found[1]}")
    return "all"


def worked_examples(check: Check) -> str:
    """Train with worked examples, so that prompts have a long common beginning."""
    train(check, check.folder / "shots", *SHORT, "--shots", "4", "--num-iterations", "2")
    return "two steps with --shots 4"


def adapters(check: Check) -> str:
    """Train an adapter, on CUDA also on a base in 4 bits; load the merged model that was saved."""
    tried = [[]] + [["--load-in-4bit"]] * (check.device.type == "cuda")
    for number, options in enumerate(tried):
        folder = check.folder / f"adapter-{number}"
        train(check, folder, *SHORT, "--lora-rank", "4", *options, "--num-iterations", "2")
        load(str(folder / SAVED_MODEL), check.device)
    return " and ".join(["LoRA", "4 bits"][: len(tried)])


def out_of_memory_in_the_optimizer(check: Check) -> str:
    """Let memory run out in the optimizer's step, by an error in its place; the weights must be as without it."""
    weights = []
    for fails in (False, True):
        grpo = GRPO(resolve({"model": "starter", "learning_rate": 1e-4}), Arithmetic(), load("starter", check.device))
        optimizer = grpo.update.optimizer
        true_step = optimizer.step

        def step(true_step=true_step, optimizer=optimizer) -> None:
            optimizer.step = true_step
            for entry in optimizer.state.values():
                entry["step"] += 1  # as AdamW does before it changes a weight
            raise torch.OutOfMemoryError("made up by this check: out of memory")

        if fails:
            optimizer.step = step
        grpo.step(1)
        weights.append(torch.cat([p.detach().flatten().cpu() for p in grpo.policy.parameters()]))
    difference = (weights[0] - weights[1]).abs().max().item()
    if difference > MAX_WEIGHT_DIFFERENCE:
        raise ValueError(f"weights differ by {difference:.1e}")
    return f"weights differ by at most {difference:.1e}"


def cuda_graphs(check: Check) -> str:
    """Time the sampling of the default run with CUDA graphs and without."""
    if check.device.type != "cuda":
        return "not on this device"
    seconds = {}
    for graphs in (False, True):
        lm = load("starter", check.device)
        if graphs and not probe(lm, Arithmetic(), cuda_graphs=True)[1].uses_cuda_graphs:
            raise ValueError("they do not decode as plain passes do")
        config = resolve({"model": "starter", "device": "cuda", "cuda_graphs": graphs})
        grpo = GRPO(config, Arithmetic(), lm)
        seconds[graphs] = min(measured_step(grpo, step)[1]["time/sample"] for step in range(1, 6))
    return f"sampling {seconds[False]:.3f} s without, {seconds[True]:.3f} s with"


def out_of_memory(check: Check) -> str:
    """Take a step in less memory than it needs: passes must become smaller, and the step must end."""
    if check.device.type != "cuda":
        return "not on this device"
    sizes = {"batch_size": 64, "num_generations": 16, "max_new_tokens": 64, "num_inner_updates": 1}
    config = resolve({"model": "starter", "device": "cuda", **sizes})
    grpo = GRPO(config, Arithmetic(), load("starter", check.device))
    held = torch.cuda.memory_allocated() + 300 * 2**20
    torch.cuda.set_per_process_memory_fraction(held / torch.cuda.get_device_properties(check.device).total_memory)
    try:
        grpo.step(1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    rows, most = grpo.update_microbatch.rows, sizes["batch_size"] * sizes["num_generations"]
    if rows >= most:
        raise ValueError("memory did not run out")
    return f"a step of {most} completions in passes of {rows}"


def resume(check: Check) -> str:
    """Compare a run of 6 steps with one of 3 that was continued to 6, by the bytes of the last checkpoint."""
    digests = []
    for name, parts in (("whole", [6]), ("two parts", [3, 6])):
        folder = check.folder / name
        for steps in parts:
            train(check, folder, *SHORT, "--deterministic", "--num-iterations", str(steps))
        files = sorted((folder / "checkpoints" / "step-00000006").glob("*.safetensors"))
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    if digests[0] != digests[1] or not digests[0]:
        raise ValueError("other bits")
    return "same bits"


def default_run(check: Check) -> str:
    """Train the starter as the README does."""
    folder = check.folder / "default"
    start = time.monotonic()
    train(check, folder, *(["--num-iterations", "2", *SHORT] if check.quick else []))
    tests = [entry for entry in load_metrics(folder)["evals"] if entry["split"] == "test"]
    return f"{tests[0]['accuracy']:.1%} -> {tests[-1]['accuracy']:.1%} in {time.monotonic() - start:.0f} s"


def shape(name: str) -> Callable[[Check], str]:
    """Return the check of a step in the shape of a Qwen2.5: seconds, beside TRL, memory, bandwidth in decoding."""

    def check_shape(check: Check) -> str:
        layers = 2 if check.quick else SHAPES[name][0]
        model = random_model(check.folder / name, (layers, *SHAPES[name][1:]))
        size, turns = Size(4, 8, 40, 8 if check.quick else 64), 1 if check.quick else 2
        steps = 1 if check.quick else STEPS // turns
        most = WARM_UP + turns * steps + 1
        spec = Spec(size, str(model), device=check.device.type, precision="bfloat16", max_steps=most)
        pythons = {"ours": sys.executable} | ({"TRL": check.python_of_trl} if check.python_of_trl else {})
        found = speed(pythons, spec, turns, steps, check.folder)
        weights = 2 * sum(p.numel() for p in load(str(model), torch.device("cpu")).model.parameters())
        rate = weights * size.completion / found["ours"]["phases"]["sampling"] / 1e9
        return f"{report.line(found)}; {found['ours']['memory'] / 2**20:,.0f} MiB; decoding reads {rate:,.0f} GB/s"

    return check_shape


def train(check: Check, folder: Path, *arguments: str) -> None:
    """Run train_grpo.py on the device. Raises ValueError with its last line if it fails."""
    command = [sys.executable, ROOT / "train_grpo.py", "--device", check.device.type, "--output-dir", folder]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])


CHECKS: dict[str, Callable[[Check], str]] = {
    "same as on the CPU": like_the_cpu,
    "shortcuts": capabilities,
    "packed rows, bfloat16": same_numbers,
    "CUDA graphs": cuda_graphs,
    "out of memory": out_of_memory,
    "out of memory in the optimizer": out_of_memory_in_the_optimizer,
    "worked examples": worked_examples,
    "adapters": adapters,
    "resume, --deterministic": resume,
    "default run": default_run,
    **{f"shape of Qwen2.5-{name}": shape(name) for name in SHAPES},
}


def run_checks(checks: dict[str, Callable[[Check], str]], check: Check, end: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each check: its name, whether it holds, what it found, and its seconds."""
    for name, look in checks.items():
        start = time.monotonic()
        if start > end:
            yield {"check": name, "holds": None, "found": "no time left", "seconds": 0.0}
            continue
        try:
            holds, found = True, look(check)
        except Exception as error:
            holds, found = False, f"{type(error).__name__}: {error}".splitlines()[0][:300]
        yield {"check": name, "holds": holds, "found": found, "seconds": time.monotonic() - start}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    words = {True: "yes", False: "NO", None: "not run"}
    cells = [[r["check"], words[r["holds"]], r["found"], f"{r['seconds']:.0f} s"] for r in rows]
    return report.table(["check", "holds", "found", "time"], cells)


@click.command()
@click.option("--device", type=click.Choice(["auto", "cuda", "mps", "cpu"]), default="auto", show_default=True)
@click.option("--minutes", default=8.0, show_default=True, help="no check begins later")
@click.option("--trl", is_flag=True, help="compare with TRL too, which is installed for this")
@click.option("--quick", is_flag=True, help="small sizes, to see that the command itself works")
@click.option("--output-dir", type=click.Path(path_type=Path), default=Path("benchmark_results"), show_default=True)
def main(device: str, minutes: float, trl: bool, quick: bool, output_dir: Path) -> None:
    """Check a device and write device_check.json and device_check.md."""
    end, where = time.monotonic() + 60 * minutes, choose_device(device)
    output_dir.mkdir(parents=True, exist_ok=True)
    python = None
    if trl:
        try:
            python = trl_python((output_dir / "trl-venv").resolve())
        except (subprocess.CalledProcessError, OSError) as error:
            click.echo(f"TRL cannot be installed ({error}); this project alone is measured")
    about = {"hardware": hardware(where.type), "device": TRAITS[where.type].name(where), "torch": torch.__version__}
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        check = Check(where, Path(folder), quick, python)
        checks = dict(list(CHECKS.items())[: 1 - len(SHAPES)]) if quick else CHECKS
        for row in run_checks(checks, check, end):
            click.echo(f"{row['check']}: {row['found']}")
            rows.append(row)
            (output_dir / "device_check.json").write_text(json.dumps({**about, "checks": rows}, indent=1) + "\n")
            (output_dir / "device_check.md").write_text(table(rows) + "\n", encoding="utf-8")
    click.echo(f"\n{about['device']}, torch {about['torch']}\n\n{table(rows)}\n")
    click.echo(
        f"Please send {output_dir / 'device_check.json'} to the project in an issue, whether all checks hold or not."
    )
    sys.exit(any(row["holds"] is False for row in rows))


if __name__ == "__main__":
    main()
