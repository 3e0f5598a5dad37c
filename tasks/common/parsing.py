"""Parse the answer in the text of a completion.

A model learns to write whatever is rewarded, so a completion counts as an answer only if a person would read it as
one. It must hold exactly one answer block, with an answer of the right kind in it and nothing but white space after
it. Accuracy depends on that answer alone. The completion is well-formed if, in addition, the text before the block
has the form of the style: any text in the `answer` style, one think block in the `think` style, one reasoning block
in the `reasoning` style.

An answer has one of three kinds: `number`, which may have a sign, a dollar sign, thousands separators and decimals,
and is compared exactly; `integer`, a whole number; `text`, which must not be empty. Marks around a number and a unit
after it do not count: `**42**`, `\\boxed{42}`, `42 km` and `42 apples` are 42.

Every function accepts any string without an exception and takes time linear in its length. Tags are found by
`str.count` and `str.find`, because the pattern `<answer>(.*?)</answer>` takes 14 s on 20,000 unclosed tags. No text
is evaluated as code.
"""

import re
from decimal import Decimal

from tasks.base import Answer

OPEN, CLOSE = "<answer>", "</answer>"
# The tags of the block that a style requires before the answer.
BLOCKS = {"think": ("<think>", "</think>"), "reasoning": ("<reasoning>", "</reasoning>")}
PLACEHOLDER = "..."  # the text between the tags in the prompts: <answer>...</answer>

MINUS = "\N{MINUS SIGN}"
SPACES = " \N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}"
# Only ASCII digits, because `\d` and `int` also take "٤٢", and `int` takes "1_000". At most 18 digits and 9 decimals,
# because `Decimal` computes with 28 digits, and differences of answers must be exact.
_WHOLE = rf"(?:[0-9]{{1,18}}|[0-9]{{1,3}}(?:,[0-9]{{3}}){{1,5}}|[0-9]{{1,3}}(?:[{SPACES}][0-9]{{3}}){{1,5}})"
_SIGN = rf"(?:\$?(?P<sign>[-+{MINUS}]?)|(?P<outer_sign>[-+{MINUS}])\$)"  # $5, -5, $-5, -$5
_NUMBER = re.compile(rf"{_SIGN}(?P<digits>{_WHOLE}(?:\.[0-9]{{0,9}})?|\.[0-9]{{1,9}})")
# Words after a number that change its value or begin another expression, so they are not units.
_NOT_UNITS = {
    *("hundred", "thousand", "million", "billion", "trillion", "lakh", "crore", "dozen"),
    *("and", "or", "plus", "minus", "times", "point", "half"),
    *("k", "x", "y", "n", "i", "e"),
}
_SCALES = frozenset("十百千万萬亿億兆")  # Chinese and Japanese words for powers of ten
_UNIT_SIGNS = ("%", "$", "€", "£")
_MARKS = (("**", "**"), ("`", "`"), ("\\boxed{", "}"), ("\\text{", "}"), ("\\(", "\\)"), ("$", "$"))
MAX_MARKS = 4  # the largest number of pairs of marks that are removed around an answer
_SEPARATORS = str.maketrans("", "", "," + SPACES)


def answer_text(completion: str) -> str | None:
    """Return the stripped text of the only answer block, which must end the completion; None without such a block.

    >>> answer_text("4 - 9 = -5<answer> -30 </answer>\\n")
    '-30'
    >>> answer_text("<answer>1</answer> or <answer>2</answer>") is None
    True
    >>> answer_text("<answer>-30</answer> I think") is None
    True
    """
    completion = completion.rstrip()
    if completion.count(OPEN) != 1 or completion.count(CLOSE) != 1 or not completion.endswith(CLOSE):
        return None
    start, end = completion.find(OPEN), len(completion) - len(CLOSE)
    return None if start > end else completion[start + len(OPEN) : end].strip()


def has_form(completion: str, style: str, begun: str = "") -> bool:
    """Return whether the text before the answer has a style's form; `begun` is a <think> at the end of the prompt."""
    if style not in BLOCKS:
        return True
    rest = completion.partition(BLOCKS["think"][1])[2] if begun and style == "reasoning" else begun + completion
    text = rest.partition(OPEN)[0].strip()
    opening, closing = BLOCKS[style]
    return text.count(opening) == text.count(closing) == 1 and text.startswith(opening) and text.endswith(closing)


def parse_number(text: str) -> Decimal | None:
    """Parse a number with at most 18 digits before the point and 9 after it; return None for any other text.

    >>> [str(parse_number(text)) for text in ("-1,234.50", "-$18", "18.", ".5", "1 000")]
    ['-1234.50', '-18', '18', '0.5', '1000']
    >>> parse_number("12,34") is None
    True
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    number = Decimal(match["digits"].translate(_SEPARATORS))
    return -number if (match["sign"] or match["outer_sign"]) in ("-", MINUS) else number


def unmarked(text: str) -> str:
    r"""Return a text without the marks of Markdown and LaTeX around it.

    >>> unmarked(r"**\boxed{42}**")
    '42'
    """
    for _ in range(MAX_MARKS):
        pair = next(
            (p for p in _MARKS if len(text) > len("".join(p)) and text.startswith(p[0]) and text.endswith(p[1])), None
        )
        if pair is None:
            break
        text = text[len(pair[0]) : -len(pair[1])].strip()
    return text


def number_and_unit(text: str) -> tuple[Decimal, str] | None:
    """Return the number that a text begins with and the unit after it, at most two words; None for any other text.

    >>> number_and_unit("42 km")
    (Decimal('42'), 'km')
    >>> [number_and_unit(text) for text in ("42 or 43", "42 million", "42k")]
    [None, None, None]
    """
    match = _NUMBER.match(text)
    if match is None:
        return None
    rest = text[match.end() :]
    words = rest.split(maxsplit=2)
    attached_letter = rest[:1].isalpha() and len(words[0]) == 1  # 42k may be 42,000
    if attached_letter or len(words) > 2 or not all(map(_is_unit, words)):
        return None
    number = parse_number(match[0])
    return None if number is None else (number, " ".join(words).rstrip("."))


def _is_unit(word: str) -> bool:
    letters = word.rstrip(".²³").removeprefix("°").replace("/", "")
    is_scale = letters.casefold() in _NOT_UNITS or bool(_SCALES & set(letters))
    return word in _UNIT_SIGNS or (letters.isalpha() and not is_scale)


def parse_as(kind: str, text: str) -> Answer | None:
    """Parse a text as `kind`, or return None; marks around a number and a unit after it do not count."""
    parse = PARSERS[kind]
    answer = parse(text)
    if answer is None and kind != "text":
        answer = parse(bare_number(text))
    return answer


def bare_number(text: str) -> str:
    """Return a text without the marks around it and, if it is a number, without the unit after it.

    A percent sign is kept, because 25% may mean 25 or 0.25.
    """
    text = unmarked(text)
    pair = number_and_unit(text)
    return text if pair is None or pair[1] == "%" else format(pair[0], "f")


def parse_integer(text: str) -> int | None:
    """Parse an integer, such as -5, +5, 5.0 or 1,000; return None if the text is not a whole number."""
    number = parse_number(text)
    return None if number is None or number % 1 else int(number)


def parse_text(text: str) -> str | None:
    """Return a text without white space around it; None if nothing is left or only the prompt's placeholder."""
    text = text.strip()
    return None if text in ("", PLACEHOLDER) else text


PARSERS = {"integer": parse_integer, "number": parse_number, "text": parse_text}


def parse_answer(completion: str, kind: str = "integer") -> Answer | None:
    """Return the answer in a completion, parsed as `kind`, whatever text precedes it; None if there is no answer."""
    text = answer_text(completion)
    return None if text is None else parse_as(kind, text)
