"""The sampler: its frequencies, its ends, its noise, and that what it drew is what is scored."""

import pytest
import torch
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode

from grpo import cache
from grpo.cache import ROOM, RoomyLayer
from grpo.logprobs import Tokens, completion_logprobs
from grpo.sampling import can_repeat, draw_tokens, generate, left_pad, positions, token_noise
from tests import zoo
from tests.conftest import VOCABULARY, ragged_tokens, tiny_model


def sample(model, tokens, noise, *, limit=8, temperature=1.0, ends=(1, 5), group=4, **more):
    return generate(
        model,
        tokens.prompt_ids,
        tokens.prompt_mask,
        num_generations=group,
        max_new_tokens=limit,
        end_ids=ends,
        temperature=temperature,
        noise=noise,
        **more,
    )


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("ids", "lengths", "ended"))


def test_frequencies_match_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -20.0])
    n = 200_000
    tokens = draw_tokens(logits.expand(n, -1), token_noise(0, 0, n, 1)[:, 0], 0.8)
    counts = torch.bincount(tokens, minlength=6).double()
    expected = (logits / 0.8).double().softmax(-1) * n
    keep = expected > 5  # the last token is expected 1e-7 times
    result = chisquare(counts[keep].numpy(), (expected[keep] * counts[keep].sum() / expected[keep].sum()).numpy())
    assert result.pvalue > 1e-3


def test_the_inverse_of_the_cumulative_softmax_by_hand():
    # probabilities 1/4, 0, 1/4, 1/2: borders at 0.25, 0.25, 0.5, 1; a token of probability 0 is never drawn
    logits = torch.tensor([[0.25, 0.0, 0.25, 0.5]]).log().expand(6, -1)
    noise = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw_tokens(logits, noise, 1.0).tolist() == [0, 0, 2, 2, 3, 3]


def test_noise_is_a_function_of_seed_and_step_only():
    a, b = token_noise(3, 7, 8, 16), token_noise(3, 7, 8, 16)
    assert torch.equal(a, b)
    assert not torch.equal(a, token_noise(3, 8, 8, 16))
    assert not torch.equal(a, token_noise(4, 7, 8, 16))
    assert 0 <= a.min() <= a.max() < 1
    # the same on every machine: PCG64 is specified, these are its numbers
    assert token_noise(0, 0, 1, 2).tolist() == [[0.6369616873214543, 0.2697867137638703]]
    assert token_noise(7, 3, 1, 2).tolist() == [[0.9750335537195014, 0.8845672371187709]]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_and_rescored_logprobs_agree(kind, temperature):
    model, tokens = tiny_model(kind), ragged_tokens()
    drawn = sample(model, tokens, token_noise(0, 0, 12, 14), limit=14, temperature=temperature, ends=(1, 3, 5))
    rollout = Tokens(tokens.prompt_ids, tokens.prompt_mask, drawn.ids, drawn.mask)
    rescored, _ = completion_logprobs(model, rollout, temperature)
    assert drawn.lengths.unique().numel() > 1, "rows of different lengths, or the test shows little"
    # what a logit is rounded by, the temperature divides
    torch.testing.assert_close(drawn.logprobs[drawn.mask], rescored[drawn.mask], atol=1e-5 / temperature, rtol=0)


def test_every_end_id_ends_a_row_and_is_inside_the_mask():
    model, tokens = tiny_model("llama"), ragged_tokens()
    drawn = sample(model, tokens, token_noise(1, 0, 12, 40), limit=40, ends=(5, 6, 7))
    assert drawn.ended.any()
    for ids, length, ended in zip(drawn.ids.tolist(), drawn.lengths.tolist(), drawn.ended.tolist(), strict=True):
        assert (ids[length - 1] in (5, 6, 7)) == ended
        assert not set(ids[: length - 1]) & {5, 6, 7}
        assert ended or length == 40
    assert torch.equal(drawn.mask.sum(-1), drawn.lengths)


def test_rows_do_not_depend_on_the_rows_beside_them():
    # a retry with fewer rows, or another split of the batch, sees the same completions
    model, tokens = tiny_model("qwen2"), ragged_tokens((6, 6, 6))
    noise = token_noise(0, 0, 12, 10)
    whole = sample(model, tokens, noise, limit=10)
    for group in range(3):
        alone = sample(
            model, tokens.part(slice(3 * group, 3 * group + 3)), noise[4 * group : 4 * group + 4], limit=10
        )
        rows = whole.ids[4 * group : 4 * group + 4, : alone.ids.shape[1]]
        assert torch.equal(rows, alone.ids)
        assert torch.equal(whole.lengths[4 * group : 4 * group + 4], alone.lengths)


def test_sampling_without_sharing_draws_the_same_completions():
    model, tokens = tiny_model("llama"), ragged_tokens()
    noise = token_noise(0, 0, 12, 8)
    shared, dense = (
        generate(
            model,
            tokens.prompt_ids,
            tokens.prompt_mask,
            num_generations=4,
            max_new_tokens=8,
            end_ids=(1, 5),
            noise=noise,
            shared=shared,
        )
        for shared in (True, False)
    )
    assert torch.equal(shared.ids, dense.ids)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3"])
def test_greedy_agrees_with_the_librarys_own(kind):
    model, tokens = tiny_model(kind), ragged_tokens()
    ours = sample(model, tokens, None, limit=12, ends=(1,), group=1)
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


def test_left_pad_and_positions():
    ids, mask = left_pad([[7, 8, 9], [4]], 0, torch.device("cpu"))
    assert ids.tolist() == [[7, 8, 9], [0, 0, 4]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    assert positions(mask).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_a_generation_config_with_top_k_is_not_inherited():
    model, tokens = tiny_model("llama"), ragged_tokens()
    noise = token_noise(0, 0, 12, 8)
    before = sample(model, tokens, noise).ids
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0)
    assert torch.equal(before, sample(model, tokens, noise).ids)
    assert before.unique().numel() > VOCABULARY // 4, "the plain softmax reaches many tokens"


# --- what is done between two looks at the rows ---


@pytest.mark.parametrize("kind", ["qwen2", "gemma3", "gpt2"])
@pytest.mark.parametrize("noise", [token_noise(2, 0, 12, 40), None], ids=["sampled", "greedy"])
def test_how_often_is_looked_whether_rows_have_ended_decides_nothing(kind, noise):
    model, tokens = tiny_model(kind), ragged_tokens()
    every = [sample(model, tokens, noise, limit=40, ends=range(3, 20), check_every=n) for n in (1, 4, 16, 100)]
    assert noise is None or every[0].lengths.unique().numel() > 3, "rows leave one after the other"
    for found in every[1:]:
        assert same(found, every[0])
        # matrices of other sizes round otherwise: rows leave at other times
        torch.testing.assert_close(found.logprobs, every[0].logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_past_its_room_a_cache_holds_what_a_plain_one_does(kind):
    # 40 tokens a row: the room is made anew once, and Gemma's window of 6 is long past
    model, tokens = tiny_model(kind), ragged_tokens()
    drawn = sample(model, tokens, token_noise(0, 0, 12, ROOM + 8), limit=ROOM + 8, ends=(60,))
    rollout = Tokens(tokens.prompt_ids, tokens.prompt_mask, drawn.ids, drawn.mask)
    rescored, _ = completion_logprobs(model, rollout, 1.0, shared=False)
    torch.testing.assert_close(drawn.logprobs, rescored, atol=2e-5, rtol=0)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: a number read, or a shape that depends on values."""

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
@pytest.mark.parametrize("noise", [token_noise(2, 0, 12, 33), None], ids=["sampled", "greedy"])
def test_off_the_cpu_nothing_is_read_between_two_checks(kind, noise, monkeypatch):
    model, tokens = tiny_model(kind), ragged_tokens()
    expected = sample(model, tokens, noise, limit=33, ends=(60,))
    monkeypatch.setattr(RoomyLayer, "is_compileable", True)  # as on another device

    def reads(limit):
        with Reads() as seen:
            found = sample(model, tokens, noise, limit=limit, ends=(60,), check_every=16)
        return seen.count, found

    (one, _), (few, _), (more, found) = reads(2), reads(16), reads(33)
    assert few == one
    assert more == one + 2  # the two checks
    assert same(found, expected)


# --- several devices: all of them do the same number of forward passes ---


def passes_of(model, monkeypatch):
    rows, true_forward = [], model.forward

    def forward(*args, **more):
        rows.append(more["input_ids"].shape[0])
        return true_forward(*args, **more)

    monkeypatch.setattr(model, "forward", forward)
    return rows


@pytest.mark.parametrize("check_every", [1, 4])
@pytest.mark.parametrize("noise", [token_noise(2, 0, 12, 32), None], ids=["sampled", "greedy"])
def test_a_device_that_is_done_goes_on_while_another_is_not(check_every, noise, monkeypatch):
    model, tokens = tiny_model("llama"), ragged_tokens()
    settings = {"limit": 32, "ends": range(3, 16), "check_every": check_every}
    alone = sample(model, tokens, noise, **settings)
    assert alone.ended.all()
    assert 4 < alone.ids.shape[1] < 20
    asked = []

    def others_run_to_the_24th(running):
        asked.append(running)
        return len(asked) * check_every < 24

    rows = passes_of(model, monkeypatch)
    found = sample(model, tokens, noise, **settings, more=others_run_to_the_24th)
    assert same(found, alone)
    assert torch.equal(found.logprobs, alone.logprobs)
    assert asked == sorted(asked, reverse=True)
    assert len(set(asked)) == 2
    assert len(asked) == 24 // check_every
    assert len(rows) == 24  # the prompts and 23 tokens
    assert min(rows) == 1, "a row stays to be run"


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_these_models_can_repeat_a_cache_and_one_that_cannot_is_found_out(kind, monkeypatch):
    model, tokens = tiny_model(kind), ragged_tokens((9, 12))
    assert can_repeat(model, tokens.prompt_ids, tokens.prompt_mask)
    true_of = cache.with_room
    monkeypatch.setattr(cache, "with_room", lambda x, repeats, more=0: true_of(x.roll(repeats - 1, 0), repeats, more))
    assert not can_repeat(model, tokens.prompt_ids, tokens.prompt_mask)


def test_a_model_that_refuses_to_repeat_its_cache_runs_each_prompt_for_each_completion(monkeypatch):
    def refuse(x, repeats, more=0):
        if repeats > 1:
            raise ValueError("no")
        return true_of(x, repeats, more)

    model, tokens, true_of = tiny_model("llama"), ragged_tokens((9, 12)), cache.with_room
    monkeypatch.setattr(cache, "with_room", refuse)
    assert not can_repeat(model, tokens.prompt_ids, tokens.prompt_mask)
