"""Findings in real runs of a tiny model: printed when they first show, at the end, and after a resume."""

import math

import pytest
import torch

from grpo import trainer
from grpo.record.checkpoint import newest_checkpoint
from tests.helpers.runs import a_tiny_model, trained
from tests.helpers.sick_runs import names


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the folder of a tiny model that answers with a random digit in answer tags."""
    return a_tiny_model(tmp_path_factory.mktemp("health") / "model")


def run(model, folder, *arguments, **settings):
    """Train the tiny model, or continue its run; return the record and the standard output."""
    settings = {"num_iterations": 24, "eval_every": 8, "eval_problems": 40, "max_operand": 2} | settings
    return trained(model, folder, *arguments, **settings)


def found(record):
    """Return the findings of a record by name, after checking that the checks find the same in the record."""
    assert [f["name"] for f in record["findings"]] == names(record)
    return {f["name"]: f for f in record["findings"]}


def test_a_reward_for_the_form_only_is_named_as_hacking_with_examples(tiny, tmp_path):
    record, out = run(tiny, tmp_path, "--reward", "format=1", max_new_tokens=12)
    finding = found(record)["reward_hacking"]
    assert len(finding["examples"]) == 2
    assert all("wrong" in text for text in finding["examples"])
    assert out.count("reward_hacking:") == 2  # when it first shows, and at the end
    assert "Done after step 24" in out.rpartition("reward_hacking:")[0]


def test_a_limit_that_cuts_completions_off_is_named(tiny, tmp_path):
    record, _ = run(tiny, tmp_path, max_new_tokens=3, num_iterations=12, batch_size=4)
    assert "never_ends" in found(record)


def test_a_learning_rate_that_moves_nothing_is_named_and_one_that_does_is_not(tiny, tmp_path):
    record, _ = run(tiny, tmp_path / "small", max_new_tokens=12, learning_rate=1e-12, num_iterations=12, batch_size=4)
    assert "learning_rate_small" in found(record)
    record, _ = run(tiny, tmp_path / "right", max_new_tokens=12, num_iterations=12, batch_size=4)
    assert "learning_rate_small" not in found(record)
    assert record["steps"][-1]["weights_moved"] > 0.5


def test_groups_that_are_all_wrong_are_named_once_and_at_the_end(tiny, tmp_path):
    record, out = run(tiny, tmp_path, min_operand=900, max_operand=999, num_iterations=24, batch_size=4)
    assert "Lower --max-operand." in found(record)["too_hard"]["text"]  # the task's own advice
    assert out.count("Too hard for this model") == 2
    assert " ".join(out.split()).count("Lower --max-operand.") == 2


def test_words_backwards_that_are_all_wrong_say_that_tokens_hide_the_letters(tiny, tmp_path):
    record, out = run(tiny, tmp_path, task="reverse", max_operand=None, num_iterations=4)
    assert "tokens hide the letters" in found(record)["too_hard"]["text"]
    assert "tokens hide the letters" in " ".join(out.split())


def test_updates_that_are_not_finite_are_named(tiny, tmp_path, monkeypatch):
    real = trainer.GRPO.step

    def step(self, number):
        with pytest.MonkeyPatch.context() as patch:
            if number == 3:
                patch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(math.nan))
            return real(self, number)

    monkeypatch.setattr(trainer.GRPO, "step", step)
    record, _ = run(tiny, tmp_path, num_iterations=4)
    assert found(record)["updates_skipped"]["step"] == 3


def test_a_resumed_run_says_nothing_twice_and_keeps_what_it_found(tiny, tmp_path):
    _, first = run(tiny, tmp_path, max_new_tokens=3, num_iterations=12, batch_size=4)
    assert "never_ends" in first
    [kept] = newest_checkpoint(tmp_path)[0].metrics["findings"][:1]
    record, again = run(tiny, tmp_path, max_new_tokens=3, num_iterations=14, batch_size=4)
    assert kept in record["findings"]
    assert again.count("never_ends:") == 1  # in the list at the end
    _, finished = run(tiny, tmp_path, max_new_tokens=3, num_iterations=14, batch_size=4)
    assert "is finished" in finished
    assert finished.count("never_ends:") == 1


def test_what_the_findings_need_is_measured_in_every_step(tiny, tmp_path):
    record, _ = run(tiny, tmp_path, max_new_tokens=12, num_iterations=2)
    for row in record["steps"]:
        assert 0 <= row["sampler_gap"] < 1e-4  # float32
        assert row["weights_moved"] > 0.5
        assert row["empty_fraction"] == row["repeated_endings_fraction"] == 0
        assert {f"reward_std/{name}" for name in ("format", "close", "exact")} <= set(row)
