"""Test every task, style and reward in a tiny run, and micro-batches."""

import json
from hashlib import sha256

import pytest

import inference
import train_grpo
from grpo.model_card import CARD, resolve
from grpo.record.metrics import load_metrics
from tasks.registry import make_task
from tasks.rewards.functions import DEMO
from tests.helpers.data import example_task
from tests.helpers.scripts import (
    TINY,
    ask,
    invoke,
    names_in,
    refusal,
    snapshot,
    train,
)


def sums_file(path, n=120):
    """Write a JSON Lines file in the format of GSM8K, which is also one of questions and answers."""
    rows = [{"question": f"What is ({i} + {i % 7}) - 3?", "answer": f"so\n#### {i + i % 7 - 3}"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


MINE = """
def shows_work(prompts, completions, answer, **columns):
    assert len(prompts) == len(answer) == len(columns["completion_ids"])
    return [float("=" in completion[0]["content"]) for completion in completions]

def never(completions, **columns):
    return [None] * len(completions)
"""
RISING = """
calls = []

def rising(completions, **columns):
    assert len(columns["completion_ids"]) == len(completions)
    calls.append(1)
    return [len(calls) + i / 100 for i, _ in enumerate(completions)]
"""


@pytest.fixture
def tiny(model):
    """Return the options of a model that needs a third of the starter's time, where its answers do not matter."""
    return ["--model", model, "--max-new-tokens", 8]


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        (["--task", "reverse"], "text"),
        (["--task", "jsonl", "--data", "sums.jsonl"], "text"),
        (["--task", "gsm8k", "--data", "sums.jsonl"], "integer"),
        (["--prompt-style", "reasoning", "--max-new-tokens", 40], "integer"),
        (
            ["--min-operand", -4, "--system-prompt", "Give the result as an integer in <answer>...</answer>."],
            "integer",
        ),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, list) else value,
)
def test_every_task_and_style_trains_saves_and_answers(args, kind, tmp_path):
    sums_file(tmp_path / "sums.jsonl")
    result = train("--num-inner-updates", 1, *args, folder=tmp_path)
    record = load_metrics(tmp_path)
    assert {f"reward/{name}" for name in DEMO if "reasoning" in args} <= set(record["steps"][0])
    card = json.loads((tmp_path / "saved_model" / CARD).read_text(encoding="utf-8"))
    assert (card["task"], card["kind"]) == (record["config"]["task"], kind)
    assert card["system_prompt"] == record["config"]["system_prompt"] or "<answer>" in card["system_prompt"]
    assert "data" not in card["settings"]
    said = " ".join(result.stdout.split())  # paragraphs are wrapped
    if "reverse" in args:
        assert said.count("Too hard for this model") == 1
    assert ("tokens hide the letters" in said) == ("reverse" in args)
    assert len(ask("Spell batori backwards.", folder=tmp_path)) == 2


def test_given_rewards_and_a_users_file_are_what_is_trained_and_measured(tiny, tmp_path):
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    rewards = [*tiny, "--reward", "exact=1", "--reward", "mine.py:shows_work=0.5", "--reward", "mine.py:never=1"]
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


def test_a_run_does_not_continue_with_changed_data(tiny, tmp_path):
    args = [*tiny, "--task", "gsm8k", "--data", "sums.jsonl", "--num-inner-updates", 1]
    sums_file(tmp_path / "sums.jsonl")
    train(*args, folder=tmp_path)
    sums_file(tmp_path / "sums.jsonl", 121)
    result = invoke(train_grpo.main, *TINY, *args, "--num-iterations", 3, folder=tmp_path)
    assert result.exit_code == 1
    assert "sums.jsonl changed" in result.stderr


def test_a_run_on_csv_files_of_ones_own_does_not_continue_with_a_changed_one(tiny, tmp_path):
    sums_file(tmp_path / "sums.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, part in (("train.csv", rows[:90]), ("test.csv", rows[90:])):
        lines = ["problem,level,result", *(f'"{row["question"]}",1,{row["answer"][8:]}' for row in part)]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    args = ["--task", "jsonl", "--data", "train.csv", "--test-data", "test.csv", "--num-inner-updates", 1]
    args += [*tiny, "--columns", "question=problem,answer=result"]
    train(*args, folder=tmp_path)
    config = load_metrics(tmp_path)["config"]
    assert (config["data"], config["test_data"]) == ("train.csv", "test.csv")
    settings = json.loads((tmp_path / "saved_model" / CARD).read_text(encoding="utf-8"))["settings"]
    assert not {"data", "test_data", "columns"} & set(settings)  # a downloaded model must not name a file
    text = (tmp_path / "test.csv").read_text(encoding="utf-8")
    (tmp_path / "test.csv").write_text(text + "\n", encoding="utf-8")
    result = invoke(train_grpo.main, *TINY, *args, "--num-iterations", 3, folder=tmp_path)
    assert result.exit_code == 1
    assert "test.csv changed" in result.stderr
    result = invoke(train_grpo.main, *TINY, *args, "--columns", "question=problem,answer=level", folder=tmp_path)
    assert result.exit_code == 1
    assert "--columns" in result.stderr


def test_a_judge_of_ones_own_decides_accuracy_and_may_not_change(tmp_path):
    sums_file(tmp_path / "sums.jsonl")
    # right is what ends like the answer of the file: "so\n#### 12" is a text, and 12 alone does not equal it
    judge = "def ends_alike(given, answer, **columns):\n    return answer.split()[-1] == given.split()[-1]\n"
    (tmp_path / "judge.py").write_text(judge, encoding="utf-8")
    args = ["--task", "jsonl", "--data", "sums.jsonl", "--num-inner-updates", 1]
    train(*args, folder=tmp_path)
    without = load_metrics(tmp_path)["evals"][0]
    train(*args, "--correct", "judge.py:ends_alike", "--output-dir", "judged", folder=tmp_path)
    judged = load_metrics(tmp_path / "judged")["evals"][0]
    assert (without["split"], judged["split"]) == ("test", "test")
    assert without["accuracy"] == 0
    assert judged["accuracy"] > 0
    card = json.loads((tmp_path / "judged/saved_model" / CARD).read_text(encoding="utf-8"))
    assert "correct" not in card["settings"]  # a downloaded model must not make anybody run a file
    (tmp_path / "judge.py").write_text(judge + "# another\n", encoding="utf-8")
    again = [*args, "--correct", "judge.py:ends_alike", "--output-dir", "judged", "--num-iterations", 3]
    result = invoke(train_grpo.main, *TINY, *again, folder=tmp_path)
    assert result.exit_code == 1
    assert "judge.py changed" in result.stderr


def test_a_task_in_a_file_trains_and_a_model_cannot_name_it(tmp_path):
    example = example_task()
    (tmp_path / "multiples.py").write_text(example, encoding="utf-8")
    own = ["--task", "multiples.py:Multiples", "--task-arg", "largest=3"]
    result = train(*own, "--reward", "exact=1", folder=tmp_path)
    assert "task=multiples.py:Multiples task_arg=largest=3" in " ".join(result.output.split())
    assert load_metrics(tmp_path)["config"]["task_arg"] == ["largest=3"]
    evaluated = invoke(inference.main, "--evaluate", *own, folder=tmp_path)
    assert evaluated.exit_code == 0
    assert "multiples, test problems" in evaluated.output
    assert "answer" in invoke(inference.main, "Name a multiple of 2 above 5.", folder=tmp_path).output
    line = refusal(invoke(inference.main, "--evaluate", folder=tmp_path))
    assert "'multiples.py:Multiples', a task in a file. A card must not name files; give --task" in line
    (tmp_path / "multiples.py").write_text(example + "# another\n", encoding="utf-8")
    again = invoke(train_grpo.main, *TINY, *own, "--reward", "exact=1", "--num-iterations", 3, folder=tmp_path)
    assert again.exit_code == 1
    assert "multiples.py changed" in again.stderr


def test_rewards_of_ones_own_choose_the_best_policy_where_nobody_judges(tiny, tmp_path):
    rows = [{"question": f"Say something about {i}.", "answer": "anything"} for i in range(120)]
    (tmp_path / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "mine.py").write_text(RISING, encoding="utf-8")
    args = ["--task", "jsonl", "--data", "open.jsonl", "--reward", "mine.py:rising=0.5", "--eval-every", 1]
    args += tiny
    result = train(*args, folder=tmp_path)
    assert "The policy with the highest mean reward on validation problems is saved" in result.output
    record = load_metrics(tmp_path)
    rewards = [e["reward"] for e in record["evals"] if e["split"] == "validation"]
    assert rewards == sorted(set(rewards))  # it rises with each call, so the last policy is the best
    assert [e["accuracy"] for e in record["evals"]] == [0.0] * len(record["evals"])
    best = json.loads((tmp_path / "saved_model" / CARD).read_text(encoding="utf-8"))
    assert best["step"] == record["steps"][-1]["step"] > 0
    assert f"mean reward {rewards[-1]:.3f}" in (tmp_path / "saved_model/README.md").read_text(encoding="utf-8")
    # With a built-in reward among them, the mean reward chooses until an answer is right.
    result = train(*args, "--reward", "format=0.1", "--output-dir", "mixed", folder=tmp_path)
    assert "Until an answer to a validation problem is right" in result.output
    best = json.loads((tmp_path / "mixed/saved_model" / CARD).read_text(encoding="utf-8"))
    assert best["step"] == 2
    # With a judge, accuracy chooses.
    (tmp_path / "judge.py").write_text("def ok(given, **columns):\n    return True\n", encoding="utf-8")
    result = train(*args, "--correct", "judge.py:ok", "--output-dir", "judged", folder=tmp_path)
    assert "the highest mean reward" not in result.output
    assert "reward" not in load_metrics(tmp_path / "judged")["evals"][1]


def test_a_users_function_that_raises_ends_the_run_in_one_line(tmp_path):
    (tmp_path / "mine.py").write_text("def f(completions, **columns):\n    return [1 / 0]\n", encoding="utf-8")
    result = invoke(train_grpo.main, *TINY, "--reward", "mine.py:f=1", folder=tmp_path)
    assert result.exit_code == 1
    [error] = [line for line in result.stderr.splitlines() if not line.startswith("step ")]
    assert error == "Error: reward function 'f' raised ZeroDivisionError: division by zero (mine.py:2)"


RARE = """
calls = []

def rare(completions, question, **columns):
    calls.append(1)
    return [1 / (asked != QUESTION) * len(c[0]["content"]) for c, asked in zip(completions, question)]

def breaks(completions, **columns):  # after its trial, and after the outlook with the file loaded again
    calls.append(1)
    return [len(c[0]["content"]) / (len(calls) <= 1) for c in completions]
"""


def test_a_rare_mistake_of_a_reward_does_not_end_the_run(tmp_path):
    question = make_task(resolve({})).training_problem(0, 1, 0).question
    (tmp_path / "mine.py").write_text(RARE.replace("QUESTION", repr(question)), encoding="utf-8")
    result = train("--reward", "mine.py:rare=1", "--reward", "exact=1", folder=tmp_path)
    steps = load_metrics(tmp_path)["steps"]
    assert [row["reward_errors"] for row in steps] == [2, 0]  # one of two groups of step 1
    said = " ".join(result.stdout.split())
    assert "reward function 'rare' raised ZeroDivisionError: division by zero (mine.py:6)" in said
    assert "2 of 4 completions have no reward" in said


def test_a_mistake_that_became_frequent_ends_the_run_and_a_mended_file_continues_it(tiny, tmp_path):
    (tmp_path / "mine.py").write_text(RARE, encoding="utf-8")
    arguments = [*tiny, "--reward", "mine.py:breaks=1", "--num-iterations", 4]
    result = invoke(train_grpo.main, *TINY, *arguments, folder=tmp_path)
    assert result.exit_code == 1
    [error] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert "ZeroDivisionError: division by zero (mine.py:10)" in error
    assert "--accept-changed-files" in error
    assert [row["reward_mean"] for row in load_metrics(tmp_path)["steps"]] == [None, None]
    (tmp_path / "mine.py").write_text(RARE.replace("/ (len(calls) <= 1)", ""), encoding="utf-8")
    result = invoke(train_grpo.main, *TINY, *arguments, folder=tmp_path)
    assert "mine.py changed" in result.stderr
    assert "--accept-changed-files" in result.stderr
    train(*arguments, "--accept-changed-files", folder=tmp_path)
    record = load_metrics(tmp_path)
    assert len(record["steps"]) == 4
    [change] = record["changed_files"]
    assert change == {"step": 2, "files": {"mine.py": sha256((tmp_path / "mine.py").read_bytes()).hexdigest()}}
    train(*arguments, "--num-iterations", 5, folder=tmp_path)  # the checkpoints have the new content
    assert len(load_metrics(tmp_path)["changed_files"]) == 1


BAD_TASKS = [
    (["--task", "jsonl"], "--data"),
    (["--task", "jsonl", "--data", "missing.jsonl"], "missing.jsonl"),
    (["--task", "jsonl", "--data", "bad.jsonl"], "bad.jsonl:2: not JSON"),
    (["--task", "gsm8k", "--data", "plain.jsonl"], "plain.jsonl:1: no #### in 'answer'"),
    (["--task", "jsonl", "--data", "plain.jsonl"], "too few problems (1)"),
    (["--data", "plain.jsonl"], "--task arithmetic does not use --data"),
    (["--task", "reverse", "--data", "plain.jsonl"], "does not use --data, which is for --task gsm8k and jsonl"),
    (["--min-operand", 11], "--min-operand"),
    (["--task", "sums"], "--task is 'sums'; it must be one of"),
    (["--task", "missing.py:Sums"], "cannot read the rewards, judge or task in 'missing.py': No such file"),
    (["--task-arg", "largest=3"], "--task-arg needs one --task FILE.py:NAME"),
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


def test_micro_batches_change_nothing_but_rounding(run, tmp_path):
    train("--micro-batch-size", 1, folder=tmp_path)
    one, all_at_once = (load_metrics(folder)["steps"][0] for folder in (tmp_path, run[0]))
    for name in ("reward_mean", "loss", "grad_norm", "kl", "entropy"):
        assert one[name] == pytest.approx(all_at_once[name], rel=1e-3, abs=1e-5), name
