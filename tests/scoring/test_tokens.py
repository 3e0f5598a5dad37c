"""Padding, positions and slices of token ids, by hand."""

import torch

from grpo.scoring.tokens import Tokens, left_pad, position_ids
from tests.helpers.models import ragged_tokens


def test_left_pad_and_positions():
    ids, mask = left_pad([[7, 8, 9], [4]], 0, torch.device("cpu"))
    assert ids.tolist() == [[7, 8, 9], [0, 0, 4]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    assert position_ids(mask).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_groups_are_rows_in_order():
    tokens = ragged_tokens((4, 4), num_generations=2)
    second = tokens.slice_rows(slice(2, 4))
    assert isinstance(second, Tokens)
    assert torch.equal(second.prompt_ids, tokens.prompt_ids[1:])
    width = second.completion_ids.shape[1]
    assert torch.equal(second.completion_ids, tokens.completion_ids[2:, :width])
