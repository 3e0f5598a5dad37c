"""The answer in a completion, by hand: where it must stand, and how each kind of answer is written."""

from decimal import Decimal

import pytest

from tasks.common.parsing import answer_text, parse_answer, parse_integer, parse_number, parse_text

# What stands in the block, whatever it is; None where there is not exactly one block at the very end.
BLOCKS = [
    ("<answer>5</answer>", "5"),
    ("<answer></answer>", ""),
    ("<answer> 5 </answer>", " 5 "),
    ("<answer>...</answer>", "..."),
    ("<answer>five</answer>", "five"),
    ("4 - 9 = -5\n<answer>-30</answer>", "-30"),
    ("4 - 9 = -5 < 0 > <answer>-30</answer>", "-30"),
    ("<Answer>1</Answer><answer>5</answer>", "5"),  # tags of another case are text
    ("<answer ><answer>5</answer>", "5"),  # and so is a tag with a space in it
    ("<<answer>>5</answer>", ">5"),
    ("<answer><</answer>", "<"),
    ("<answer>5\n</answer>", "5\n"),
    ("<answer>\ud800\x00</answer>", "\ud800\x00"),
    ("", None),
    ("5", None),
    ("<answer>", None),
    ("</answer>", None),
    ("<answer>5", None),
    ("5</answer>", None),
    ("<answer>5<answer>", None),
    ("</answer>5<answer>", None),
    ("</answer><answer>5", None),
    ("</answer><answer>5</answer>", None),  # two closing tags
    ("<answer>5</answer></answer>", None),
    ("<answer><answer>5</answer>", None),
    ("<answer><answer>5</answer></answer>", None),
    ("<answer>5</answer><answer>5</answer>", None),
    ("<answer>1</answer> or <answer>5</answer>", None),
    ("<answer>...</answer> <answer>5</answer>", None),  # the prompt echoed, then an answer
    ("<answer>5</answer> ", None),
    ("<answer>5</answer>\n", None),
    ("<answer>5</answer>\x00", None),
    ("<answer>5</answer>.", None),
    ("<answer>5</answer><|im_end|>", None),
    ("<answer>5</answer> I think", None),
    ("<ANSWER>5</ANSWER>", None),
    ("<Answer>5</Answer>", None),
    ("<answer>5</Answer>", None),
    ("<answer>5</answer >", None),
    ("<answer >5</answer>", None),
    ("< answer>5</answer>", None),
    ("<answer/>5</answer>", None),
    ("<answer>5<\\answer>", None),
    ("<answ\u0435r>5</answ\u0435r>", None),  # a Cyrillic е
    ("&lt;answer&gt;5&lt;/answer&gt;", None),
    ("＜answer＞5＜/answer＞", None),
    ("\\boxed{5}", None),
    ("#### 5", None),
]


@pytest.mark.parametrize(("completion", "expected"), BLOCKS)
def test_only_one_block_at_the_very_end_is_an_answer(completion, expected):
    assert answer_text(completion) == expected


# An integer is -?[0-9]+ in full. All that `int`, `\d`, `str.isdigit` or `eval` would take besides is None.
INTEGERS = [
    ("0", 0),
    ("5", 5),
    ("-5", -5),
    ("-0", 0),
    ("007", 7),
    ("-007", -7),
    ("999999999999999999", 10**18 - 1),  # 18 digits
    ("-999999999999999999", 1 - 10**18),
    ("1000000000000000000", None),  # 19 digits
    ("0" * 18 + "5", None),
    ("9" * 5000, None),  # `int` raises on more than 4,300 digits
    ("-" + "1" * 5000, None),
    ("", None),
    ("-", None),
    ("--5", None),
    ("+5", None),
    ("+-5", None),
    ("- 5", None),
    (" 5", None),
    ("5 ", None),
    ("5\n", None),  # `$` would match before the line feed
    ("\n5", None),
    ("\t5", None),
    ("\u00a05", None),
    ("\ufeff5", None),
    ("5\u200b", None),
    ("5\x00", None),
    ("\x005", None),
    ("5.0", None),
    ("5.", None),
    (".5", None),
    ("5,0", None),
    ("1,000", None),
    ("1_000", None),
    ("1 000", None),
    ("1e3", None),
    ("0x5", None),
    ("0b1", None),
    ("5j", None),
    ("5/1", None),
    ("2+3", None),
    ("(5)", None),
    ("5%", None),
    ("$5", None),
    ("=5", None),
    ("5 or 6", None),
    ("five", None),
    ("...", None),
    ("…", None),
    ("nan", None),
    ("inf", None),
    ("-inf", None),
    ("None", None),
    ("True", None),
    ("٤٢", None),  # Arabic-Indic
    ("४२", None),  # Devanagari
    ("４２", None),  # fullwidth
    ("²", None),
    ("①", None),
    ("Ⅳ", None),
    ("五", None),
    ("\U0001d7d3", None),  # a mathematical bold 5
    ("−5", None),  # U+2212, the minus sign of typesetters
    ("–5", None),
    ("\ud800", None),
    ("5\udfff", None),
    ("__import__('os')", None),
    ("99**98**97", None),
]


@pytest.mark.parametrize(("text", "expected"), INTEGERS)
def test_an_integer_is_ascii_digits_in_full(text, expected):
    assert parse_integer(text) == expected
    assert parse_answer(f"<answer>{text}</answer>") == expected
    assert type(parse_integer(text)) is type(expected)


# style think: one think block, white space around it, then the answer; nothing else.
THINK = [
    ("<think>4 - 9 = -5</think><answer>-30</answer>", -30),
    ("<think></think><answer>5</answer>", 5),
    ("\n <think>a\nb</think>\n\n<answer>5</answer>", 5),
    ("<think>a < b > c</think><answer>5</answer>", 5),
    ("<answer>5</answer>", None),
    (" <answer>5</answer>", None),
    ("4 - 9 = -5\n<answer>5</answer>", None),
    ("<think><answer>5</answer>", None),
    ("</think><answer>5</answer>", None),
    ("</think><think><answer>5</answer>", None),
    ("<think>a</think>b<answer>5</answer>", None),
    ("b<think>a</think><answer>5</answer>", None),
    ("<think>a</think><think>b</think><answer>5</answer>", None),
    ("<think><think>a</think></think><answer>5</answer>", None),
    ("<think>a</think></think><answer>5</answer>", None),
    ("<think><think>a</think><answer>5</answer>", None),
    ("<think>a<answer>5</answer></think>", None),
    ("<think><answer>5</answer></think><answer>5</answer>", None),
    ("<answer>5</answer><think>a</think>", None),
    ("<answer><think>a</think>5</answer>", None),
    ("<think>a</think><answer>5</answer>\n", None),
    ("<think>a</think><answer>...</answer>", None),
    ("<think>a</think><answer></answer>", None),
    ("<Think>a</Think><answer>5</answer>", None),
    ("<think>a</think >\n<answer>5</answer>", None),
    ("<thinking>a</thinking><answer>5</answer>", None),
    ("<think", None),
    ("", None),
]


@pytest.mark.parametrize(("completion", "expected"), THINK)
def test_the_think_style_wants_one_think_block_and_nothing_else(completion, expected):
    assert parse_answer(completion, "think") == expected


# style reasoning: one reasoning block, then the answer; white space around both, in the answer block, and at the end.
REASONING = [
    ("<reasoning>\n4 - 9 = -5\n</reasoning>\n<answer>\n-30\n</answer>\n", -30),
    ("<reasoning>4 - 9 = -5</reasoning><answer>-30</answer>", -30),
    (" \n<reasoning></reasoning> \n <answer> 5\t</answer> \n\n", 5),
    ("<answer>5</answer>", None),
    ("so <reasoning>a</reasoning><answer>5</answer>", None),
    ("<reasoning>a</reasoning> so <answer>5</answer>", None),
    ("<reasoning>a</reasoning><answer>5</answer>.", None),
    ("<reasoning>a</reasoning><answer>5</answer><|im_end|>", None),
    ("<reasoning>a</reasoning><answer>...</answer>", None),
    ("<reasoning>a</reasoning><answer> </answer>", None),
    ("<reasoning>a</reasoning><answer>5 6</answer>", None),
    ("<reasoning>a</reasoning><answer>5</answer><answer>5</answer>", None),
    ("<reasoning>a</reasoning><reasoning>a</reasoning><answer>5</answer>", None),
    ("<reasoning><reasoning>a</reasoning></reasoning><answer>5</answer>", None),
    ("<reasoning>a<answer>5</answer></reasoning>", None),
    ("<reasoning><answer>5</answer></reasoning><answer>5</answer>", None),
    ("<think>a</think><answer>5</answer>", None),
    ("<answer>5</answer><reasoning>a</reasoning>", None),
    ("", None),
]


@pytest.mark.parametrize(("completion", "expected"), REASONING)
def test_the_reasoning_style_wants_one_reasoning_block_and_allows_white_space(completion, expected):
    assert parse_answer(completion, "reasoning") == expected


# A number is what GSM8K writes; every one of these that is not None is an exact decimal.
NUMBERS = [
    ("0", "0"),
    ("72", "72"),
    ("-5", "-5"),
    ("+5", "5"),
    ("007", "7"),
    ("1,234", "1234"),
    ("-109,200,000", "-109200000"),
    ("1,234.50", "1234.5"),
    ("0.1", "0.1"),
    ("18.00", "18"),
    ("999,999,999,999,999,999", "999999999999999999"),
    ("0.123456789", "0.123456789"),
    *((text, None) for text in ("", "-", "+", ",", ".", "--5", "+-5", "- 5", " 5", "5 ", "5\n", "5.", ".5", "-.5")),
    *((text, None) for text in ("1,23", "12,34", "1234,567", ",123", "1,", "1,,234", "1,2345", "1, 234", "1.234,5")),
    *(
        (text, None)
        for text in ("1_000", "1 000", "1e3", "0x5", "5/1", "1/2", "5%", "$5", "5$", "2+3", "(5)", "5 or 6")
    ),
    *((text, None) for text in ("nan", "inf", "-inf", "Infinity", "sNaN", "None", "True", "five", "...", "…")),
    *((text, None) for text in ("٤٢", "४२", "４２", "²", "①", "Ⅳ", "五", "½", "\U0001d7d3", "−5", "5\x00", "\ud800")),
    *((text, None) for text in ("1" * 19, "9" * 5000, "0." + "1" * 10, "1," + "000," * 6 + "000", "99**98**97")),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_a_number_is_ascii_digits_with_separators_where_they_belong(text, expected):
    number = parse_number(text)
    assert number == (None if expected is None else Decimal(expected))
    assert parse_answer(f"<answer>{text}</answer>", kind="number") == number


def test_numbers_are_compared_exactly():
    # As floats all three pairs would be equal, or 0.1 * 3 and 0.3 not.
    assert parse_number("100000000000000001") != parse_number("100000000000000000")
    assert parse_number("0.300000001") != parse_number("0.3")
    assert parse_number("0.3") == Decimal(3) / 10
    assert parse_number("999999999999999999.999999999") - parse_number("999999999999999998.999999999") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("enots", "enots"),
        (" enots\n", "enots"),
        ("two words", "two words"),
        ("北京", "北京"),
        ("<b>", "<b>"),
        ("0", "0"),
        ("", None),
        (" \t\n", None),
        ("...", None),  # the prompt's placeholder
        (" ... ", None),
    ],
)
def test_a_text_is_anything_but_nothing_and_the_placeholder(text, expected):
    assert parse_text(text) == expected
    assert parse_answer(f"<answer>{text}</answer>", kind="text") == expected


def test_the_answer_style_leaves_what_stands_before_the_block_free():
    for before in ("", "x", "</think>", "<think>", "4 - 9 = -5\n", "\x00\ud800", "<answer", "answer>"):
        assert parse_answer(f"{before}<answer>5</answer>") == 5
