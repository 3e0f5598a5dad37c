"""Test a run from training to inference: files, output, determinism, and a run that starts from its model."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo import trainer
from grpo.evaluation.evaluator import Evaluator
from grpo.generation.greedy import greedy
from grpo.launch.run_folder import WRITTEN
from grpo.model.loading import load
from grpo.model_card import CARD, STARTER, resolve
from grpo.plots.figures import CURVE, KL, OVERVIEW
from grpo.record.metrics import FILE_NAME, load_metrics
from grpo.record.samples import FILE_NAME as SAMPLES
from tests.helpers.scripts import (
    EVERYTHING,
    FIELDS,
    QUESTION,
    ask,
    names_in,
    snapshot,
    train,
    without_times,
)


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


def test_the_lines_for_transformers_in_the_saved_readme_answer_as_inference_does(run, tmp_path, capsys, monkeypatch):
    folder, _ = run
    text = (folder / "saved_model/README.md").read_text(encoding="utf-8")
    request = json.loads(text.split("```json\n")[1].split("```")[0])
    assert request["temperature"] == 0
    assert "PARAMETER repeat_penalty 1\\n" in text
    copy = shutil.copytree(folder / "saved_model", tmp_path / "copy")
    (copy / "request.json").write_text(json.dumps(request), encoding="utf-8")
    monkeypatch.chdir(copy)
    capsys.readouterr()
    exec(text.split("```python\n")[1].split("```")[0], {})
    lm = load(str(folder / "saved_model"), torch.device("cpu"))
    [answer] = lm.decode(greedy(lm, lm.prompts([request["messages"]]), request["max_tokens"]).rows(with_end=False))
    assert capsys.readouterr().out.strip() == answer.strip()


def test_a_run_says_what_it_did_on_standard_output_and_progress_on_standard_error(run):
    _, result = run
    settings = result.stdout.split("Settings:")[1].split("\n\n")[0].split()
    mine = {"num_iterations": 2, "batch_size": 2, "num_generations": 2, "eval_problems": 8}
    expected = {name: value for name, value in resolve(mine).to_dict().items() if value not in ("", [])}
    of_interest = {name for name in expected if FIELDS[name].metadata["group"] in ("Task", "Algorithm")}
    of_interest |= {name for name in expected if expected[name] != FIELDS[name].default} - {"model", "output_dir"}
    of_interest -= {"numbers", "largest_number"}  # options of another task
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
    true_evaluate = Evaluator.evaluate

    class Rising:
        def __init__(self, result):
            self.result = result

        def to_dict(self):
            return {**self.result.to_dict(), "accuracy": next(rising) / 100}

    monkeypatch.setattr(Evaluator, "evaluate", lambda *args: Rising(true_evaluate(*args)))
    monkeypatch.setattr(trainer, "draw_all", lambda *_: [])  # drawing would take time
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
    assert (
        Path(card["base_model"]) == (folder / "saved_model").resolve()
    )  # the path is absolute, so valid in any folder
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
    assert names_in(tmp_path) == EVERYTHING - ({KL} if "--beta" in more else set())  # without a reference
    if "--beta" in more:
        assert all(row["kl"] in (0, None) for row in load_metrics(tmp_path)["steps"])
