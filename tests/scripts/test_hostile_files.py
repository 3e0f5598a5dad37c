"""Give hostile folders and files to the real scripts: each is refused in one printable line, soon, in little memory.

The quick ones run in a fork of this process with short limits; `-m slow -k hostile` starts each script as a user
does, and prints a table with `-s`.
"""

import resource
import signal
import subprocess
import sys
import time

import pytest

import train_grpo
from grpo.model import trial
from grpo.model_card import STARTER
from tests.helpers.hostile import GGUFS, MODELS, a_hostile_model
from tests.helpers.hostile_data import FILES, write_file
from tests.helpers.hostile_rewards import REWARDS
from tests.helpers.runs import ENVIRONMENT, ROOT, forked, options
from tests.helpers.smollm2 import is_installed

needs_gguf = pytest.mark.skipif(not is_installed("gguf"), reason="pip install gguf accelerate")
# one folder of each kind; the last two need a process with limits
QUICK_MODELS = ["config: 10**6 layers", "config: a size of 10**9", "config: of an unknown kind", "an adapter"]
QUICK_MODELS += ["weights: not a number", "weights: a header of 2**60 bytes", "weights: of another shape"]
QUICK_MODELS += ["weights: names with escape sequences", "weights: from a pipe", "config: attention from elsewhere"]
QUICK_MODELS += ["template: nested loops", "tokenizer: chained replacements"]
QUICK_FILES = [
    "301 times one question",
    "questions longer than the positions",
    "escape sequences as a line",
    "all NUL",
    "a pipe",
]
BASE_MEMORY = 600  # MB that a run of the starter takes at most
SMALL = {"batch_size": 1, "num_generations": 2, "num_iterations": 1, "num_inner_updates": 1, "eval_problems": 2}


def the_line(status, out, err):
    """Return the one line on standard error, after checking that it is safe to print."""
    assert "Traceback" not in err, err[-2000:]
    assert status in (1, 2), (status, out[-500:], err)
    said = ("Usage: ", "Try ", "Model: ", "Loading ")
    lines = [line for line in err.splitlines() if line and not line.startswith(said)]
    assert len(lines) == 1, err
    assert lines[0].startswith("Error: ")
    assert all(text.isprintable() for text in (*err.splitlines(), *out.splitlines()))
    assert len(lines[0]) < 900
    return lines[0]


def short_limits():
    """Let the trial of a tokenizer take two seconds."""
    trial.SECONDS = 2


@pytest.mark.parametrize("name", QUICK_MODELS)
def test_a_hostile_model_is_refused_in_one_line(name, tmp_path):
    a_hostile_model(tmp_path / "m", name)
    result = forked(
        train_grpo.main, options(**SMALL, model=tmp_path / "m", output_dir=tmp_path / "out"), short_limits
    )
    assert "m" in the_line(*result)


@pytest.mark.parametrize("name", QUICK_FILES)
def test_a_hostile_data_file_is_refused_in_one_line(name, tmp_path):
    content, expected = FILES[name]
    data = write_file(tmp_path / "data.jsonl", content)
    arguments = options(**SMALL, model=STARTER, task="jsonl", data=data, output_dir=tmp_path / "out")
    assert expected in the_line(*forked(train_grpo.main, arguments))


# --- slow: all of them, as a user starts the scripts ---


def measured(script, arguments, folder):
    """Start a script; return its status, output and error, seconds, and the most memory (MB) of all its processes."""
    start = time.monotonic()
    with open(folder / "out.txt", "w+b") as out, open(folder / "err.txt", "w+b") as err:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *map(str, arguments)],
            cwd=folder,
            env={**ENVIRONMENT, "RUST_BACKTRACE": "0"},
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
        )
        most = 0
        while process.poll() is None:
            most = max(most, memory_of(process.pid))
            if time.monotonic() - start > 60:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        texts = [(folder / name).read_bytes().decode(errors="backslashreplace") for name in ("out.txt", "err.txt")]
    return process.returncode, *texts, time.monotonic() - start, most


def memory_of(pid):
    """Return the resident memory of a process and its children, in MB."""
    pages = 0
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return pages * resource.getpagesize() / 2**20 + sum(map(memory_of, map(int, file.read().split())))
    except (OSError, IndexError):
        return pages * resource.getpagesize() / 2**20


def check(name, result):
    """Print a row of the table, then check the bars: one line, 20 s, 1 GB more than a run of the starter takes."""
    status, out, err, seconds, most = result
    print(f"\n| {name} | {status} | {seconds:.1f} s | {most:.0f} MB | {err.strip().splitlines()[-1:]} |")
    line = the_line(status, out, err)
    assert seconds < 20
    assert most < BASE_MEMORY + 1000
    return line


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_hostile_model_is_refused_soon_and_with_little_memory(name, tmp_path):
    a_hostile_model(tmp_path / "m", name)
    check(name, measured("train_grpo.py", options(**SMALL, model="m", output_dir="out"), tmp_path))


@pytest.mark.slow
@needs_gguf
@pytest.mark.parametrize("name", GGUFS)
def test_every_hostile_gguf_file_is_refused_soon_and_with_little_memory(name, tmp_path):
    (tmp_path / "m.gguf").write_bytes(GGUFS[name])
    check(name, measured("inference.py", ["--model", "m.gguf", "What?"], tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_hostile_data_file_is_refused_soon_and_with_little_memory(name, tmp_path):
    content, expected = FILES[name]
    data = write_file(tmp_path / "data.jsonl", content)
    arguments = options(**SMALL, model="starter", task="jsonl", data=data, output_dir="out")
    assert expected in check(name, measured("train_grpo.py", arguments, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", REWARDS)
def test_every_hostile_reward_is_refused_soon_and_with_little_memory(name, tmp_path):
    body, words = REWARDS[name]
    (tmp_path / "mine.py").write_text(body, encoding="utf-8")
    arguments = [*options(**SMALL, model="starter", output_dir="out"), "--reward", "mine.py:f=1"]
    assert words in check(name, measured("train_grpo.py", arguments, tmp_path))
