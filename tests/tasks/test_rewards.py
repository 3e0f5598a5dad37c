"""The named rewards by hand, their bounds on any text, and the specifications of --reward."""

import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.arithmetic import Arithmetic
from tasks.base import Problem
from tasks.common.parsing import PARSERS
from tasks.common.prompts import STYLES, ideal_completion
from tasks.common.rows import Rows
from tasks.reverse import Reverse
from tasks.rewards.functions import DEMO, REWARDS, SHAPED, repeats_an_ending
from tasks.rewards.scoring import parse_rewards, rewards_of, score
from tests.helpers.tasks import SUM, WORD, numbers_task, untimed, value

PERFECT = "<reasoning>\n4 - 9 = -5\n</reasoning>\n<answer>\n-30\n</answer>\n"


@pytest.mark.parametrize(
    ("answer", "formatted", "close", "exact"),
    [("-30", 1, 1, 1), ("-31", 1, 1, 0), ("-29", 1, 1, 0), ("-32", 1, 0, 0), ("30", 1, 0, 0), ("x", 0, 0, 0)],
)
def test_format_close_and_exact_of_numbers(answer, formatted, close, exact):
    text = f"<answer>{answer}</answer>"
    assert [value(name, text) for name in ("format", "close", "exact")] == [formatted, close, exact]


@pytest.mark.parametrize(
    ("answer", "close", "exact"),
    [("18", 1, 1), ("18.00", 1, 1), ("17.5", 1, 0), ("19", 1, 0), ("19.000000001", 0, 0), ("1,018", 0, 0)],
)
def test_close_and_exact_of_decimals(answer, close, exact):
    task, text = numbers_task("answer"), f"<answer>{answer}</answer>"
    assert [value(name, text, Problem("?", "18"), task) for name in ("close", "exact")] == [close, exact]


@pytest.mark.parametrize(
    ("answer", "formatted", "close", "exact"),
    [("irotab", 1, 1, 1), ("IRotab", 1, 1, 0), ("irota", 1, 0, 0), (" irotab ", 1, 1, 1), ("", 0, 0, 0)],
)
def test_format_close_and_exact_of_texts(answer, formatted, close, exact):
    text = f"<answer>{answer}</answer>"
    got = [value(name, text, WORD, Reverse()) for name in ("format", "close", "exact")]
    assert got == [formatted, close, exact]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (PERFECT, 1.0),
        (PERFECT.removesuffix("\n"), 1.0),
        # four tags less what follows the last one: "Done." has five characters
        (PERFECT + "Done.", 1 - 0.005),
        (PERFECT + "\n", 1 - 0.001),
        (PERFECT + "x" * 2000, 0.0),
        ("<reasoning>\nx\n</reasoning>\n", 0.5),
        ("x\n<answer>\n5\n</answer>", 0.5),
        ("<reasoning>x</reasoning><answer>5</answer>", 0.0),  # not on lines of their own
        (PERFECT * 2, 0.0),  # each twice
        ("\n</answer>" + "y" * 100, 0.15),  # 0.25 - 0.1
        ("", 0.0),
    ],
)
def test_xml_count(completion, expected):
    assert value("xml_count", completion) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("completion", "strict", "soft"),
    [
        (PERFECT, 1, 1),
        (PERFECT.removesuffix("\n"), 1, 1),
        (ideal_completion("5", "reasoning"), 1, 1),  # nothing between the tags
        ("<reasoning>x</reasoning><answer>5</answer>", 0, 1),
        (" <reasoning>x</reasoning> \n <answer>5</answer> and so on", 0, 1),
        (PERFECT + "\n", 0, 1),
        (PERFECT + "x", 0, 1),
        ("x" + PERFECT, 0, 0),
        (PERFECT.replace("<answer>\n", "<answer>"), 0, 1),
        (PERFECT.replace("\n</reasoning>\n", "</reasoning>\n\n"), 0, 1),
        (PERFECT * 2, 0, 1),
        ("<reasoning>\n" + PERFECT, 0, 1),  # a tag twice
        ("<reasoning>x</reasoning>so<answer>5</answer>", 0, 0),
        ("<reasoning>x<answer>5</answer></reasoning>", 0, 0),
        ("<answer>5</answer><reasoning>x</reasoning>", 0, 0),
        ("<reasoning>\n</answer>", 0, 0),
        ("<reasoning>\n</reasoning>\n<answer>\n</answer>", 0, 1),  # too few line feeds
        ("", 0, 0),
    ],
)
def test_strict_and_soft_format(completion, strict, soft):
    assert (value("strict_format", completion), value("soft_format", completion)) == (strict, soft)


@pytest.mark.parametrize(
    ("completion", "correct", "whole"),
    [
        (PERFECT, 1, 1),
        ("<answer>-30</answer>", 1, 1),
        ("<answer>7</answer> no, <answer> -30 </answer> it is", 1, 1),
        ("<answer>-30</answer><answer>7</answer>", 0, 1),
        ("<answer>-30.0</answer>", 1, 1),
        ("<answer>-30.5</answer>", 0, 0),  # a task of integers
        ("<answer>-30", 0, 0),
        ("-30</answer>", 0, 0),
        ("-30", 0, 0),
        ("<answer>x</answer>", 0, 0),
        ("", 0, 0),
    ],
)
def test_correctness_and_integer_take_the_last_answer(completion, correct, whole):
    assert (value("correctness", completion), value("integer", completion)) == (correct, whole)


def test_integer_among_decimals_asks_for_a_whole_number_where_the_right_one_is():
    task = numbers_task()
    for gold, answer, expected in (("18", "18.00", 1), ("18", "1,018", 1), ("18", "18.5", 0), ("1.5", "2.5", 1)):
        assert value("integer", f"<answer>{answer}</answer>", Problem("?", gold), task) == expected
    assert value("integer", "<answer>5</answer>", WORD, Reverse()) == 0  # texts


@pytest.mark.parametrize(
    ("question", "completion", "expected"),
    [
        ("What is it?", "all of it <answer>5</answer>", 1.0),
        ("What is it?", "", 1.0),
        ("What is it?", "<answer>5</answer>", 1.0),  # tags are not counted
        ("What is it?", "ab да", 0.5),
        ("What is it?", "abc北", 0.75),
        ("Что это?", "да <answer>нет</answer>", 1.0),
        ("Что это?", "yes", 0.0),
        ("北京 is what?", "北京 city", 1.0),  # both scripts are asked in
        ("2 + 2", "whatever", 1.0),  # a question without letters has no script to stay in
    ],
)
def test_language_is_the_share_of_letters_in_the_scripts_of_the_question(question, completion, expected):
    assert value("language", completion, Problem(question, "5")) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>5</answer>", 1),
        ("working <answer>5</answer>\n", 1),
        (PERFECT, 1),
        ("<answer>5</answer> so", 0),
        ("<answer>5</answer></answer>", 0),
        ("<answer>5</answer><answer>5</answer>", 0),
        ("<think>a</think><think>b</think><answer>5</answer>", 0),
        *((f"<answer>5</answer>{marker}", 0) for marker in ("<|im_end|>", "</s>", "<|endoftext|>", "<|eot_id|>")),
        ("<|im_end|><answer>5</answer>", 0),
        ("5", 0),
        ("", 0),
    ],
)
def test_one_ending(completion, expected):
    assert value("one_ending", completion) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>1</answer></answer>", True),
        ("<answer>1</answer><|im_end|><|im_end|>", True),
        ("<think>a</think> <think>b</think><answer>1</answer>", True),
        ("<answer><answer>1</answer>", False),  # an opening
        ("<think>a</think><answer>1</answer><|im_end|>", False),
        ("", False),
    ],
)
def test_a_repeated_ending(completion, expected):
    assert repeats_an_ending(completion) == expected


def test_length_pays_short_well_formed_completions():
    assert value("length", "<answer>5</answer>") == 1 - 18 / 1000
    assert value("length", "x" * 482 + "<answer>5</answer>") == 0.5
    assert value("length", "x" * 5000 + "<answer>5</answer>") == 0.0
    assert value("length", "") == 0.0


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
PIECES = ["<answer>", "</answer>", "<reasoning>", "</reasoning>", "\n", "5", "-30", "1,000", "٤", "<|im_end|>", "é"]
TEXTS = st.one_of(ANY_TEXT, st.lists(st.one_of(st.sampled_from(PIECES), ANY_TEXT), max_size=10).map("".join))


@given(TEXTS, st.sampled_from(STYLES), st.sampled_from(sorted(PARSERS)), st.sampled_from(["-30", "1.5", "gold", ""]))
@settings(max_examples=300, deadline=None)
def test_every_reward_of_any_text_is_from_0_to_1(text, style, kind, gold):
    task = Rows(name="any", problems={}, files={}, style=style, kind=kind)
    for name, function in REWARDS.items():
        assert 0.0 <= function(task.grade(Problem("What?", gold), text)) <= 1.0, name


@pytest.mark.parametrize("piece", [*PIECES, "<reasoning>\n", "\n</answer>", "</reasoning>\n<answer>", " "])
def test_every_reward_is_linear_in_the_length_of_the_text(piece):
    attempt = Arithmetic(style="reasoning").grade(SUM, "<reasoning>\n" + piece * (1_000_000 // len(piece)))
    for name, function in REWARDS.items():
        start = time.perf_counter()
        function(attempt)
        assert time.perf_counter() - start < 1.0, name


def test_the_defaults_are_those_of_task_and_style():
    assert Arithmetic().default_rewards == Arithmetic(style="think").default_rewards == SHAPED
    assert Arithmetic(style="reasoning").default_rewards == DEMO == numbers_task().default_rewards
    assert Reverse(style="reasoning").default_rewards == {n: w for n, w in DEMO.items() if n != "integer"}
    names = {reward.name: reward.weight for reward in parse_rewards((), SHAPED)}
    assert names == {"format": 0.2, "close": 0.2, "exact": 0.6}


def test_given_rewards_replace_the_defaults_and_may_be_negative():
    rewards = parse_rewards(("exact=1", "length=-0.5", "language=1e-1"), SHAPED)
    assert [(reward.name, reward.weight) for reward in rewards] == [("exact", 1), ("length", -0.5), ("language", 0.1)]
    attempt = Arithmetic().grade(SUM, "<answer>-30</answer>")
    [reward] = score(rewards, [attempt], {}, untimed)
    # 1 - 0.5 (1 - 20/1000) + 0.1: exact, length of 20 characters, no letters outside the tags
    assert reward.total == pytest.approx(1 - 0.5 * 0.98 + 0.1)
    assert reward.total == sum(reward.parts.values())


@pytest.mark.parametrize(
    ("specs", "word"),
    [
        (["exact"], "NAME=WEIGHT"),
        (["=1"], "NAME=WEIGHT"),
        ([""], "NAME=WEIGHT"),
        (["exact="], "NAME=WEIGHT"),
        (["exact=much"], "NAME=WEIGHT"),
        (["exact=nan"], "NAME=WEIGHT"),
        (["exact=inf"], "NAME=WEIGHT"),
        (["exact=1e300"], "NAME=WEIGHT"),
        (["exact=1", "exact=2"], "twice"),
        (["excat=1"], "format, close, exact"),
        (["nowhere.py:f=1"], "nowhere.py"),
        ([".:f=1"], "'.'"),
        (["a\0b.py:f=1"], "cannot read"),
        ([":f=1"], "cannot read"),
    ],
)
def test_a_malformed_specification_is_refused_in_one_line(specs, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="reward") as caught:
        parse_rewards(specs, SHAPED)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 0.0), (12, 0.0), (13, -0.25), (14, -0.5), (16, -1.0), (20, -1.0)]
)
def test_the_soft_overlong_punishment_by_hand(tokens, expected):
    # 16 tokens at most, a buffer of 4: nothing up to 12, then a quarter a token
    settings = SimpleNamespace(reward=("exact=1",), overlong_buffer=4, max_new_tokens=16)
    [exact, penalty] = rewards_of(settings, Arithmetic())
    assert (exact.name, penalty.name, penalty.weight) == ("exact", "overlong", 1.0)
    assert penalty.function([None], {"completion_ids": [[7] * tokens]}) == [expected]
    settings.overlong_buffer = 0
    assert [reward.name for reward in rewards_of(settings, Arithmetic())] == ["exact"]
