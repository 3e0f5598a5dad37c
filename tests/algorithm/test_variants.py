"""Variants and schedules in a real step and a real run: what they change, and that a resumed run continues them."""

import json

import pytest
import torch
from click.testing import CliRunner

import train_grpo
from grpo.algorithm.grpo import GRPO
from grpo.config import TrainConfig
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.step_probe import measured_step
from tasks.arithmetic import Arithmetic

SMALL = {"model": "starter", "batch_size": 4, "num_generations": 4, "num_inner_updates": 2, "learning_rate": 1e-4}


@pytest.fixture(scope="module")
def lm():
    """The starter, which no test here trains."""
    return load("starter", torch.device("cpu"))


def make_grpo(**settings):
    return GRPO(resolve({**SMALL, **settings}), Arithmetic(), load("starter", torch.device("cpu")))


def weights(grpo):
    return torch.cat([p.detach().flatten() for p in grpo.policy.parameters()])


def sampled(lm, config):
    """Return all groups that step 1 draws, and the groups that it would train on, without any update."""
    return GRPO(config, Arithmetic(), lm).sampler.sample(1, config.num_generations)


def rollout_of(lm, config):
    """Return the groups that step 1 would train on."""
    return sampled(lm, config)[1]


def test_tied_groups_are_drawn_again_with_other_problems_and_only_they(lm):
    plain = rollout_of(lm, resolve({**SMALL, "batch_size": 8}))
    drawn, again = sampled(lm, resolve({**SMALL, "batch_size": 8, "resample_tied": 3}))
    tied = [max(group) == min(group) for group in plain.totals.tolist()]
    assert True in tied
    assert False in tied
    for place in range(8):
        rows = slice(4 * place, 4 * place + 4)
        if tied[place]:
            assert again.problems[place] != plain.problems[place]
        else:
            assert again.problems[place] == plain.problems[place]
            assert again.completion_texts[rows] == plain.completion_texts[rows]
            assert torch.equal(
                again.tokens.slice_rows(rows).completion_ids, plain.tokens.slice_rows(rows).completion_ids
            )
    assert sum(tied) <= len(drawn.problems) - 8 <= 3 * sum(tied)
    assert drawn.completion_texts[:32] == plain.completion_texts
    assert int(again.tied.sum()) < sum(tied)
    for problem, completion, reward in zip(
        [p for p in again.problems for _ in range(4)], again.completion_texts, again.rewards, strict=True
    ):
        assert reward.correct == Arithmetic().grade(problem, completion).correct, (
            "problem and completion belong together"
        )


def test_the_prompts_of_groups_drawn_again_are_those_of_their_problems(lm):
    rollout = rollout_of(lm, resolve({**SMALL, "batch_size": 8, "resample_tied": 2}))
    for place, problem in enumerate(rollout.problems):
        ids = rollout.tokens.prompt_ids[place][rollout.tokens.prompt_mask[place]]
        assert problem.question in lm.tokenizer.decode(ids)


def test_truncated_completions_teach_nothing_when_masked():
    # a limit of 3 tokens cuts every completion off, so nothing is left to learn from
    grpo = make_grpo(mask_truncated_completions=True, max_new_tokens=3, beta=0.0, temperature=5.0)
    before = weights(grpo)
    _, entry = measured_step(grpo, 1)
    assert entry["truncated_fraction"] == 1
    assert entry["completion_length"] == 3
    assert (entry["loss"], entry["grad_norm"]) == (0, 0)
    assert torch.equal(weights(grpo), before)


def test_only_the_truncated_ones_are_masked(lm):
    config = resolve({**SMALL, "mask_truncated_completions": True, "max_new_tokens": 7, "temperature": 2.0})
    rollout = rollout_of(lm, config)
    assert rollout.truncated.any()
    assert not rollout.truncated.all()
    mask = rollout.loss_tokens(config).completion_mask
    assert torch.equal(mask.any(1), ~rollout.truncated)
    assert torch.equal(mask[~rollout.truncated], rollout.tokens.completion_mask[~rollout.truncated])


def test_the_reference_is_refreshed_and_the_kl_begins_again_from_zero():
    grpo = make_grpo(ref_model_sync_steps=2)
    kl = [measured_step(grpo, step)[1]["kl"] for step in (1, 2, 3)]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-6
    assert kl[2] == pytest.approx(0, abs=1e-6)


def test_beta_moves_towards_the_target_and_is_logged():
    grpo = make_grpo(target_kl=1000.0)
    betas = [measured_step(grpo, step)[1]["beta"] for step in (1, 2, 3)]
    assert betas == pytest.approx([0.04, 0.04 * 0.98, 0.04 * 0.98**2])


def test_group_size_and_learning_rate_follow_their_schedules():
    grpo = make_grpo(group_schedule="6:2", num_iterations=3, warmup_steps=1, learning_rate_decay="linear")
    steps = [measured_step(grpo, step) for step in (1, 2, 3)]
    assert [entry["num_generations"] for _, entry in steps] == [6, 4, 2]
    assert [len(outcome.rollout.completion_texts) for outcome, _ in steps] == [24, 16, 8]
    assert [entry["learning_rate"] for _, entry in steps] == pytest.approx([1e-4, 1e-4, 0.5e-4])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_kl": 0.1, "beta": 0.0}, "--target-kl.*--beta"),
        ({"ref_model_sync_steps": 5, "beta": 0.0}, "--ref-model-sync-steps.*--beta"),
        ({"group_schedule": "8:1"}, "8:4"),
        ({"warmup_steps": 2000}, "--warmup-steps.*--num-iterations"),
    ],
    ids=str,
)
def test_combinations_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**settings)


TINY = ["--batch-size", "2", "--num-generations", "3", "--num-inner-updates", "2", "--eval-every", "4"]
TINY += ["--eval-problems", "4", "--save-every", "2", "--show-every", "0", "--learning-rate", "1e-4"]
ALL = ["--target-kl", "0.001", "--ref-model-sync-steps", "3", "--warmup-steps", "2", "--resample-tied", "2"]
ALL += ["--surrogate", "cispo", "--entropy-bonus", "0.001", "--overlong-buffer", "3"]
ALL += ["--multi-objective-aggregation", "normalize_then_sum"]
ALL += ["--mask-truncated-completions", "--group-schedule", "4:2", "--learning-rate-decay", "cosine"]
ALL += ["--loss-average", "constant", "--scale-rewards", "batch", "--epsilon-high", "0.3"]


def test_a_run_with_all_of_them_that_is_interrupted_goes_on_bit_for_bit(tmp_path, monkeypatch):
    true_step = GRPO.step

    def run(name, stop_before=None):
        def step(self, number):
            if number == stop_before:
                raise ValueError("stopped by the test")
            return true_step(self, number)

        monkeypatch.setattr(GRPO, "step", step)
        args = [*TINY, *ALL, "--num-iterations", "6", "--output-dir", str(tmp_path / name)]
        return CliRunner().invoke(train_grpo.main, args)

    assert run("whole").exit_code == 0
    assert run("cut", stop_before=6).exit_code == 1  # after a checkpoint at 4, past the refresh at 3
    again = run("cut")
    assert again.exit_code == 0, again.output
    assert "checkpoint of step 4" in again.output
    for name in ("policy", "optimizer", "reference"):
        path = f"checkpoints/step-00000006/{name}.safetensors"
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "cut" / path).read_bytes(), name
    rows = [json.loads((tmp_path / name / "grpo_metrics.json").read_text())["steps"] for name in ("whole", "cut")]
    for a, b in zip(*rows, strict=True):
        assert {k: v for k, v in a.items() if k[:5] != "time/"} == {k: v for k, v in b.items() if k[:5] != "time/"}
    refused = CliRunner().invoke(
        train_grpo.main, [*TINY, *ALL, "--num-iterations", "7", "--output-dir", str(tmp_path / "whole")]
    )
    assert refused.exit_code == 1
    assert "--num-iterations" in refused.stderr  # the schedules run to the last step
