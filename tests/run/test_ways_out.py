"""Test what a run does that has hardly a learning signal: it names the settings that give one, and stops."""

import shlex

import pytest
from click.testing import CliRunner

import train_grpo
from grpo.launch import outlook as module
from grpo.launch.outlook import is_hopeless, typed, way_out
from grpo.model_card import resolve
from grpo.record.metrics import load_metrics
from tests.helpers.runs import a_tiny_model, options


def launch(folder, *words, **settings):
    """Launch a tiny run, without --train-anyway, and return its status and what it printed."""
    arguments = [word for word in options(output_dir=folder, **settings) if word != "--train-anyway"]
    result = CliRunner().invoke(train_grpo.main, [*arguments, *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, result.output


def written(folder):
    """Return the names of what a run has left in its folder."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".grpo")}


def command_in(output):
    """Return the words of the command that is printed, after `python train_grpo.py`."""
    _, _, after = output.partition("with the most mixed groups:\n")
    lines = after.splitlines()
    last = next(number for number, line in enumerate(lines) if not line.endswith("\\"))
    words = shlex.split("".join(lines[: last + 1]).replace("\\", " "))
    assert words[:2] == ["python", "train_grpo.py"]
    return words[2:]


def test_completions_that_are_cut_off_stop_the_run_and_the_printed_command_trains(model, tmp_path):
    status, output = launch(tmp_path, model=model, max_new_tokens=2)
    assert status == 1
    assert "100%" in next(line for line in output.splitlines() if "as asked" in line)
    assert "--max-new-tokens 8" in output
    assert written(tmp_path) == set()
    words = command_in(output)
    assert words[words.index("--output-dir") + 1] == str(tmp_path)
    result = CliRunner().invoke(train_grpo.main, words)
    assert result.exit_code == 0, result.output
    record = load_metrics(tmp_path)
    assert record["config"]["max_new_tokens"] > 2
    assert record["outlook"]["teaching"] >= 0.3


def test_with_train_anyway_nothing_else_is_tried(model, tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.trainer.try_settings", None)
    status, output = launch(tmp_path, "--train-anyway", model=model, max_new_tokens=2, num_iterations=2)
    assert status == 0, output
    assert load_metrics(tmp_path)["outlook"]["teaching"] == 0


def test_a_run_that_can_learn_tries_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.trainer.try_settings", None)
    assert launch(tmp_path, model=model, num_iterations=2)[0] == 0


def test_a_run_that_continues_does_not_look_again(model, tmp_path, monkeypatch):
    assert launch(tmp_path, "--train-anyway", model=model, max_new_tokens=2, num_iterations=2)[0] == 0
    monkeypatch.setattr("grpo.trainer.outlook", None)
    assert launch(tmp_path, model=model, max_new_tokens=2, num_iterations=4)[0] == 0
    assert len(load_metrics(tmp_path)["steps"]) == 4


def test_a_model_that_was_fine_tuned_is_kept(model, tmp_path):
    settings = {"model": model, "max_new_tokens": 2, "num_iterations": 2, "sft_steps": 2}
    status, output = launch(tmp_path, **settings)
    assert status == 1
    assert "fine-tuned model is kept" in output
    assert command_in(output)[-1] == "--fresh"
    status, output = launch(tmp_path, "--train-anyway", **settings)
    assert status == 0, output
    assert "Continuing from the checkpoint of fine-tuning step 2" in output


def test_a_check_prints_the_table_and_writes_nothing(model, tmp_path):
    status, output = launch(tmp_path, "--check", model=model)
    assert status == 0
    assert "--shots 4" in output
    assert "room" in output
    assert written(tmp_path) == set()


def test_two_groups_without_a_signal_are_too_few_to_stop(model, tmp_path, monkeypatch):
    looks = iter([0.0, 1.0])
    true = module._shares
    monkeypatch.setattr(module, "_shares", lambda *args: true(*args) | {"teaching": next(looks)})
    assert launch(tmp_path, model=model, num_iterations=2)[0] == 0
    assert next(looks, None) is None


def test_nothing_is_tried_that_would_take_too_long(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_TRYING_SECONDS", 0.0)
    status, output = launch(tmp_path, model=model, max_new_tokens=2)
    assert status == 1
    assert "as asked" in output
    assert "None of these settings helps" in output


@pytest.mark.parametrize(("teaching", "hopeless"), [(0.0, True), (0.0625, True), (0.125, False), (1.0, False)])
def test_hardly_any_group_is_less_than_one_in_ten(teaching, hopeless):
    assert is_hopeless({"teaching": teaching}) is hopeless


def test_the_way_out_is_the_trial_with_the_most_mixed_groups():
    config = resolve({"model": "smollm2", "shots": 0})
    shares = (0.0, 0.25, 0.75, 0.75)
    changes = ({}, {"system_prompt": "Say it."}, {"shots": 2}, {"shots": 4})
    trials = [(change, {"teaching": share}) for change, share in zip(changes, shares, strict=True)]
    assert way_out(config, trials) == ["--model", "smollm2", "--shots", "2"]
    assert way_out(config, trials[:1]) == []


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"model": "smollm2", "shots": 0, "system_prompt": "Answer it's -> <answer>...</answer>."},
        {"task": ("arithmetic=1", "reverse=2"), "min_operand": -3, "reward": ("exact=1", "format=0.5")},
        {"prompt_style": "think", "deterministic": True, "beta": 0.0},
        {"prompt_style": "reasoning", "max_new_tokens": 17},
    ],
)
def test_the_typed_words_give_the_same_settings(given, monkeypatch):
    seen = []
    monkeypatch.setattr(train_grpo, "start", lambda settle, *_: seen.append(settle()) or 0)
    CliRunner().invoke(train_grpo.main, typed(resolve(given)), catch_exceptions=False)
    assert seen == [resolve(given)]


def test_the_settings_of_a_models_card_are_not_typed(tmp_path):
    assert typed(resolve({})) == []
    model = str(a_tiny_model(tmp_path / "model"))
    assert typed(resolve({"model": model, "seed": 3})) == ["--model", model, "--seed", "3"]


def test_examples_are_tried_with_room_for_completions_like_them(tmp_path):
    # the workings of the starter's examples have more tokens than its limit of 22
    status, output = launch(tmp_path, "--check", model="starter", max_new_tokens=16, max_operand=10, min_operand=0)
    assert status == 0, output
    [row] = [line for line in output.splitlines() if line.startswith("  --shots 4")]
    assert row.startswith("  --shots 4 --max-new-tokens 32 ")
    assert len(row) <= 80
