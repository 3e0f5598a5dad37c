"""Parse the answer in the text of a completion.

Parsing is strict on purpose: a model learns to write whatever is paid for. A completion is well-formed if it
holds exactly one answer block, with an answer of the right kind in it and nothing after it. Before the block may
stand any text in the `answer` style, one think block in the `think` style, and one reasoning block in the
`reasoning` style, which alone allows white space inside the answer block and after it.

An answer has one of three kinds: `integer`, as Python writes it; `number`, with a sign, thousands separators and
decimals if need be, compared exactly; `text`, which must not be empty.

Every function accepts any string without an exception and takes time linear in its length. That is why they use
`str.count` and `str.find`: `<answer>(.*?)</answer>` takes 14 s on 20,000 unclosed tags. Text is never evaluated.
"""

import re
from decimal import Decimal

from tasks.base import Answer

OPEN, CLOSE = "<answer>", "</answer>"
# the tags of the block that a style requires before the answer
BLOCKS = {"think": ("<think>", "</think>"), "reasoning": ("<reasoning>", "</reasoning>")}
PLACEHOLDER = "..."  # what the prompts show between the tags: <answer>...</answer>

# ASCII digits only: `\d` and `int` also take "٤٢", and `int` takes "1_000". 18 digits fit in 64 bits;
# without a bound, `int` raises on more than 4,300 digits.
_INTEGER = re.compile(r"-?[0-9]{1,18}")
# 18 digits and 9 decimals: `Decimal` subtracts exactly what has up to 28
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,18}|[0-9]{1,3}(?:,[0-9]{3}){1,5})(?:\.[0-9]{1,9})?")


def answer_text(completion: str, style: str = "answer") -> str | None:
    """Return the text in the one answer block at the very end of a completion, or None.

    >>> answer_text("4 - 9 = -5<answer>-30</answer>")
    '-30'
    >>> answer_text("<answer>1</answer> or <answer>2</answer>") is None
    True
    >>> answer_text("<answer>-30</answer> I think") is None
    True
    """
    if style == "reasoning":
        completion = completion.rstrip()
    if completion.count(OPEN) != 1 or completion.count(CLOSE) != 1 or not completion.endswith(CLOSE):
        return None
    start = completion.find(OPEN)
    end = len(completion) - len(CLOSE)
    if start > end or (style in BLOCKS and not _one_block(completion[:start], *BLOCKS[style])):
        return None
    text = completion[start + len(OPEN) : end]
    return text.strip() if style == "reasoning" else text


def parse_integer(text: str) -> int | None:
    """Return the integer that a text is, written in full as -?[0-9]+ (at most 18 digits), or None."""
    return int(text) if _INTEGER.fullmatch(text) else None


def parse_number(text: str) -> Decimal | None:
    """Return the number that a text is, or None: at most 18 digits, separators in groups of three, 9 decimals.

    >>> parse_number("-1,234.50")
    Decimal('-1234.50')
    >>> parse_number("12,34") is None
    True
    """
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def parse_text(text: str) -> str | None:
    """Return a text without the white space around it; None if nothing, or the prompt's placeholder, is left."""
    text = text.strip()
    return None if text in ("", PLACEHOLDER) else text


PARSERS = {"integer": parse_integer, "number": parse_number, "text": parse_text}


def parse_answer(completion: str, style: str = "answer", kind: str = "integer") -> Answer | None:
    """Return the answer of a kind that a well-formed completion gives; None if it is not well-formed."""
    text = answer_text(completion, style)
    return None if text is None else PARSERS[kind](text)


def _one_block(text: str, opening: str, closing: str) -> bool:
    """Return whether a text is exactly one block with these tags, apart from white space around it."""
    text = text.strip()
    return (
        text.startswith(opening) and text.endswith(closing) and text.count(opening) == 1 and text.count(closing) == 1
    )
