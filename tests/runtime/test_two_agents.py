"""Two torchruns on one machine, as if on two: differences between them, and processes that are killed. Slow."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_grpo
from tests.helpers.runs import ENVIRONMENT, ROOT, a_tiny_model, fingerprint, forked, options

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
REWARD = (
    "def pay(prompts, completions, **columns):\n    return [float('1' in c[0]['content']) for c in completions]\n"
)
KILLS = 20


class Agents:
    """Two torchruns that find each other on this machine, each in a folder of its own with arguments of its own."""

    def __init__(self, tmp_path, arguments, processes=1, restarts=0, script=lambda node: ROOT / "train_grpo.py"):
        self.started = time.monotonic()
        self.logs = [tmp_path / f"agent-{node}.log" for node in range(2)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.agents = [
            self._start(node, [f"--rdzv-endpoint=localhost:{port}", "--nproc-per-node", processes], restarts, script)
            for node, self.arguments in enumerate(map(arguments, range(2)))
        ]

    def _start(self, node, place, restarts, script):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--rdzv-backend", "c10d", *place]
        command += ["--max-restarts", restarts, script(node), *self.arguments]
        folder = self.logs[node].with_suffix("")
        folder.mkdir(exist_ok=True)
        with self.logs[node].open("w") as log:
            return subprocess.Popen(
                list(map(str, command)), env=ENVIRONMENT, cwd=folder, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self, seconds=600):
        """Wait for both; return the status of each and what it printed."""
        try:
            statuses = [agent.wait(timeout=seconds) for agent in self.agents]
        finally:
            for pid in self.workers().values():
                os.kill(pid, signal.SIGKILL)
            for agent in self.agents:
                agent.kill()
                agent.wait()
        return statuses, [log.read_text() for log in self.logs]

    def workers(self):
        """Return the process id of each process that trains, by its rank."""
        found = {}
        for agent in self.agents:
            children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
            for pid in children.read_text().split() if children.exists() else ():
                try:
                    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                except OSError:
                    continue  # it has just ended
                rank = [int(pair[5:]) for pair in pairs if pair.startswith(b"RANK=")]
                found |= dict.fromkeys(rank, int(pid))
        return found


def refusals(log):
    return [line for line in log.splitlines() if line.startswith("Error: ")]


def problems(number):
    rows = ({"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(number))
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)


DIFFERENT = {
    "seed": ({}, {"seed": 1}, "--seed is 0"),
    "learning rate": ({}, {"learning_rate": 1e-4}, "--learning-rate is 0.002"),
    "steps": ({}, {"num_iterations": 8}, "--num-iterations is 6"),
    "batch": ({}, {"batch_size": 4}, "--batch-size is 2"),
    "generations": ({}, {"num_generations": 4}, "--num-generations is 8"),
    "sharding": ({}, {"shard": True}, "--shard is False"),
    "rewards": ({}, {"reward": "exact=1"}, "--reward is "),
    "a setting that cannot be": ({}, {"learning_rate": "nan"}, "--learning-rate is nan"),
    "a reward file": ({"reward": "mine.py:pay=1"}, {"reward": "mine.py:pay=1"}, "mine.py is SHA-256"),
    "a data file": ({"task": "jsonl", "data": "d.jsonl"},) * 2 + ("d.jsonl is SHA-256",),
    "no data file": ({"task": "jsonl", "data": "e.jsonl"},) * 2 + ("e.jsonl",),
    "another version": ({}, {}, "grpo/algorithm/loss.py is SHA-256"),
    "another model": ({"model": "model"}, {"model": "model"}, "the model is one with the hash"),
    "no shared folder": ({"output_dir": "run"}, {"output_dir": "run"}, "give a folder that all machines share"),
}


@pytest.mark.parametrize(("first", "second", "word"), DIFFERENT.values(), ids=DIFFERENT)
def test_machines_that_differ_are_refused_in_one_line_on_both(first, second, word, model, tmp_path, request):
    common = {"model": model, "output_dir": tmp_path / "run"}
    for node in range(2):
        write(tmp_path / f"agent-{node}", mine_py=REWARD + "#" * node, d_jsonl=problems(300 + node))
    write(tmp_path / "agent-0", e_jsonl=problems(300))
    (tmp_path / "agent-0/model").symlink_to(model)
    (tmp_path / "agent-1/model").symlink_to(a_tiny_model(tmp_path / "other", hidden_size=8))
    scripts = [ROOT, ROOT]
    if "version" in request.node.name:
        scripts[1] = tmp_path / "copy"
        for name in ("grpo", "tasks"):
            shutil.copytree(ROOT / name, scripts[1] / name)
        shutil.copy(ROOT / "train_grpo.py", scripts[1])
        with (scripts[1] / "grpo/algorithm/loss.py").open("a") as file:
            file.write("# another\n")
    settings = ({**common, **first}, {**common, **second})
    agents = Agents(tmp_path, lambda n: options(**settings[n]), script=lambda n: scripts[n] / "train_grpo.py")
    statuses, logs = agents.wait()
    took = time.monotonic() - agents.started
    print(f"{request.node.name}: refused after {took:.1f} s")
    assert statuses == [1, 1]
    for log in logs:
        assert len(refusals(log)) == 1, log
        assert word in refusals(log)[0]
    assert took < 20
    assert not list(tmp_path.glob("*/checkpoints"))


def kill_some(agents, kills, rng):
    """Kill up to `kills` processes at random moments until the run has ended; return the ranks that were killed."""
    killed = []
    while len(killed) < kills:
        end = time.monotonic() + rng.uniform(0, 20)
        while time.monotonic() < end:
            if all(agent.poll() is not None for agent in agents.agents):
                return killed
            time.sleep(0.01)
        workers = agents.workers()
        if workers:
            rank = rng.choice(sorted(workers))
            os.kill(workers[rank], signal.SIGKILL)
            killed.append((rank, workers[rank]))
            while agents.workers().get(rank) == workers[rank]:
                time.sleep(0.01)
    return killed


@pytest.mark.parametrize(("settings", "extra"), [({}, ["--fresh"]), ({"shard": True}, [])], ids=["fresh", "sharded"])
def test_a_run_whose_processes_are_killed_ends_as_one_that_nobody_disturbed(settings, extra, model, tmp_path):
    seed = time.time_ns() % 10**6
    rng, total, runs = random.Random(seed), 0, 0
    more = {"num_iterations": 150, "eval_every": 50, "save_every": 10, "model": model, **settings}

    def arguments(folder):
        return lambda node: [*options(**more, output_dir=folder), *extra]

    whole = Agents(tmp_path, arguments(tmp_path / "whole"))
    assert whole.wait()[0] == [0, 0]
    expected = fingerprint(tmp_path / "whole")
    while total < KILLS // 2:
        runs += 1
        agents = Agents(tmp_path, arguments(tmp_path / f"run-{runs}"), restarts=8)
        killed = kill_some(agents, min(4, KILLS // 2 - total), rng)
        statuses, logs = agents.wait()
        total += len(killed)
        print(f"run {runs}: killed {[rank for rank, _ in killed]}, {time.monotonic() - agents.started:.0f} s")
        assert statuses == [0, 0], (seed, *logs)
        assert fingerprint(tmp_path / f"run-{runs}") == expected, (seed, *logs)
        assert not (tmp_path / f"run-{runs}/earlier_runs").exists(), "a restart is no fresh start"
    print(f"{total} kills in {runs} runs, seed {seed}: all ended, with the same bits")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("delay", [0.0, 0.2, 0.4])
def test_a_process_that_is_killed_in_the_last_moments_takes_nothing_with_it(rank, delay, model, tmp_path):
    agents = Agents(tmp_path, lambda node: options(model=model, output_dir=tmp_path / "run"), restarts=2)
    metrics = tmp_path / "run/grpo_metrics.json"
    while not (metrics.exists() and json.loads(metrics.read_text())["finished"]):
        time.sleep(0.01)
    time.sleep(delay)
    pid = agents.workers().get(rank)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    statuses, logs = agents.wait()
    print(f"rank {rank} killed {delay} s after the run was finished" if pid else "it had ended")
    assert statuses == [0, 0], logs


def test_a_process_that_is_stopped_is_replaced(model, tmp_path):
    more = {"num_iterations": 150, "eval_every": 50, "save_every": 10, "model": model}
    agents = Agents(tmp_path, lambda node: options(**more, output_dir=tmp_path / "run"), restarts=2)
    while not list(tmp_path.glob("run/checkpoints/step-*[1-9]0")):
        time.sleep(0.05)
    os.kill(agents.workers()[1], signal.SIGSTOP)
    stopped = time.monotonic()
    statuses, logs = agents.wait()
    print(f"ended {time.monotonic() - stopped:.0f} s after a process was stopped")
    assert statuses == [0, 0], logs
    assert "process 1 on " in logs[0]
    assert "has not answered for 180 s" in logs[0]


def test_two_machines_that_shard_within_each_train_what_one_process_does(model, tmp_path):
    more = {"num_iterations": 20, "eval_every": 10, "save_every": 10, "batch_size": 4, "learning_rate": 1e-3}
    more |= {"model": model}
    assert forked(train_grpo.main, options(**more, output_dir=tmp_path / "one"))[0] == 0
    agents = Agents(tmp_path, lambda node: options(**more, shard=True, output_dir=tmp_path / "run"), processes=2)
    statuses, logs = agents.wait()
    assert statuses == [0, 0], logs
    for name in ("policy.safetensors", "optimizer.safetensors"):
        some, others = (load_file(tmp_path / run / "checkpoints/step-00000020" / name) for run in ("one", "run"))
        assert some.keys() == others.keys()
        most = max(float((some[k] - others[k]).abs().max()) for k in some)
        print(f"{name}: within {most:.1e}")
        assert most < 1e-5
    moved = load_file(model / "model.safetensors")
    trained = load_file(tmp_path / "run/saved_model/model.safetensors")
    assert max(float((trained[name] - moved[name]).abs().max()) for name in moved) > 1e-3, "or it would prove nothing"
    record = json.loads((tmp_path / "run/grpo_metrics.json").read_text())
    assert record["environment"]["processes"] == 4
    assert torch.isfinite(torch.tensor([row["grad_norm"] for row in record["steps"]])).all()
