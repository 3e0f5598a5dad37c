"""The decode loop: against that of transformers, how often it checks for ended rows, and how many passes it makes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.generation.decoding import CAPACITY_STEP, PreallocatedLayer
from grpo.generation.sampling import sampling_uniforms
from grpo.runtime.ranks import Ranks
from grpo.scoring.tokens import Tokens
from tests.helpers import zoo
from tests.helpers.generation import generate, same_completions
from tests.helpers.models import ragged_tokens, tiny_model
from tests.helpers.scoring import logprobs_of


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3"])
def test_greedy_agrees_with_the_librarys_own(kind):
    model, tokens = tiny_model(kind), ragged_tokens()
    ours = generate(model, tokens, limit=12, ends=(1,), group=1)
    theirs = model.generate(
        tokens.prompt_ids,
        attention_mask=tokens.prompt_mask.long(),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=1,
        pad_token_id=0,
    )[:, tokens.prompt_ids.shape[1] :]
    for row in range(3):
        n = int(ours.lengths[row])
        assert ours.ids[row, :n].tolist() == theirs[row, :n].tolist()


@pytest.mark.parametrize("kind", ["qwen2", "gemma3", "gpt2"])
@pytest.mark.parametrize("uniforms", [sampling_uniforms(2, 0, 12, 40), None], ids=["sampled", "greedy"])
def test_how_often_the_loop_checks_for_ended_rows_changes_no_completion(kind, uniforms):
    model, tokens = tiny_model(kind), ragged_tokens()
    results = [generate(model, tokens, uniforms, limit=40, ends=range(3, 20), check_every=n) for n in (1, 4, 16, 100)]
    assert uniforms is None or results[0].lengths.unique().numel() > 3, "rows leave one after the other"
    for found in results[1:]:
        assert same_completions(found, results[0])
        # rows are dropped at other times, and matrices of other sizes round differently
        torch.testing.assert_close(found.logprobs, results[0].logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_past_its_capacity_a_cache_holds_what_a_plain_one_does(kind):
    # with 40 tokens a row the cache grows once, and rows are longer than Gemma's window of 6
    model, tokens, limit = tiny_model(kind), ragged_tokens(), CAPACITY_STEP + 8
    sampled = generate(model, tokens, sampling_uniforms(0, 0, 12, limit), limit=limit, ends=(60,))
    rollout = Tokens(tokens.prompt_ids, tokens.prompt_mask, sampled.ids, sampled.mask)
    rescored = logprobs_of(model, rollout, 1.0, shared=False)
    torch.testing.assert_close(sampled.logprobs, rescored, atol=2e-5, rtol=0)


class Reads(TorchDispatchMode):
    """Count the operations that make the host wait for a device: it reads a number, or a shape depends on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name
        by_mask = name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.count += by_mask or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("uniforms", [sampling_uniforms(2, 0, 12, 33), None], ids=["sampled", "greedy"])
def test_off_the_cpu_the_host_reads_nothing_between_two_checks(kind, uniforms, monkeypatch):
    model, tokens = tiny_model(kind), ragged_tokens()
    expected = generate(model, tokens, uniforms, limit=33, ends=(60,))
    monkeypatch.setattr(PreallocatedLayer, "is_compileable", True)  # as on another device

    def reads(limit):
        with Reads() as seen:
            found = generate(model, tokens, uniforms, limit=limit, ends=(60,), check_every=16)
        return seen.count, found

    (one, _), (few, _), (more, found) = reads(2), reads(16), reads(33)
    assert few == one
    assert more == one + 2  # the two checks
    assert same_completions(found, expected)


def count_rows_of_passes(model, monkeypatch):
    """Return a list that gets the number of rows of each forward pass."""
    rows, true_forward = [], model.forward

    def forward(*args, **kwargs):
        rows.append(kwargs["input_ids"].shape[0])
        return true_forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    return rows


@pytest.mark.parametrize("check_every", [1, 4])
@pytest.mark.parametrize("uniforms", [sampling_uniforms(2, 0, 12, 32), None], ids=["sampled", "greedy"])
def test_a_rank_that_is_done_makes_passes_as_long_as_another_is_not(check_every, uniforms, monkeypatch):
    model, tokens = tiny_model("llama"), ragged_tokens()
    settings = {"limit": 32, "ends": range(3, 16), "check_every": check_every}
    alone = generate(model, tokens, uniforms, **settings)
    assert alone.ended.all()
    assert 4 < alone.ids.shape[1] < 20
    answers = []

    def others_run_to_the_24th(_, running):
        answers.append(running)
        return len(answers) * check_every < 24

    rows = count_rows_of_passes(model, monkeypatch)
    monkeypatch.setattr(Ranks, "any", others_run_to_the_24th)
    found = generate(model, tokens, uniforms, **settings)
    assert same_completions(found, alone)
    assert torch.equal(found.logprobs, alone.logprobs)
    assert answers == sorted(answers, reverse=True)
    assert len(set(answers)) == 2
    assert len(answers) == 24 // check_every
    assert len(rows) == 24  # the prompts and 23 tokens
    assert min(rows) == 1, "a row stays to be run"
