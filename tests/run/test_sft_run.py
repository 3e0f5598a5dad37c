"""Test a run with supervised steps: its metrics, its reference, and that it continues from every interruption."""

import os
import signal

import pytest
from click.testing import CliRunner

import train_grpo
from grpo.plots.figures import SFT, draw_all
from grpo.record.metrics import load_metrics
from grpo.sft import SupervisedTrainer
from tests.helpers.runs import fingerprint, options, trained

FIRST = {"sft_steps": 5, "sft_batch_size": 4, "sft_learning_rate": 1e-2, "num_iterations": 4}


@pytest.fixture
def whole(model, tmp_path):
    """Train without an interruption; return record, output and folder."""
    return *trained(model, tmp_path / "whole", **FIRST), tmp_path / "whole"


def test_the_model_after_the_supervised_steps_is_the_start_of_grpo(whole):
    record, out, folder = whole
    assert [entry["step"] for entry in record["sft"]] == [1, 2, 3, 4, 5]
    assert record["sft"][-1]["loss"] < record["sft"][0]["loss"]
    assert record["before_sft"]["split"] == "test"
    assert [entry["step"] for entry in record["steps"]] == [1, 2, 3, 4]
    assert record["steps"][0]["kl"] == pytest.approx(0, abs=1e-9)  # the reference has the supervised steps
    assert max(entry["kl"] for entry in record["steps"]) > 0
    assert "before fine-tuning: test" in out
    assert "after fine-tuning: test" in out
    assert "supervised steps" in (folder / "saved_model" / "README.md").read_text(encoding="utf-8")
    assert SFT in [path.name for path in draw_all(record, folder)]


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_run_killed_in_a_supervised_step_continues_to_the_same_bits(whole, model, tmp_path, at, monkeypatch):
    true_step = SupervisedTrainer.step

    def dies(self, step):
        if step == at:
            raise OSError("killed")
        return true_step(self, step)

    monkeypatch.setattr(SupervisedTrainer, "step", dies)
    arguments = options(model=model, output_dir=tmp_path / "run", **FIRST)
    assert CliRunner().invoke(train_grpo.main, arguments).exit_code
    monkeypatch.setattr(SupervisedTrainer, "step", true_step)
    _, out = trained(model, tmp_path / "run", **FIRST)
    assert ("Continuing from the checkpoint of fine-tuning step" in out) == (at > 2)
    assert fingerprint(tmp_path / "run") == fingerprint(whole[2])


def test_a_run_stopped_between_the_steps_of_grpo_keeps_its_reference(whole, model, tmp_path):
    trained(model, tmp_path / "run", **FIRST | {"num_iterations": 2})
    record, out = trained(model, tmp_path / "run", **FIRST)
    assert "Continuing from the checkpoint of step 2" in out
    kl = [[entry["kl"] for entry in rows["steps"]] for rows in (record, whole[0])]
    assert kl[0] == kl[1]


def test_a_reference_that_is_held_in_bfloat16_is_continued_with_to_the_same_bits(model, tmp_path):
    folders = tmp_path / "whole", tmp_path / "parts"
    for folder, lengths in zip(folders, ([4], [2, 4]), strict=True):
        for steps in lengths:
            trained(model, folder, **{**FIRST, "precision": "bfloat16", "num_iterations": steps})
    assert fingerprint(folders[0]) == fingerprint(folders[1])


def test_a_signal_in_a_supervised_step_saves_and_says_where(whole, model, tmp_path, monkeypatch):
    true_step = SupervisedTrainer.step

    def interrupted(self, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_step(self, step)

    monkeypatch.setattr(SupervisedTrainer, "step", interrupted)
    folder = tmp_path / "run"
    result = CliRunner().invoke(train_grpo.main, options(model=model, output_dir=folder, **FIRST))
    assert result.exit_code == 143
    assert "Stopped after fine-tuning step 2 (SIGTERM). Checkpoint and metrics are in" in result.output
    assert len(load_metrics(folder)["sft"]) == 2
    monkeypatch.setattr(SupervisedTrainer, "step", true_step)
    trained(model, folder, **FIRST)
    assert fingerprint(folder) == fingerprint(whole[2])


def test_a_saved_model_does_not_hand_on_its_supervised_steps(whole, model, tmp_path):
    record, out = trained(whole[2] / "saved_model", tmp_path / "next", sft_steps=None, num_iterations=1)
    assert record["config"]["sft_steps"] == 0
    assert record["sft"] == []
    assert "fine-tuning" not in out


def test_answers_alone_are_taught_where_a_task_knows_no_working_and_it_says_so(model, tmp_path):
    _, out = trained(model, tmp_path / "run", task="reverse", num_iterations=1, sft_steps=1, sft_batch_size=2)
    assert "trains on answers alone" in out


def test_a_limit_below_the_taught_workings_is_said_before_anything_is_taught(model, tmp_path):
    _, out = trained(model, tmp_path / "run", num_iterations=1, sft_steps=1, sft_batch_size=2)
    note, _, later = " ".join(out.split()).partition("before fine-tuning: ")
    assert "completions that fine-tuning teaches have more tokens than --max-new-tokens 6" in note
    assert "Take --max-new-tokens " in note
    assert "after fine-tuning: " in later


def test_an_adapter_is_refused_in_one_line_unless_there_is_no_reference(model, tmp_path):
    arguments = options(model=model, output_dir=tmp_path / "run", lora_rank=2, **FIRST)
    result = CliRunner().invoke(train_grpo.main, arguments)
    assert result.exit_code in (1, 2)
    assert "--sft-steps cannot be combined with --lora-rank unless --beta is 0" in result.output
