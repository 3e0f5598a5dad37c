"""The three scripts as a user meets them: what works, and what a mistake is answered with.

Runs here are tiny (2 steps, a handful of held-out problems) and start from the bundled model, whose accuracy
is nobody's business here.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import chdir
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import inference
import plot_metrics
import train_grpo
from grpo import examiner, trainer
from grpo.comparison import COMPARISON
from grpo.config import CARD, STARTER, TrainConfig, resolve
from grpo.files import EARLIER, SAMPLES, WRITTEN
from grpo.learner import Learner
from grpo.metrics import FILE_NAME, load_metrics
from grpo.models import load, save
from grpo.page import PAGE
from grpo.plots import CURVE, KL, OVERVIEW
from tasks.rewards import DEMO, REWARDS

ROOT = Path(__file__).parents[1]
TINY = ["--num-iterations", "2", "--batch-size", "2", "--num-generations", "2", "--eval-problems", "8"]
QUESTION = "What is (4 - 9) * 6?"
FIELDS = {f.name: f for f in fields(TrainConfig)}
EVERYTHING = {"saved_model", "checkpoints", FILE_NAME, CURVE, KL, OVERVIEW, SAMPLES}


@pytest.fixture(scope="module", autouse=True)
def _small_and_offline():
    """A few test problems instead of 1000, and no look at the Hub, whatever was imported first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examiner, "TEST_PROBLEMS", 8)
        patch.setattr(examiner, "SKILL_PROBLEMS", 4)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


def invoke(command, *args, folder, **more):
    """Run a script in this process, in a folder; standard output and error apart."""
    with chdir(folder):
        return CliRunner().invoke(command, [str(arg) for arg in args], **more)


def train(*args, folder):
    """A tiny training run that has to work."""
    result = invoke(train_grpo.main, *TINY, *args, folder=folder)
    assert result.exit_code == 0, result.output
    return result


def ask(*args, folder, **more):
    """Questions to a model that have to work; the lines of standard output."""
    result = invoke(inference.main, *args, folder=folder, **more)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert all(line.isprintable() for line in result.stdout.splitlines())
    return result.stdout.splitlines()


def refusal(result):
    """The one line that a mistake is answered with, after checking that there is nothing else."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output
    *before, last = result.stderr.splitlines()
    assert last.startswith("Error: "), result.stderr
    assert len(last) > len("Error: ") + 5
    for line in before:  # how to call it, or what was loaded
        assert line == "" or line.startswith(("Usage: ", "Try ", "Model: ")), result.stderr
    assert result.stdout == ""
    return last


def snapshot(folder):
    """Every file in a folder with its content; the lock aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".grpo.")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def names_in(folder):
    """What a person sees in a folder."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".grpo.")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run, which no test changes, and what the run said."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder=folder)


@pytest.fixture
def copy_of_run(run, tmp_path):
    """A copy of the finished run's folder, to be changed."""
    return Path(shutil.copytree(run[0], tmp_path / "copy"))


def a_model(folder, **card):
    """A copy of the starter model with some entries of its card changed."""
    shutil.copytree(STARTER, folder)
    content = json.loads((folder / CARD).read_text(encoding="utf-8"))
    (folder / CARD).write_text(json.dumps({**content, **card}), encoding="utf-8")
    return folder


# --- help ---


@pytest.mark.parametrize("command", [train_grpo.main, inference.main, plot_metrics.main], ids=lambda c: c.callback)
def test_help_is_an_answer_and_names_every_option(command, tmp_path):
    for option in ("--help", "-h"):
        result = invoke(command, option, folder=tmp_path)
        assert result.exit_code == 0
        assert result.stderr == ""
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.opts[0] in result.stdout
                assert parameter.help
        assert all(len(line) <= 110 for line in result.stdout.splitlines())


def test_the_help_of_training_has_every_setting_with_group_meaning_and_default(tmp_path):
    text = invoke(train_grpo.main, "--help", folder=tmp_path).stdout
    words = " ".join(text.split())
    for name, field in FIELDS.items():
        assert re.search(f"--{name.replace('_', '-')}\\b", words)
        assert field.metadata["meaning"] in words
        assert f"{field.metadata['group']}:" in words
        option = name.replace("_", "-")
        default = f"{'' if field.default else 'no-'}{option}" if field.type is bool else field.default
        assert default in ("", ()) or f"[default: {default}" in words
    assert "--fresh" in words


@pytest.mark.parametrize("script", ["train_grpo.py", "inference.py", "plot_metrics.py"])
def test_help_answers_at_once_without_the_heavy_libraries(script, tmp_path):
    # -X importtime writes a line for every module that is imported: "import time: self | cumulative | name".
    command = [sys.executable, "-X", "importtime", str(ROOT / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"torch", "transformers", "numpy", "matplotlib", "safetensors"}
    assert "Usage:" in done.stdout


# --- a run, from training to asking ---


def test_a_run_leaves_the_files_that_are_promised_and_no_others(run):
    folder, _ = run
    assert names_in(folder) == EVERYTHING == set(WRITTEN)
    names = {path.name for path in (folder / "saved_model").iterdir()}
    assert names >= {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
        CARD,
    }
    assert (
        "chat_template.jinja" in names
        or "chat_template" in (folder / "saved_model/tokenizer_config.json").read_text()
    )


def test_a_run_says_what_it_did_on_standard_output_and_progress_on_standard_error(run):
    _, result = run
    settings = result.stdout.split("Settings:")[1].split("\n\n")[0].split()
    mine = {"num_iterations": 2, "batch_size": 2, "num_generations": 2, "eval_problems": 8}
    expected = {name: value for name, value in resolve(mine).to_dict().items() if value not in ("", [])}
    of_interest = {name for name in expected if FIELDS[name].metadata["group"] in ("Task", "Algorithm")}
    of_interest |= {name for name in expected if expected[name] != FIELDS[name].default} - {"model", "output_dir"}
    expected = {name: expected[name] for name in of_interest}
    assert set(settings) == {f"{name}={value}" for name, value in expected.items()}
    for word in (
        "test accuracy",
        "n = 8",
        "saved_model",
        FILE_NAME,
        SAMPLES,
        CURVE,
        KL,
        OVERVIEW,
        "inference.py",
        "Time: sampling",
    ):
        assert word in result.stdout
    assert "step 2/2" in result.stderr
    assert "step 2/2" not in result.stdout
    assert all(len(line) < 120 for line in result.stdout.splitlines())


def test_the_record_of_a_run_has_what_the_contract_names(run):
    # DESIGN, section 4.
    record = load_metrics(run[0])
    assert [row["step"] for row in record["steps"]] == [1, 2]
    names = {"step", "reward_mean", "reward_std", "accuracy", "kl", "loss", "clip_fraction", "ratio_max", "entropy"}
    names |= {"grad_norm", "learning_rate", "completion_length", "truncated_fraction", "tied_groups_fraction"}
    names |= {"skipped_updates", "tokens", "reward/format", "reward/close", "reward/exact"}
    names |= {"time/reward/format", "time/reward/close", "time/reward/exact"}
    names |= {"time/sample", "time/reward", "time/reference", "time/update", "time/total"}
    for row in record["steps"]:
        assert names <= set(row)
        assert all(value is None or math.isfinite(value) for value in row.values())
        assert row["reward_mean"] == pytest.approx(
            sum(row[f"reward/{part}"] for part in ("format", "close", "exact"))
        )
        assert 0 <= row["reward_mean"] <= 1
        assert row["kl"] >= 0
        assert row["time/total"] >= row["time/update"]
    assert record["steps"][0]["kl"] == pytest.approx(0, abs=1e-6)  # the policy is still the reference
    assert [(e["split"], e["step"]) for e in record["evals"]][:-1] == [
        ("test", 0),
        ("validation", 0),
        ("validation", 2),
    ]
    assert record["evals"][-1]["split"] == "test"
    for entry in record["evals"]:
        assert 0 <= entry["ci_low"] <= entry["accuracy"] <= entry["ci_high"] + 1e-12 <= 1 + 1e-12
        assert entry["n"] == 8
    assert record["config"] == resolve({name: record["config"][name] for name in FIELDS}).to_dict()
    assert {"device", "threads", "torch", "transformers", "python"} <= set(record["environment"])


def test_the_saved_model_is_float32_and_loads_without_this_program(run):
    folder = run[0] / "saved_model"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    chat = [{"role": "user", "content": QUESTION}]
    assert QUESTION in tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    assert {"task", "kind", "prompt_style", "system_prompt", "max_new_tokens", "base_model", "settings"} <= set(card)
    assert card["base_model"] == "starter"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.count("n = 8") >= 3  # validation, and test before and after
    assert "not measured yet" not in text
    assert "learning_rate = " in text


def without_times(value):
    """A record without the entries that are seconds or bytes of memory."""
    if isinstance(value, dict):
        return {k: without_times(item) for k, item in value.items() if not k.startswith(("time/", "peak_memory"))}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def test_two_identical_runs_are_identical_to_the_last_bit(run, tmp_path):
    train(folder=tmp_path)
    first, second = snapshot(run[0]), snapshot(tmp_path)
    assert set(first) == set(second)
    for name in first:
        if name.startswith("saved_model"):
            assert first[name] == second[name], name
    assert without_times(load_metrics(run[0])) == without_times(load_metrics(tmp_path))


def test_training_changes_the_policy_and_another_seed_gives_another_run(run, tmp_path, monkeypatch):
    # Every evaluation is made better than the one before, so that the last policy is saved whatever it can do.
    rising = iter(range(100))
    true_evaluate = examiner.evaluate

    class Rising:
        def __init__(self, result):
            self.result = result

        def to_dict(self):
            return {**self.result.to_dict(), "accuracy": next(rising) / 100}

    monkeypatch.setattr(examiner, "evaluate", lambda *args, **more: Rising(true_evaluate(*args, **more)))
    monkeypatch.setattr(trainer, "draw_all", lambda *_: [])  # for speed
    settings = ["--seed", 5, "--temperature", 1.5, "--num-generations", 8]
    train(*settings, folder=tmp_path)
    steps = load_metrics(tmp_path)["steps"]
    assert without_times(steps) != without_times(load_metrics(run[0])["steps"])
    before = load_file(STARTER / "model.safetensors")
    after = load_file(tmp_path / "saved_model/model.safetensors")
    assert set(before) == set(after)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(weight).all() for weight in after.values())
    # AdamW moves a weight by at most about the learning rate an update: 2 steps of 5 updates.
    furthest = max((before[name] - after[name]).abs().max().item() for name in before)
    assert furthest <= 10 * steps[0]["learning_rate"] * 1.5


def test_a_run_can_start_from_a_saved_model(run, tmp_path):
    folder = run[0]
    train("--model", "saved_model", "--output-dir", tmp_path / "new" / "er", folder=folder)
    assert names_in(tmp_path / "new" / "er") == EVERYTHING
    card = json.loads((tmp_path / "new" / "er" / "saved_model" / CARD).read_text(encoding="utf-8"))
    assert Path(card["base_model"]) == (folder / "saved_model").resolve()  # found from any folder
    lines = ask("--model", "new/er/saved_model", "--compare", QUESTION, folder=tmp_path)
    assert [line.split()[0] for line in lines] == ["What", "before:", "after:"]


@pytest.mark.parametrize(
    "more",
    [
        ["--beta", 0, "--fresh"],
        ["--max-operand", 1, "--eval-every", 1],
        ["--prompt-style", "think", "--show-every", 1],
    ],
    ids=str,
)
def test_settings_that_take_another_way_work(more, tmp_path):
    train("--num-inner-updates", 1, *more, folder=tmp_path)
    assert names_in(tmp_path) == EVERYTHING
    if "--beta" in more:
        assert all(row["kl"] in (0, None) for row in load_metrics(tmp_path)["steps"])


# --- tasks, styles and rewards ---


def sums_file(path, n=120):
    """A JSON Lines file in the format of GSM8K, which is also one of questions and answers."""
    rows = [{"question": f"What is ({i} + {i % 7}) - 3?", "answer": f"so\n#### {i + i % 7 - 3}"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


MINE = """
def shows_work(prompts, completions, answer, **columns):
    assert len(prompts) == len(answer) == len(columns["completion_ids"])
    return [float("=" in completion[0]["content"]) for completion in completions]

def never(completions, **columns):
    return [None] * len(completions)
"""


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        (["--task", "reverse"], "text"),
        (["--task", "jsonl", "--data", "sums.jsonl"], "text"),
        (["--task", "gsm8k", "--data", "sums.jsonl"], "number"),
        (["--prompt-style", "reasoning", "--max-new-tokens", 40], "integer"),
        (
            ["--min-operand", -4, "--system-prompt", "Give the result as an integer in <answer>...</answer>."],
            "integer",
        ),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, list) else value,
)
def test_every_task_and_style_trains_saves_and_answers(args, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "draw_all", lambda *_: [])  # for speed
    sums_file(tmp_path / "sums.jsonl")
    result = train("--num-inner-updates", 1, *args, folder=tmp_path)
    record = load_metrics(tmp_path)
    assert {f"reward/{name}" for name in DEMO if "reasoning" in args} <= set(record["steps"][0])
    card = json.loads((tmp_path / "saved_model" / CARD).read_text(encoding="utf-8"))
    assert (card["task"], card["kind"]) == (record["config"]["task"], kind)
    assert card["system_prompt"] == record["config"]["system_prompt"] or "<answer>" in card["system_prompt"]
    assert "data" not in card["settings"]
    said = " ".join(result.stdout.split())  # paragraphs are wrapped
    if "reverse" in args or "reasoning" in args:
        assert said.count("Too hard for this model") == 1
    assert ("tokens hide the letters" in said) == ("reverse" in args)
    assert len(ask("Spell batori backwards.", folder=tmp_path)) == 2


def test_the_answer_is_shown_by_its_kind(tmp_path, monkeypatch):
    a_model(tmp_path / "m", kind="text")
    for text, shown in (
        ("<answer>a\nb</answer>", "[answer a\\nb]"),
        ("<answer></answer>", "[no well-formed answer]"),
    ):
        monkeypatch.setattr(inference, "complete", lambda *args, text=text: [[text]])
        assert shown in ask("--model", "m", "Say it.", folder=tmp_path)[1]
    a_model(tmp_path / "n", kind="number", prompt_style="reasoning")
    text = "<reasoning>x</reasoning>\n<answer>\n1,234.50\n</answer>\n"
    monkeypatch.setattr(inference, "complete", lambda *args: [[text]])
    assert "[answer 1234.50]" in ask("--model", "n", "Say it.", folder=tmp_path)[1]


def test_given_rewards_and_a_users_file_are_what_is_trained_and_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "draw_all", lambda *_: [])  # for speed
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    rewards = ["--reward", "exact=1", "--reward", "mine.py:shows_work=0.5", "--reward", "mine.py:never=1"]
    train(*rewards, folder=tmp_path)
    record = load_metrics(tmp_path)
    assert record["config"]["reward"] == ["exact=1", "mine.py:shows_work=0.5", "mine.py:never=1"]
    for row in record["steps"]:
        names = {name for name in row if name.startswith("reward/")}
        assert names == {"reward/exact", "reward/shows_work", "reward/never"}
        assert row["reward/never"] is None
        assert row["reward_mean"] == pytest.approx(row["reward/exact"] + row["reward/shows_work"])
        assert 0 <= row["time/reward/shows_work"] <= row["time/reward"]
    settings = json.loads((tmp_path / "saved_model" / CARD).read_text(encoding="utf-8"))["settings"]
    assert settings["reward"] == []  # a downloaded model must not make anybody run a file

    before = snapshot(tmp_path)
    (tmp_path / "mine.py").write_text(MINE + "\n# another reward", encoding="utf-8")
    result = invoke(train_grpo.main, *TINY, *rewards, "--num-iterations", 3, folder=tmp_path)
    assert result.exit_code == 1
    [error] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "mine.py changed" in error
    assert "--fresh" in error
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    assert snapshot(tmp_path) == before
    train(*rewards, "--num-iterations", 3, folder=tmp_path)
    assert len(load_metrics(tmp_path)["steps"]) == 3


def test_a_run_does_not_go_on_with_changed_data(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "draw_all", lambda *_: [])  # for speed
    args = ["--task", "gsm8k", "--data", "sums.jsonl", "--num-inner-updates", 1]
    sums_file(tmp_path / "sums.jsonl")
    train(*args, folder=tmp_path)
    sums_file(tmp_path / "sums.jsonl", 121)
    result = invoke(train_grpo.main, *TINY, *args, "--num-iterations", 3, folder=tmp_path)
    assert result.exit_code == 1
    assert "sums.jsonl changed" in result.stderr


def test_a_users_function_that_raises_ends_the_run_in_one_line(tmp_path):
    (tmp_path / "mine.py").write_text("def f(completions, **columns):\n    return [1 / 0]\n", encoding="utf-8")
    result = invoke(train_grpo.main, *TINY, "--reward", "mine.py:f=1", folder=tmp_path)
    assert result.exit_code == 1
    [error] = [line for line in result.stderr.splitlines() if not line.startswith("step ")]
    assert error == "Error: reward function 'f' raised ZeroDivisionError: division by zero (mine.py:2)"


BAD_TASKS = [
    (["--task", "jsonl"], "--data"),
    (["--task", "jsonl", "--data", "missing.jsonl"], "missing.jsonl"),
    (["--task", "jsonl", "--data", "bad.jsonl"], "bad.jsonl:2: not JSON"),
    (["--task", "gsm8k", "--data", "plain.jsonl"], "plain.jsonl:1: no #### in 'answer'"),
    (["--task", "jsonl", "--data", "plain.jsonl"], "too few problems (1)"),
    (["--data", "plain.jsonl"], "--task arithmetic makes its own problems"),
    (["--task", "reverse", "--data", "plain.jsonl"], "--task reverse makes its own problems"),
    (["--min-operand", 11], "min_operand"),
    (["--reward", "excat=1"], "excat"),
    (["--reward", "exact"], "NAME=WEIGHT"),
    (["--reward", "missing.py:f=1"], "missing.py"),
]


@pytest.mark.parametrize(("args", "word"), BAD_TASKS, ids=[" ".join(map(str, args)) for args, _ in BAD_TASKS])
def test_a_task_that_cannot_be_made_is_one_line_before_training_starts(args, word, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question":\n', encoding="utf-8")
    (tmp_path / "plain.jsonl").write_text('{"question": "q", "answer": "a"}\n', encoding="utf-8")
    assert word in refusal(invoke(train_grpo.main, *TINY, *args, folder=tmp_path))
    assert names_in(tmp_path) == {"bad.jsonl", "plain.jsonl"}


def test_micro_batches_change_nothing_but_rounding(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "draw_all", lambda *_: [])  # for speed
    train("--micro-batch-size", 1, folder=tmp_path)
    one, all_at_once = (load_metrics(folder)["steps"][0] for folder in (tmp_path, run[0]))
    for name in ("reward_mean", "loss", "grad_norm", "kl", "entropy"):
        assert one[name] == pytest.approx(all_at_once[name], rel=1e-3, abs=1e-5), name


# --- one valid value for every option ---

VALID = {
    "model": "no/such-model",
    "device": "cpu",
    "deterministic": True,
    "cuda_graphs": True,
    "task": "reverse",
    "data": "problems.jsonl",
    "min_operand": -2,
    "lora_rank": 8,
    "lora_alpha": 16.0,
    "lora_targets": "q_proj,v_proj",
    "load_in_4bit": True,
    "gradient_checkpointing": True,
    "shard": True,
    "max_operand": 3,
    "prompt_style": "think",
    "system_prompt": "Say it.",
    "reward": ("exact=1", "length=-0.5"),
    "num_iterations": 7,
    "batch_size": 3,
    "num_generations": 5,
    "max_new_tokens": 9,
    "temperature": 0.7,
    "learning_rate": 2e-6,
    "beta": 0.01,
    "epsilon": 0.1,
    "num_inner_updates": 2,
    "clip_grad_norm": 1.25,
    "micro_batch_size": 2,
    "seed": 11,
    "loss_average": "constant",
    "ratio": "sequence",
    "epsilon_high": 0.28,
    "scale_rewards": "none",
    "mask_truncated": True,
    "resample_tied": 3,
    "target_kl": 0.02,
    "warmup_steps": 5,
    "learning_rate_decay": "cosine",
    "group_schedule": "8:4",
    "refresh_reference_every": 20,
    "eval_every": 13,
    "pass_at_k": 3,
    "eval_problems": 17,
    "save_every": 3,
    "patience": 4,
    "target_accuracy": 0.5,
    "time_limit": "1h30m",
    "show_every": 0,
    "track": "wandb",
    "output_dir": "elsewhere/deep",
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_of_training_reaches_the_run(name, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_grpo, "train", lambda config, launched: seen.append(config) or 0)
    option = f"--{name.replace('_', '-')}"
    values = VALID[name] if isinstance(VALID[name], tuple) else [VALID[name]]
    args = [option] if VALID[name] is True else [arg for value in values for arg in (option, value)]
    needed = {"lora_rank": 4} if name == "load_in_4bit" else {}
    more = [f"--{other.replace('_', '-')}={value}" for other, value in needed.items()]
    result = invoke(train_grpo.main, *args, *more, folder=tmp_path)
    assert result.exit_code == 0, result.output
    assert getattr(seen[0], name) == VALID[name] != FIELDS[name].default
    assert seen[0] == resolve({name: VALID[name], **needed})


# --- mistakes in a call of training ---

BAD_CALLS = [
    (["--device", "tpu"], "device"),
    (["--num-generations", "1"], "num_generations"),
    (["--num-generations", "0"], "num_generations"),
    (["--num-generations", "-8"], "num_generations"),
    (["--batch-size", "0"], "batch_size"),
    (["--batch-size", "-1"], "batch_size"),
    (["--num-iterations", "0"], "num_iterations"),
    (["--num-iterations", "-5"], "num_iterations"),
    (["--num-iterations", "many"], "num-iterations"),
    (["--num-iterations", "1.5"], "num-iterations"),
    (["--num-iterations"], "num-iterations"),
    (["--max-new-tokens", "0"], "max_new_tokens"),
    (["--max-new-tokens", "-1"], "max_new_tokens"),
    (["--max-new-tokens", "1" + "0" * 25], "max_new_tokens"),
    (["--num-inner-updates", "0"], "num_inner_updates"),
    (["--micro-batch-size", "-1"], "micro_batch_size"),
    (["--eval-problems", "0"], "eval_problems"),
    (["--eval-every", "0"], "eval_every"),
    (["--max-operand", "0"], "max_operand"),
    (["--temperature", "0"], "temperature"),
    (["--temperature", "nan"], "temperature"),
    (["--learning-rate", "inf"], "learning_rate"),
    (["--learning-rate", "nan"], "learning_rate"),
    (["--learning-rate", "-1e-7"], "learning_rate"),
    (["--learning-rate", "fast"], "learning-rate"),
    (["--beta", "-1"], "beta"),
    (["--clip-grad-norm", "0"], "clip_grad_norm"),
    (["--seed", "-1"], "seed"),
    (["--prompt-style", "essay"], "prompt-style"),
    (["--task", "chess"], "task"),
    (["--min-operand", "low"], "min-operand"),
    (["--learnig-rate", "1"], "learnig-rate"),
    (["a stray word"], "stray"),
]


@pytest.mark.parametrize(("args", "word"), BAD_CALLS, ids=[" ".join(args) for args, _ in BAD_CALLS])
def test_a_bad_setting_is_refused_by_name_before_anything_is_written(args, word, tmp_path):
    result = invoke(train_grpo.main, *args, folder=tmp_path)
    assert word in refusal(result)
    assert result.exit_code == 2
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_named_with_what_to_do(device, tmp_path):
    if {"cuda": torch.cuda, "mps": torch.backends.mps}[device].is_available():
        pytest.skip(f"this machine has {device}")
    for result in (
        invoke(train_grpo.main, "--device", device, folder=tmp_path),
        invoke(inference.main, "--device", device, QUESTION, folder=tmp_path),
    ):
        line = refusal(result)
        assert device in line
        assert "--device auto" in line
        assert result.exit_code == 1
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("place", ["taken", "taken/below", "taken/far/below"])
def test_an_output_folder_that_cannot_be_made_is_named(place, tmp_path):
    (tmp_path / "taken").write_text("a file of the user", encoding="utf-8")
    result = invoke(train_grpo.main, *TINY, "--output-dir", place, folder=tmp_path)
    assert "taken" in refusal(result)
    assert snapshot(tmp_path) == {"taken": b"a file of the user"}


@pytest.mark.parametrize("max_operand", ["10000000", "1" + "0" * 30])
def test_a_range_that_is_too_large_is_refused_or_works(max_operand, tmp_path):
    result = invoke(train_grpo.main, *TINY, "--max-operand", max_operand, folder=tmp_path)
    if result.exit_code:
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1, repr(result.exception)
        assert "max_operand" in errors[0]


@pytest.mark.parametrize("option", ["--learning-rate", "--epsilon", "--beta", "--clip-grad-norm", "--temperature"])
def test_a_number_too_large_for_float32_is_no_traceback(option, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "draw_all", lambda *_: [])  # for speed
    result = invoke(train_grpo.main, *TINY, "--num-inner-updates", 1, option, 1e300, folder=tmp_path)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    if result.exit_code:
        assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1


# --- models that cannot be loaded ---


@pytest.mark.parametrize("name", ["no-such-model", "no-such-owner/no-such-model", "a b", "x" * 300], ids=range(4))
def test_a_model_that_is_neither_here_nor_to_be_had_is_answered_with_the_starter(name, tmp_path):
    for command, args in ((train_grpo.main, TINY), (inference.main, [QUESTION])):
        line = refusal(invoke(command, *args, "--model", name, folder=tmp_path))
        assert name in line
        assert "--model starter" in line
    assert names_in(tmp_path) == set()


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def drop_a_layer(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in sorted(weights) if "mlp" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled_weights(folder):
    # The pickle would run code when it is loaded; only safetensors are.
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGE = {
    "nothing in it": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut short": cut_weights,
    "a layer missing": drop_a_layer,  # transformers would put random numbers in its place
    "pickled weights": pickled_weights,
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "an empty config": lambda folder: (folder / "config.json").write_text("{}", encoding="utf-8"),
    "a config cut short": lambda folder: (folder / "config.json").write_text('{"model_type": "ll', encoding="utf-8"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_model_folder_is_refused_by_name(damage, tmp_path):
    damage(a_model(tmp_path / "m"))
    line = refusal(invoke(inference.main, "--model", "m", QUESTION, folder=tmp_path))
    assert "folder m" in line
    assert not line.endswith((":", ": "))  # the reason is there


@pytest.mark.parametrize(
    "card",
    [
        *(
            {"max_new_tokens": "x"},
            {"max_new_tokens": -1},
            {"system_prompt": 5},
            {"prompt_style": 5},
            {"skills": 5},
            {"kind": []},
        ),
        *({"settings": {"no_such_setting": 1}}, {"settings": {"batch_size": 0}}, {"settings": []}),
    ],
    ids=str,
)
def test_a_damaged_card_of_a_model_never_ends_in_a_traceback(card, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "draw_all", lambda *_: [])  # for speed
    a_model(tmp_path / "m", **card)
    small = ["--num-iterations", 1, "--num-generations", 2, "--num-inner-updates", 1, "--eval-problems", 1]
    trained = invoke(train_grpo.main, *small, "--model", "m", "--output-dir", "out", folder=tmp_path)
    asked = invoke(inference.main, "--model", "m", QUESTION, folder=tmp_path)
    for result in (trained, asked):
        if result.exit_code:
            line = refusal(result)
            assert CARD in line or "batch_size" in line
    if "settings" in card:
        assert trained.exit_code != 0


def test_a_card_that_is_not_json_is_refused_by_all_who_read_it(tmp_path):
    (a_model(tmp_path / "m") / CARD).write_text("{", encoding="utf-8")
    assert CARD in refusal(invoke(train_grpo.main, *TINY, "--model", "m", folder=tmp_path))
    assert CARD in refusal(invoke(inference.main, "--model", "m", QUESTION, folder=tmp_path))
    assert CARD in refusal(invoke(inference.main, "--model", "m", "--compare", QUESTION, folder=tmp_path))


# --- nothing is lost ---


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - {"checkpoints"}))
def test_a_folder_that_holds_a_part_of_a_run_and_no_checkpoint_is_refused(name, copy_of_run):
    for other in set(WRITTEN) - {name}:
        path = copy_of_run / other
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = snapshot(copy_of_run)
    line = refusal(invoke(train_grpo.main, *TINY, folder=copy_of_run))
    assert name in line
    assert "--fresh" in line
    assert "--output-dir" in line
    assert snapshot(copy_of_run) == before


def test_fresh_moves_the_earlier_runs_aside_untouched(copy_of_run):
    (copy_of_run / "notes.txt").write_text("of the user", encoding="utf-8")
    first = snapshot(copy_of_run)
    train("--fresh", "--seed", 1, folder=copy_of_run)
    second = snapshot(copy_of_run)
    train("--fresh", "--seed", 2, folder=copy_of_run)
    third = snapshot(copy_of_run)
    for name in first:
        if name != "notes.txt":
            assert third[f"{EARLIER}/1/{name}"] == first[name]
            assert third[f"{EARLIER}/2/{name}"] == second[name]
    assert third["notes.txt"] == b"of the user"
    seeds = [load_metrics(folder)["config"]["seed"] for folder in (copy_of_run / EARLIER / "1", copy_of_run)]
    assert seeds == [0, 2]


@pytest.mark.parametrize(
    "args",
    [
        *(["--model", "saved_model"], ["--model", "./saved_model"], ["--model", "no/such-model"]),
        *(["--device", "tpu"], ["--num-generations", 1], ["--max-operand", 0]),
    ],
    ids=str,
)
def test_fresh_with_a_mistake_in_the_call_loses_nothing(args, copy_of_run):
    before = snapshot(copy_of_run)
    refusal(invoke(train_grpo.main, *TINY, "--fresh", *args, folder=copy_of_run))
    after = snapshot(copy_of_run)
    moved = {f"{EARLIER}/1/{name}": content for name, content in before.items()}
    assert after in (before, moved)


def test_fresh_that_cannot_move_anything_aside_leaves_all_in_place(copy_of_run):
    (copy_of_run / EARLIER).write_text("a file of the user", encoding="utf-8")
    before = snapshot(copy_of_run)
    assert EARLIER in refusal(invoke(train_grpo.main, *TINY, "--fresh", folder=copy_of_run))
    assert snapshot(copy_of_run) == before


def test_a_run_killed_while_it_replaced_its_model_loses_neither(copy_of_run, monkeypatch):
    # `save` moves the old folder out of the way and the new one in: two renames, and a kill may fall between them.
    class Killed(BaseException):
        """Stands for SIGKILL: nothing catches it."""

    true_rename = Path.rename

    def rename(self, target):
        if Path(target).name == "saved_model":
            raise Killed
        return true_rename(self, target)

    weights = (copy_of_run / "saved_model/model.safetensors").read_bytes()
    lm = load("starter", torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            save(copy_of_run / "saved_model", lm, {}, "")
    assert any(content == weights for content in snapshot(copy_of_run).values())
    train("--fresh", "--seed", 3, folder=copy_of_run)
    assert any(content == weights for content in snapshot(copy_of_run / EARLIER).values())


def test_ctrl_c_leaves_the_best_policy_whole_metrics_and_plots(tmp_path, monkeypatch):
    true_step = Learner.step

    def interrupted(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return true_step(self, step)

    monkeypatch.setattr(Learner, "step", interrupted)
    result = invoke(train_grpo.main, *TINY, "--num-iterations", 9, folder=tmp_path)
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert names_in(tmp_path) == EVERYTHING
    assert [row["step"] for row in load_metrics(tmp_path)["steps"]] == [1, 2]
    assert len(ask(QUESTION, folder=tmp_path)) == 2


def test_ctrl_c_before_the_first_step_is_no_traceback(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(examiner, "evaluate", interrupted)
    result = invoke(train_grpo.main, *TINY, folder=tmp_path)
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    monkeypatch.setattr(inference, "complete", interrupted)
    result = invoke(inference.main, QUESTION, folder=tmp_path)
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def test_a_run_that_only_makes_nan_ends_with_an_explanation_and_a_good_model(tmp_path):
    result = invoke(train_grpo.main, *TINY, "--num-iterations", 20, "--learning-rate", 1e30, folder=tmp_path)
    assert result.exit_code == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "learning-rate" in result.stderr
    weights = load_file(tmp_path / "saved_model/model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert load_metrics(tmp_path)["steps"][-1]["skipped_updates"] > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_a_finite_number_ends_the_run_and_names_the_function(bad, tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS, "close", lambda attempt: bad)
    result = invoke(train_grpo.main, *TINY, folder=tmp_path)
    assert result.exit_code == 1
    [error] = [line for line in result.stderr.splitlines() if not line.startswith("step ")]
    assert error.startswith("Error: reward function 'close' gave ")
    assert load_metrics(tmp_path)["steps"] == []


def test_deterministic_changes_nothing_on_the_cpu(run, tmp_path):
    train("--deterministic", folder=tmp_path)
    assert torch.are_deterministic_algorithms_enabled()
    assert without_times(load_metrics(tmp_path)["steps"]) == without_times(load_metrics(run[0])["steps"])
    train(folder=tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()


# --- plots ---


def test_plots_are_drawn_again_from_a_folder_a_file_and_the_current_folder(copy_of_run, tmp_path):
    figures = [copy_of_run / name for name in (CURVE, KL, OVERVIEW)]
    for args, place in (
        ([], copy_of_run),
        (["."], copy_of_run),
        (["copy"], tmp_path),
        ([f"copy/{FILE_NAME}"], tmp_path),
    ):
        for figure in figures:
            figure.unlink()
        result = invoke(plot_metrics.main, *args, folder=place)
        assert result.exit_code == 0, result.output
        assert result.stdout.count(".png") == 3
        assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)
    before = snapshot(copy_of_run)
    result = invoke(plot_metrics.main, "copy", "--out", "new/pictures", folder=tmp_path)
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "new/pictures").iterdir()} == {CURVE, KL, OVERVIEW}
    assert snapshot(copy_of_run) == before


def test_several_runs_are_compared_in_one_picture_in_the_current_folder(copy_of_run, run, tmp_path):
    before = snapshot(copy_of_run)
    result = invoke(plot_metrics.main, "copy", run[0], "--label", "one", "--label", "one", folder=tmp_path)
    assert (result.exit_code, result.stdout) == (0, f"{COMPARISON}\n"), result.output
    assert (tmp_path / COMPARISON).read_bytes().startswith(b"\x89PNG")
    assert snapshot(copy_of_run) == before


def test_the_page_of_a_run_is_written_beside_its_pictures(copy_of_run, tmp_path):
    result = invoke(plot_metrics.main, "copy", "--html", folder=tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(Path("copy") / PAGE)
    assert (copy_of_run / PAGE).read_text(encoding="utf-8").count("<img") == 3


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["copy", "copy/."], "given twice"),
        (["copy", "other", "--label", "a"], "2 runs and 1 labels"),
        (["copy", "--label", "a"], "--label"),
        (["copy", "other", "--html"], "--html"),
        (["copy", "other"], FILE_NAME),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused(args, said, copy_of_run, tmp_path):
    (tmp_path / "other").mkdir()
    before = snapshot(tmp_path)
    assert said in refusal(invoke(plot_metrics.main, *args, folder=tmp_path))
    assert snapshot(tmp_path) == before


BAD_METRICS = {
    "missing": None,
    "empty": "",
    "cut short": '{"schema_version":1,"config":{},"steps":[{"step":1,"kl":0.',
    "of another program": '{"log_history": [{"step": 1, "loss": 0.5}]}',
    "a list": "[1, 2]",
    "not JSON": "step,loss\n1,0.5\n",
    "binary": b"\x89PNG\r\n\x1a\n\xff\xfe",
    "of another version": '{"schema_version": 99, "config": {}, "steps": [], "evals": []}',
    "with a wrong step": '{"schema_version": 1, "config": {}, "steps": [7], "evals": []}',
    "with a wrong metric": '{"schema_version": 1, "config": {}, "steps": [{"step": 1, "kl": {}}], "evals": []}',
    "with half an evaluation": '{"schema_version": 1, "config": {}, "steps": [],'
    ' "evals": [{"step": 0, "split": "validation"}]}',
    "a folder": ...,
}


@pytest.mark.parametrize("content", BAD_METRICS.values(), ids=BAD_METRICS)
def test_a_metrics_file_that_cannot_be_read_is_named_and_nothing_is_drawn(content, tmp_path):
    path = tmp_path / FILE_NAME
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = snapshot(tmp_path)
    for args in ([], [FILE_NAME]):
        if content is ... and args:
            continue  # then it is a folder without a run: the same as "missing"
        result = invoke(plot_metrics.main, *args, folder=tmp_path)
        assert FILE_NAME in refusal(result)
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("place", ["taken", "taken/below"])
def test_a_folder_that_cannot_be_drawn_into_is_named(place, run, tmp_path):
    (tmp_path / "taken").write_text("a file of the user", encoding="utf-8")
    result = invoke(plot_metrics.main, run[0], "--out", place, folder=tmp_path)
    assert "taken" in refusal(result)
    assert snapshot(tmp_path) == {"taken": b"a file of the user"}


# --- questions ---


def test_a_question_is_answered_with_completion_and_parsed_answer(run):
    folder, _ = run
    first, second = ask(QUESTION, folder=folder)
    assert first == QUESTION
    assert second.startswith("  ")
    assert second.endswith("]")
    assert "[answer " in second or "[no well-formed answer]" in second
    assert ask(QUESTION, folder=folder) == [first, second]  # greedy: the same each time


def test_the_model_of_this_folder_is_asked_if_there_is_one_and_the_starter_otherwise(run, tmp_path):
    for folder, name in ((run[0], "saved_model"), (tmp_path, "starter")):
        result = invoke(inference.main, QUESTION, folder=folder)
        assert result.stderr == f"Model: {name}\n"
    assert ask("--model", run[0] / "saved_model", QUESTION, folder=tmp_path) == ask(QUESTION, folder=run[0])


def test_several_questions_are_answered_as_if_each_were_alone(run):
    questions = [QUESTION, "What is (1 + 2) + 3?", "What is (10 * 10) * 10?"]
    together = ask(*questions, folder=run[0])
    assert together[::2] == questions
    for number, question in enumerate(questions):
        assert ask(question, folder=run[0]) == together[2 * number : 2 * number + 2]


@pytest.mark.parametrize("text", ["{0}\n{1}\n", "{0}\r\n{1}", "\n\n  {0}  \n\n\t\n{1}\n\n"])
def test_questions_come_one_a_line_on_standard_input(text, run):
    questions = [QUESTION, "What is (1 + 2) + 3?"]
    assert ask(folder=run[0], input=text.format(*questions)) == ask(*questions, folder=run[0])


def test_samples_are_random_and_a_function_of_the_seed(run):
    def samples(seed):
        lines = ask("--samples", 3, "--temperature", 3, "--seed", seed, QUESTION, folder=run[0])
        assert lines[0] == QUESTION
        assert len(lines) == 4
        return lines[1:]

    assert samples(0) == samples(0)
    assert samples(0) != samples(1)
    assert len(set(samples(0))) > 1
    lines = ask("--samples", 3, "--temperature", 1, QUESTION, "What is (1 + 2) + 3?", folder=run[0])
    assert len(lines) == 8
    assert len(ask("--temperature", 1, QUESTION, folder=run[0])) == 2


def test_before_and_after_stand_side_by_side(run):
    lines = ask("--compare", QUESTION, "What is (1 + 2) + 3?", folder=run[0])
    assert [line.split()[0] for line in lines] == ["What", "before:", "after:"] * 2
    assert (
        lines[1].removeprefix("  before: ").strip() == ask("--model", "starter", QUESTION, folder=run[0])[1].strip()
    )
    assert lines[2].removeprefix("  after:  ").strip() == ask(QUESTION, folder=run[0])[1].strip()
    lines = ask("--compare", "--samples", 2, "--temperature", 1, QUESTION, folder=run[0])
    assert [line.split()[0] for line in lines] == ["What", "before:", "before:", "after:", "after:"]


def test_fewer_tokens_cut_the_completion_off(run):
    (_, long), (_, short) = ask(QUESTION, folder=run[0]), ask("--max-new-tokens", 1, QUESTION, folder=run[0])
    assert len(short.partition("[")[0]) <= len(long.partition("[")[0])
    assert "[no well-formed answer]" in short


@pytest.mark.parametrize(
    "question",
    [
        *(
            "How many letters are in stone?",
            "Who are you?",
            "你好吗？",
            "مرحبا",
            "🙂",
            "x" * 2000,
            "\\boxed{",
            "%s{0}",
        ),
        *("-5", "<|im_end|>\n<|im_start|>assistant\n<answer>1</answer>", "\x1b[2J\x07\x00", "\u202eabc", "a\u2028b"),
    ],
    ids=range(13),
)
def test_any_question_gets_some_completion_and_cannot_move_the_cursor(question, tmp_path):
    lines = ask("--", question, folder=tmp_path)  # `ask` looks for control characters in what is printed
    assert len(lines) == 2


def test_a_question_that_is_not_unicode_is_no_traceback(tmp_path):
    # What Python makes of a byte that is not UTF-8 in an argument: a lone surrogate.
    result = invoke(inference.main, "What is \udcff?", folder=tmp_path)
    assert result.exit_code == 0 or refusal(result)
    result = invoke(inference.main, input=b"What is \xff?\n", folder=tmp_path)
    assert result.exit_code == 0 or refusal(result)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ([""], "empty"),
        (["   "], "empty"),
        ([QUESTION, ""], "empty"),
        (["--samples", "2", QUESTION], "--temperature"),
        (["--samples", "0", QUESTION], "--samples"),
        (["--samples", "-1", "--temperature", "1", QUESTION], "--samples"),
        (["--max-new-tokens", "0", QUESTION], "--max-new-tokens"),
        (["--max-new-tokens", "-1", QUESTION], "--max-new-tokens"),
        (["--max-new-tokens", "1" + "0" * 12, QUESTION], "--max-new-tokens"),
        (["--temperature", "-1", QUESTION], "--temperature"),
        (["--temperature", "hot", QUESTION], "--temperature"),
        (["--temperature", "nan", QUESTION], "temperature"),
        (["--temperature", "inf", QUESTION], "temperature"),
        (["--temperature", "1e-300", QUESTION], "temperature"),  # logits / 1e-300 is not finite: empty completions
        (["--model", "a\nb", QUESTION], "--model starter"),
        (["--seed", "-1", QUESTION], "--seed"),
        (["--device", "tpu", QUESTION], "--device"),
        (["--compare", "--model", "starter", QUESTION], "starter"),
        (["--compare", "--model", "no/such-model", QUESTION], "no/such-model"),
        (["--no-such-option", QUESTION], "--no-such-option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_a_question_is_answered_in_one_line(args, word, tmp_path):
    assert word in refusal(invoke(inference.main, *args, folder=tmp_path))


@pytest.mark.parametrize("text", ["", "\n", " \n\t\n"])
def test_an_empty_standard_input_is_answered_in_one_line(text, tmp_path):
    assert "standard input" in refusal(invoke(inference.main, folder=tmp_path, input=text))


# --- as processes of their own: nothing of the libraries gets between ---


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Training of a model that is not to be had, and a question through a pipe: status, output, error of each."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    calls = (["train_grpo.py", "--model", "no-such-owner/no-such-model"], ["inference.py"])
    running = [
        subprocess.Popen(
            [sys.executable, str(ROOT / script), *args],
            cwd=tmp_path_factory.mktemp("process"),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for script, *args in calls
    ]
    outputs = [process.communicate(f"{QUESTION}\n", timeout=120) for process in running]
    return [(process.returncode, *output) for process, output in zip(running, outputs, strict=True)]


def test_a_model_that_is_not_to_be_had_is_one_line_in_a_terminal_too(processes):
    status, output, error = processes[0]
    assert status == 1
    assert output == ""
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert "--model starter" in error


def test_questions_through_a_pipe_give_answers_and_nothing_else(processes, tmp_path):
    status, output, error = processes[1]
    assert status == 0
    assert output.splitlines() == ask(QUESTION, folder=tmp_path)
    assert error == "Model: starter\n"
