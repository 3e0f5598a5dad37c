"""The built-in wordings of the system prompt."""

from itertools import product

import pytest

from tasks.base import KINDS
from tasks.common.parsing import parse_answer
from tasks.common.prompts import STYLES, WORDINGS, system_prompt


@pytest.mark.parametrize(("style", "kind", "wording"), product(STYLES, KINDS, WORDINGS))
def test_the_form_that_a_prompt_shows_is_no_answer(style, kind, wording):
    prompt = system_prompt(style, kind, wording)
    start = prompt.find("<answer>")
    shown = prompt[start:] if "</answer>" in prompt else "<answer>" + prompt
    for text in (shown, shown.removesuffix("."), f"<think>\n</think>{shown.removesuffix('.')}"):
        assert parse_answer(text, kind) is None


def test_the_first_wording_stays_what_the_starter_and_older_runs_were_trained_with():
    assert system_prompt("think", wording="plain") == (
        "Think in <think>...</think>, then give the result as an integer in <answer>...</answer>."
    )
    assert system_prompt("reasoning", "text", "plain").startswith("Respond in the following format, with the answer")


def test_the_form_of_reasoning_names_what_goes_where():
    assert system_prompt("reasoning", "number", "form") == (
        "Respond in the following format, with the result as a number between the answer tags:\n"
        "<reasoning>\nsteps\n</reasoning>\n<answer>\nnumber\n</answer>\n"
    )
    assert "<answer>\n...\n</answer>" in system_prompt("reasoning", "text", "form")
