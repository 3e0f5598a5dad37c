"""The answer in a completion, by hand: where it must stand, and how each kind of answer is written."""

from decimal import Decimal

import pytest

from tasks.common.parsing import answer_text, has_form, parse_answer, parse_integer, parse_number, parse_text

# What stands in the block, without white space around it; None where there is not exactly one block at the end.
BLOCKS = [
    ("<answer>5</answer>", "5"),
    ("<answer></answer>", ""),
    ("<answer> 5 </answer>", "5"),
    ("<answer>\r\n\t5\u00a0\n</answer> \n\n", "5"),
    ("<answer>...</answer>", "..."),
    ("<answer>five</answer>", "five"),
    ("4 - 9 = -5\n<answer>-30</answer>", "-30"),
    ("4 - 9 = -5 < 0 > <answer>-30</answer>", "-30"),
    ("<Answer>1</Answer><answer>5</answer>", "5"),  # tags of another case are text
    ("<answer ><answer>5</answer>", "5"),  # and so is a tag with a space in it
    ("<<answer>>5</answer>", ">5"),
    ("<answer><</answer>", "<"),
    ("<answer>5\n</answer>", "5"),
    ("<answer>5 6</answer>", "5 6"),
    ("<answer>5</answer> ", "5"),
    ("<answer>5</answer>\n", "5"),
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
    ("<answer>5</answer>\x00", None),
    ("<answer>5</answer>\u200b", None),  # of no width, but no white space
    ("<answer>5</answer>\n.", None),
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
def test_only_one_block_at_the_end_is_an_answer(completion, expected):
    assert answer_text(completion) == expected


# A number is what a person writes for one, within 18 digits and 9 decimals: sign, dollar sign, thousands, decimals.
NUMBERS = [
    ("0", "0"),
    ("72", "72"),
    ("-5", "-5"),
    ("+5", "5"),
    ("-0", "0"),
    ("007", "7"),
    ("-007", "-7"),
    ("1,234", "1234"),
    ("-109,200,000", "-109200000"),
    ("1,234.50", "1234.5"),
    ("1 000", "1000"),
    ("-1 234 567.5", "-1234567.5"),
    ("1\u00a0000", "1000"),  # a no-break space, as typesetters put it
    ("1\u202f000\u2009000", "1000000"),  # a narrow one and a thin one
    ("0.1", "0.1"),
    (".5", "0.5"),
    ("-.5", "-0.5"),
    ("18.", "18"),
    ("18.00", "18"),
    ("−5", "-5"),  # U+2212, the minus sign of typesetters
    ("−1,000.5", "-1000.5"),
    ("$18", "18"),
    ("-$18", "-18"),
    ("−$18", "-18"),
    ("$-18", "-18"),
    ("+$1,000.50", "1000.5"),
    ("$.5", "0.5"),
    ("999999999999999999", "999999999999999999"),  # 18 digits
    ("-999999999999999999", "-999999999999999999"),
    ("999,999,999,999,999,999", "999999999999999999"),
    ("0.123456789", "0.123456789"),
    *((text, None) for text in ("", "-", "+", "$", "-$", ",", ".", "-.", "$.", "--5", "+-5", "−-5", "-$-5", "$$5")),
    *((text, None) for text in ("- 5", "$ 5", " 5", "5 ", "5\n", "\n5", "\t5", "\u00a05", "\ufeff5", "5\u200b")),
    *((text, None) for text in ("1,23", "12,34", "1234,567", ",123", "1,", "1,,234", "1,2345", "1, 234", "1.234,5")),
    *((text, None) for text in ("5,0", "1 00", "12 34", "1  000", "1 0000", "1\n000", "1\t000", "1,000 000", "5 6")),
    *((text, None) for text in ("1.2.3", "1..5", "..5", "5..", "1 000.000 000", "1.000,5", "1'000", "1_000", "1 .5")),
    *((text, None) for text in ("1e3", "0x5", "0b1", "5j", "5/1", "1/2", "5%", "5$", "€5", "£5", "2+3", "(5)", "=5")),
    *((text, None) for text in ("5 or 6", "5 apples", "five", "...", "…", "nan", "inf", "-inf", "Infinity", "sNaN")),
    *((text, None) for text in ("None", "True", "5-", "5+", "–5", "—5", "‐5", "-5-", "**5**", "`5`", "\\boxed{5}")),
    # `\d` takes the first three, `str.isdigit` more of them
    *(
        (text, None)
        for text in ("٤٢", "४२", "４２", "²", "①", "Ⅳ", "五", "½", "\U0001d7d3", "5\x00", "\x005", "\ud800")
    ),
    *((text, None) for text in ("1" * 19, "0" * 18 + "5", "1," + "000," * 5 + "000", "1 " + "000 " * 5 + "000")),
    # `int` raises on more than 4,300 digits
    *((text, None) for text in ("9" * 5000, "-" + "1" * 5000, "0." + "1" * 10, "99**98**97", "__import__('os')")),
]

# no number by themselves, but the answer of a completion
MARKED = ("5$", "5 apples", "**5**", "`5`", "\\boxed{5}")


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_a_number_is_what_a_person_writes_for_one(text, expected):
    number = parse_number(text)
    assert number == (None if expected is None else Decimal(expected))
    if text not in MARKED:
        assert parse_answer(f"<answer>{text}</answer>", "number") == parse_number(text.strip())


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_an_integer_is_a_number_that_is_whole(text, expected):
    whole = expected is not None and Decimal(expected) == Decimal(expected).to_integral_value()
    integer = parse_integer(text)
    assert integer == (Decimal(expected) if whole else None)
    assert type(integer) is (int if whole else type(None))
    if text not in MARKED:
        assert parse_answer(f"<answer>{text}</answer>") == parse_integer(text.strip())


@pytest.mark.parametrize(
    "text",
    [
        *(*MARKED, "$5$", "$\\boxed{5}$", "**\\boxed{5}**", "\\(5\\)", "5 km", "5km", "5 g", "5 km/h", "5 m²", "5°C"),
        *("$5.00", "5 square meters", "5 apples.", "5 りんご", "5.0 kg"),
    ],
)
def test_marks_around_a_number_and_a_unit_after_it_do_not_count(text):
    for kind in ("integer", "number"):
        assert parse_answer(f"<answer>{text}</answer>", kind) == 5


@pytest.mark.parametrize(
    "text",
    [
        *("5 or 6", "5 apples or 6", "5 million", "5 dozen eggs", "5k", "5 k", "5 and a half", "5 plus one", "5m"),
        *(
            "5x",
            "5%",
            "5 ½",
            "5 万",
            "5万",
            "5 big red apples",
            "5 / 2",
            "5/2",
            "\\boxed{5} or **6**",
            "about 5",
            "5-6 km",
        ),
    ],
)
def test_words_that_change_a_number_make_it_no_answer(text):
    for kind in ("integer", "number"):
        assert parse_answer(f"<answer>{text}</answer>", kind) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5.0", 5), ("+5", 5), ("1,000", 1000), ("5.", 5), ("-5.000000000", -5), ("5.5", None), ("0.999999999", None)],
)
def test_whole_numbers_by_hand(text, expected):
    assert parse_integer(text) == expected


# The style think wants one think block before the answer, with nothing but white space around it: form True, else
# False. The answer counts either way, as far as there is one.
THINK = [
    ("<think>4 - 9 = -5</think><answer>-30</answer>", -30, True),
    ("<think></think><answer>5</answer>", 5, True),
    ("\n <think>a\nb</think>\n\n<answer>5</answer>", 5, True),
    ("<think>a < b > c</think><answer>5</answer>", 5, True),
    ("<think>a</think><answer>5</answer>\n", 5, True),
    ("<answer>5</answer>", 5, False),
    (" <answer>5</answer>", 5, False),
    ("4 - 9 = -5\n<answer>5</answer>", 5, False),
    ("<think><answer>5</answer>", 5, False),
    ("</think><answer>5</answer>", 5, False),
    ("</think><think><answer>5</answer>", 5, False),
    ("<think>a</think>b<answer>5</answer>", 5, False),
    ("b<think>a</think><answer>5</answer>", 5, False),
    ("<think>a</think><think>b</think><answer>5</answer>", 5, False),
    ("<think><think>a</think></think><answer>5</answer>", 5, False),
    ("<think>a</think></think><answer>5</answer>", 5, False),
    ("<think><think>a</think><answer>5</answer>", 5, False),
    ("<Think>a</Think><answer>5</answer>", 5, False),
    ("<think>a</think >\n<answer>5</answer>", 5, False),
    ("<thinking>a</thinking><answer>5</answer>", 5, False),
    ("<reasoning>a</reasoning><answer>5</answer>", 5, False),
    ("<think>a<answer>5</answer></think>", None, False),
    ("<think><answer>5</answer></think><answer>5</answer>", None, False),
    ("<answer>5</answer><think>a</think>", None, False),
    ("<answer><think>a</think>5</answer>", None, False),
    ("<think>a</think><answer>...</answer>", None, True),
    ("<think>a</think><answer></answer>", None, True),
    ("<think>a</think>", None, True),
    ("<think", None, False),
    ("", None, False),
]


@pytest.mark.parametrize("style", ["think", "reasoning"])
@pytest.mark.parametrize(("completion", "answer", "form"), THINK)
def test_a_style_wants_one_block_of_its_own_and_the_answer_counts_without(completion, answer, form, style):
    swapped = completion.replace("reasoning", "\0").replace("think", style).replace("\0", "think")
    completion = swapped if style == "reasoning" else completion
    assert parse_answer(completion) == answer
    assert has_form(completion, style) == form


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
    assert parse_answer(f"<answer>{text}</answer>", "text") == expected


def test_the_answer_style_leaves_what_stands_before_the_block_free():
    for before in ("", "x", "</think>", "<think>", "4 - 9 = -5\n", "\x00\ud800", "<answer", "answer>"):
        completion = f"{before}<answer>5</answer>"
        assert parse_answer(completion) == 5
        assert has_form(completion, "answer")
