"""Supervised steps: their loss and gradient against torch's own, their tokens, and problems that are not held out."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from grpo import sft
from grpo.algorithm.update import Updater
from grpo.config import TrainConfig
from grpo.model.loading import load
from grpo.runtime.microbatch import AdaptiveMicrobatch
from grpo.sft import SupervisedTrainer, supervised_gradient, supervised_tokens
from tasks.arithmetic import Arithmetic
from tasks.base import Problem
from tasks.common.shots import solved_problem
from tests.helpers.models import VOCABULARY, ragged_tokens, tiny_model
from tests.helpers.scoring import scorer_for
from tests.helpers.tasks import TASK, fingerprint
from tests.helpers.zoo import KINDS, build
from tests.tasks.test_arithmetic import tokens_of

CPU = torch.device("cpu")


def gradient_of(model):
    """Return the gradient of all weights as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def by_torch(model, tokens):
    """Return loss and gradient by torch's cross-entropy: each row alone, no padding, the completion's labels."""
    model.zero_grad()
    total, counted = 0.0, int(tokens.completion_mask.sum())
    for row, mask in enumerate(tokens.completion_mask):
        prompt = tokens.prompt_ids[row][tokens.prompt_mask[row]]
        ids = torch.cat([prompt, tokens.completion_ids[row][mask]])
        labels = ids.clone()
        labels[: len(prompt)] = -100
        loss = cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum")
        (loss / counted).backward()
        total += loss.item() / counted
    return total, gradient_of(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shared", "rows_per_pass"), [(True, 5), (True, 2), (False, 5), (False, 1)])
def test_loss_and_gradient_are_those_of_cross_entropy_over_the_completions(kind, shared, rows_per_pass):
    model, tokens = tiny_model(kind), ragged_tokens((7, 4, 9, 5, 6), 1, extra_padding=2)
    expected, gradient = by_torch(model, tokens)
    loss = supervised_gradient(
        model, tokens, int(tokens.completion_mask.sum()), scorer_for(model, shared), rows_per_pass
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    found = gradient_of(model)
    assert ((found - gradient).norm() / gradient.norm()).item() < 1e-5


def test_the_loss_by_hand():
    # a head of zeros makes every token equally likely: -log(1 / 50) for each
    model, tokens = tiny_model("llama"), ragged_tokens((4, 3), 1)
    torch.nn.init.zeros_(model.lm_head.weight)
    loss = supervised_gradient(model, tokens, int(tokens.completion_mask.sum()), scorer_for(model), 2)
    assert loss.item() == pytest.approx(math.log(VOCABULARY), rel=1e-6)


@pytest.mark.parametrize("kind", ["starter", *KINDS])
def test_a_completion_is_its_text_and_the_token_that_ends_the_turn(kind, tmp_path):
    lm = load(kind if kind == "starter" else str(build(tmp_path / kind, kind)), CPU)
    text = "4 - 9 = -5\n<answer>-30</answer>"
    ids = lm.completion(text)
    assert ids[-1] in lm.end_ids
    assert lm.decode([ids[:-1]]) == [text]
    ends = {"llama": "<|eot_id|>", "gemma3": "<end_of_turn>", "phi3": "<|end|>", "qwen2": "<|im_end|>"}
    if kind in ends:  # the template adds these tokens
        assert lm.decode([ids[-1:]]) == [ends[kind]]
    said = lm.completion(f"a{lm.decode([ids[-1:]])[0]}b")
    assert said.count(ids[-1]) == 1  # the text of a task cannot end the turn


def test_tokens_are_those_of_the_prompt_and_of_the_completion_and_padding_is_masked():
    lm = load("starter", CPU)
    chats = [TASK.messages("What is (4 - 9) * 6?"), TASK.messages("What is (1 + 1) + 1?")]
    texts = ["4 - 9 = -5\n<answer>-30</answer>", "<answer>3</answer>"]
    tokens = supervised_tokens(lm, chats, texts)
    assert tokens.num_generations == 1
    for row, (prompt, text) in enumerate(zip(lm.prompts(chats), texts, strict=True)):
        assert tokens.prompt_ids[row][tokens.prompt_mask[row]].tolist() == prompt
        assert tokens.completion_ids[row][tokens.completion_mask[row]].tolist() == lm.completion(text)


def a_trainer(task=TASK, **settings):
    """Return the supervised steps of a run, without a model."""
    return SupervisedTrainer(TrainConfig(**{"sft_steps": 8, **settings}), None, task, None)


def test_no_spelling_of_what_is_taught_is_held_out():
    held_out = {
        fingerprint(*tokens_of(p.question)) for split in ("validation", "test") for p in TASK.held_out(split, 10**6)
    }
    trainer, taught = a_trainer(sft_batch_size=64), set()
    for step in range(1, 51):
        chats, _ = trainer.batch(step)
        taught |= {fingerprint(*tokens_of(chat[-1]["content"])) for chat in chats}
    assert len(taught) > 1000
    assert not taught & held_out


def test_a_batch_is_a_function_of_seed_and_step_and_is_in_the_form_that_the_task_asks_for():
    for style in ("answer", "think", "reasoning"):
        task = Arithmetic(style=style)
        trainer = a_trainer(task)
        chats, texts = trainer.batch(3)
        assert (chats, texts) == trainer.batch(3)
        assert chats != trainer.batch(4)[0]
        assert chats != a_trainer(task, seed=1).batch(3)[0]
        for row, text in enumerate(texts):
            problem, completion = solved_problem(task, 0, -4, row)
            attempt = task.grade(problem, text)
            assert completion == text
            assert chats[row] == task.messages(problem.question)
            assert attempt.correct
            assert attempt.well_formed


def test_a_problem_without_a_right_completion_is_skipped_and_if_there_is_no_other_it_is_said():
    class Some(Arithmetic):
        def training_problem(self, seed, step, row):
            return Problem("q", "five") if row < limit else Problem("q", "5")

    limit = 10
    assert solved_problem(Some(), 0, -2, 3)[1] == "<answer>5</answer>"
    limit = 10**12
    with pytest.raises(ValueError, match="no right completion"):
        solved_problem(Some(), 0, -2, 3)


def test_whether_there_is_a_working_to_teach():
    assert a_trainer().teaches_working

    class Bare(Arithmetic):
        def training_problem(self, seed, step, row):
            return Problem("q", "5")

    assert not a_trainer(Bare()).teaches_working


def test_the_learning_rate_rises_over_a_tenth_of_the_steps_and_falls_to_zero(monkeypatch):
    monkeypatch.setattr(sft, "supervised_tokens", lambda *_: ragged_tokens((4, 3), 1))
    trainer = a_trainer(sft_steps=20, sft_batch_size=2, sft_learning_rate=1e-3)
    model = tiny_model("llama")
    update = Updater(model, trainer.config, scorer_for(model), AdaptiveMicrobatch("the update", 2, 1))
    trainer = SupervisedTrainer(trainer.config, SimpleNamespace(model=model), TASK, update)
    rates = [trainer.step(step)["learning_rate"] for step in (1, 2, 3, 12, 20)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4, 1e-3 / 18])
    assert update.optimizer.param_groups[0]["lr"] == rates[-1]


@pytest.mark.parametrize("kind", ["starter", "gpt2"])
def test_a_completion_longer_than_the_model_ends_at_its_last_position(kind, tmp_path):
    lm = load(kind if kind == "starter" else str(build(tmp_path / kind, kind)), CPU)
    chats = [TASK.messages("What is 1 + 1?"), TASK.messages("What is 1 + 1? Say it.")]
    tokens = supervised_tokens(lm, chats, ["1 + 1 = 2\n" * 400, "<answer>2</answer>"])
    lengths = (tokens.prompt_mask.sum(1) + tokens.completion_mask.sum(1)).tolist()
    assert lengths[0] == lm.positions == 512
    assert lengths[1] < 200
    num_tokens = int(tokens.completion_mask.sum())
    assert math.isfinite(supervised_gradient(lm.model, tokens, num_tokens, scorer_for(lm.model), 2).item())
