"""Runs so small that a test may have dozens: a random model of a few kilobytes, a few steps, on the CPU.

`forked` starts a script in a process of its own that has the libraries loaded already: half a second instead of
eight, and limits of the system can be put on it alone.
"""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import cache, partial
from pathlib import Path

import torch
from click.testing import CliRunner
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import grpo.trainer  # noqa: F401, once, not in every fork
import train_grpo
from grpo.launch import outlook, torchrun  # noqa: F401
from grpo.model import trial
from grpo.model.language_model import encode_chat
from grpo.model_card import CARD, STARTER
from grpo.record.metrics import load_metrics
from tasks.arithmetic import Arithmetic

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SETTINGS = {"num_iterations": 6, "batch_size": 2, "num_generations": 8, "num_inner_updates": 2, "device": "cpu"}
SETTINGS |= {"precision": "float32", "eval_every": 2, "eval_problems": 4, "save_every": 2, "show_every": 0}
SETTINGS |= {"min_operand": -1, "max_operand": 1, "max_new_tokens": 6}
SETTINGS |= {"learning_rate": 2e-3}  # better than the start at step 4


def a_tiny_model(folder, hidden_size=16):
    """Make a folder with a model of a few kilobytes that mostly writes a digit in answer tags.

    It has the starter's tokenizer. A random model would never be rewarded, so that no weight would move and every run
    would be the same.
    """
    weights = ("model.safetensors", "config.json", "README.md")
    shutil.copytree(STARTER, folder, ignore=shutil.ignore_patterns(*weights))
    _tiny_weights(hidden_size).save_pretrained(folder)
    (folder / CARD).write_text(json.dumps({"skills": [], "settings": {}}), encoding="utf-8")
    return folder


@cache
def _tiny_weights(hidden_size):
    """Train a random model on four answers; once in a process, because many tests need a folder of their own."""
    tokenizer = AutoTokenizer.from_pretrained(STARTER, trust_remote_code=False)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": 1}
    sizes |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "bos_token_id": None,
    }
    sizes |= {"vocab_size": len(tokenizer), "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    )
    prompt = encode_chat(tokenizer, Arithmetic().messages("What is (1 + 0) - 1?"))
    ends = [tokenizer(f"<answer>{digit}</answer><|im_end|>")["input_ids"] for digit in (0, 1, 3, 3)]
    ids = torch.tensor([prompt + end for end in ends])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    return model


def options(**settings):
    """Return the tiny settings with these changes as arguments of train_grpo.py; None leaves a setting out.

    Some of the tiny models have nothing to learn, and are trained all the same.
    """
    pairs = {**SETTINGS, **settings}.items()
    names = {name: name.replace("_", "-") for name, _ in pairs}
    flags = [f"--{'' if v else 'no-'}{names[name]}" for name, v in pairs if isinstance(v, bool)]
    valued = [(name, v) for name, v in pairs if v is not None and not isinstance(v, bool)]
    return ["--train-anyway", *flags] + [text for name, v in valued for text in (f"--{names[name]}", str(v))]


def trained(model, folder, *arguments, **settings):
    """Train the tiny run in this process to its end; return its record and its standard output."""
    result = CliRunner().invoke(train_grpo.main, [*options(model=model, output_dir=folder, **settings), *arguments])
    assert result.exit_code == 0, result.output
    return load_metrics(folder), result.stdout


def kept_gradients(grpo):
    """Return a list to which each update of GRPO appends its gradient, as one vector; a step does not keep it."""
    kept = []

    def keep(optimizer, *_):
        kept.append(torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"]]))

    grpo.update.optimizer.register_step_pre_hook(keep)
    return kept


class Fork:
    """A click command that runs in a fork of this process, with the part of Popen's interface that tests use."""

    def __init__(self, command, arguments, before=lambda: None, folder=None):
        (self._out, out), (self._err, err) = os.pipe(), os.pipe()
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.closerange(3, 256)
            os._exit(_run(command, arguments, before, folder))
        os.close(out)
        os.close(err)

    def poll(self):
        """Return the exit status, or None while the command runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def send_signal(self, number):
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self):
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=600):
        """Return standard output and standard error when the command has ended; each must fit in a pipe.

        Raises TimeoutExpired if it still runs after this many seconds.
        """
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.002)
        with open(self._out, encoding="utf-8") as out, open(self._err, encoding="utf-8") as err:
            return out.read(), err.read()

    def wait(self):
        """Return exit status, standard output and standard error."""
        out, err = self.communicate()
        return self.returncode, out, err


def _run(command, arguments, before, folder):
    status = 70
    try:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or the library speaks up about the fork
        sys.stdin = io.StringIO()
        sys.stdout, sys.stderr = os.fdopen(1, "w", encoding="utf-8"), os.fdopen(2, "w", encoding="utf-8")
        os.chdir(folder or ROOT)
        before()
        command.main([str(argument) for argument in arguments], prog_name="script")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def run_trial_in_fork(arguments, **_):
    """Try a tokenizer as a new process of `grpo/model/trial.py` does, in a fork, which has imported transformers."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ.update(trial.ONE_THREAD)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.dup2(2, 1)
        trial.set_limits(int(arguments[-2]), float(arguments[-1]))
        try:
            trial.use(AutoTokenizer.from_pretrained(arguments[-3], local_files_only=True))
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}"[:2000].encode(errors="replace"))
            os._exit(1)
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8", errors="replace") as out:
        reason = out.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return subprocess.CompletedProcess(arguments, status, reason)


def forked(command, arguments, before=lambda: None, folder=None):
    """Run a click command in a fork, after `before()`; return exit status, standard output and standard error."""
    return Fork(command, arguments, before, folder).wait()


def together(command, arguments, processes=2, before=lambda rank: None):
    """Start a click command in several forks, as torchrun does; return a Fork for each, to `wait` for.

    `arguments` may be a function of the rank.
    """

    def start(rank):
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
        before(rank)

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    own = arguments if callable(arguments) else lambda rank: arguments
    return [Fork(command, own(rank), partial(start, rank)) for rank in range(processes)]


def spawned(script, arguments, before=None, folder=None):
    """Run a script in a new interpreter, as a user does; return what `forked` returns."""
    return interpreted([ROOT / script, *arguments], before, folder)


def interpreted(arguments, before=None, folder=None):
    """Run a new interpreter with these arguments; return what `forked` returns."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder or ROOT,
        env=ENVIRONMENT,
        preexec_fn=before,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def fingerprint(folder):
    """Return the SHA-256 of weights, optimizer, samples and metrics (times and memory aside) of a run."""
    record = json.loads((folder / "grpo_metrics.json").read_text(encoding="utf-8"))
    for row in record["steps"] + record["evals"] + record["sft"]:
        for name in [name for name in row if name.startswith("time/")]:
            del row[name]
    record["config"].pop("output_dir")
    record["finished"].pop("peak_memory")
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for path in (
        last / "policy.safetensors",
        last / "optimizer.safetensors",
        folder / "saved_model/model.safetensors",
        folder / "grpo_samples.jsonl",
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def kill_and_continue(launch, whole, folder, seed, launches):
    """Kill this many launches of a run at random moments, then let one end; return how many were killed.

    `launch(folder)` starts or continues it in a process; `whole` is the folder and the seconds of an undisturbed run.
    """
    reference, seconds = whole
    rng = random.Random(seed)
    kills = 0
    for _ in range(launches):
        process = launch(folder)
        try:
            process.communicate(timeout=rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    process = launch(folder)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert fingerprint(folder) == fingerprint(reference), f"seed {seed}, {kills} kills"
    return kills


def wait_for(condition, process=None, seconds=150):
    """Wait until `condition()`; fail if the process ends before, or after this many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
