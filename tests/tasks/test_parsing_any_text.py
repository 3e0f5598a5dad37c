"""Parsing of any text: never an exception, an answer of the right kind or none, in linear time."""

import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.common.parsing import PARSERS, has_form, parse_answer
from tasks.common.prompts import STYLES

# Pieces that make most of the text nearly well-formed: random characters would never get that far.
TAGS = ("<answer>", "</answer>", "<think>", "</think>", "<answer", "/answer>", "<", ">")
PIECES = st.sampled_from([*TAGS, "-", "5", "42", "٤", "_", " ", "\n", "...", "\x00", "\ud800", "9" * 30])
JUNK = st.text(st.characters(exclude_categories=()), max_size=5)  # surrogates included
MIXED = st.lists(st.one_of(PIECES, JUNK), max_size=8).map("".join)
BLOCK = st.one_of(PIECES, st.integers().map(str)).map("<answer>{}</answer>".format)
THOUGHT = st.one_of(MIXED, JUNK.map("<think>{}</think>".format))
TEXTS = st.one_of(MIXED, st.builds("{}{}".format, THOUGHT, BLOCK))


@given(TEXTS, st.sampled_from(sorted(PARSERS)))
@settings(max_examples=300, deadline=None)
def test_any_text_whatever_gives_an_answer_of_the_kind_or_none(text, kind):
    answer = parse_answer(text, kind)
    assert answer is None or type(answer) is {"integer": int, "number": Decimal, "text": str}[kind]
    if isinstance(answer, str):
        assert answer == answer.strip() != ""
        assert answer in text


@given(TEXTS)
@settings(max_examples=500, deadline=None)
def test_any_text_whatever_gives_an_integer_at_its_end_or_none(text):
    answer = parse_answer(text)
    assert answer is None or type(answer) is int
    if answer is not None:
        # Undone by hand: cut the closing tag off the end, and what follows the only opening tag spells the answer.
        assert text.rstrip().endswith("</answer>")
        before, tag, inside = text.rstrip().removesuffix("</answer>").partition("<answer>")
        assert tag
        assert "</answer>" not in before
        assert "<answer>" not in inside
        digits = [character for character in inside if character in "0123456789"]
        assert str(abs(answer)).rstrip("0") == "".join(digits).lstrip("0").rstrip("0")
        assert (answer < 0) <= bool({"-", "\u2212"} & set(inside))


@given(st.integers(min_value=1 - 10**18, max_value=10**18 - 1), st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_what_is_read(number, working):
    if "answer>" not in working:
        assert parse_answer(f"{working}<answer>{number}</answer>") == number
    if "think>" not in working and "answer>" not in working:
        thought = f"<think>{working}</think> <answer> {number}</answer>\n"
        assert parse_answer(thought) == number
        assert has_form(thought, "think")


@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * 200_000,
        "</answer>" * 200_000,
        "<answer></answer>" * 100_000,
        "<" * 1_600_000 + "</answer>",
        "<answer>" + "-" * 1_600_000 + "</answer>",
        "<answer>" + "1" * 1_600_000 + "</answer>",
        "<think>" * 200_000 + "<answer>5</answer>",
        "<think>" + " " * 1_600_000 + "<answer>5</answer>",
        "<reasoning>" + "</reasoning>" * 130_000 + "<answer>5</answer>",
        "<answer>" + "1," * 800_000 + "</answer>",
        "<answer>" + "1" + " 000" * 400_000 + "</answer>",
        "<answer>" + " " * 1_600_000 + "</answer>" + " " * 1_600_000,
    ],
    ids=[
        "unclosed",
        "unopened",
        "pairs",
        "brackets",
        "minuses",
        "digits",
        "thinks",
        "spaces",
        "reasonings",
        "commas",
        "thousands",
        "more spaces",
    ],
)
def test_parsing_is_linear_in_the_length_of_the_text(text):
    # A lazy regular expression takes 14 s on a tenth of this; one pass takes milliseconds.
    for style in STYLES:
        start = time.perf_counter()
        has_form(text, style)
        assert time.perf_counter() - start < 0.5
    for kind in PARSERS:
        start = time.perf_counter()
        parse_answer(text, kind)
        assert time.perf_counter() - start < 0.5
