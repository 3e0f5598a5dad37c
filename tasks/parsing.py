"""From the text of a completion to its answer.

Strict on purpose: whatever is paid for is what the model will learn to write. A completion is well-formed
if it holds exactly one answer block, with an integer in it and nothing after it. What stands before the
block is free in the `answer` style, and one think block in the `think` style.

Every function is total (any string, no exception) and linear in the length of the text: `str.count` and
`str.find` instead of `<answer>(.*?)</answer>`, which takes 14 s on 20,000 unclosed tags. Text is never
evaluated.
"""

import re

OPEN, CLOSE = "<answer>", "</answer>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

# ASCII digits only: `\d` and `int` also take "٤٢", and `int` takes "1_000". 18 digits fit in 64 bits;
# without a bound, `int` raises on more than 4,300 digits.
_INTEGER = re.compile(r"-?[0-9]{1,18}")


def answer_text(completion: str) -> str | None:
    """What stands in the one answer block at the very end of a completion, or None.

    >>> answer_text("4 - 9 = -5<answer>-30</answer>")
    '-30'
    >>> answer_text("<answer>1</answer> or <answer>2</answer>") is None
    True
    >>> answer_text("<answer>-30</answer> I think") is None
    True
    """
    if completion.count(OPEN) != 1 or completion.count(CLOSE) != 1 or not completion.endswith(CLOSE):
        return None
    start = completion.find(OPEN) + len(OPEN)
    end = len(completion) - len(CLOSE)
    return completion[start:end] if start <= end else None


def parse_integer(text: str) -> int | None:
    """The integer that a text is, written in full as -?[0-9]+ (at most 18 digits), or None."""
    return int(text) if _INTEGER.fullmatch(text) else None


def parse_answer(completion: str, style: str = "answer") -> int | None:
    """The integer that a well-formed completion answers with, or None where it is not well-formed."""
    text = answer_text(completion)
    if text is None or (style == "think" and not _one_think_block(completion[: completion.find(OPEN)])):
        return None
    return parse_integer(text)


def _one_think_block(text: str) -> bool:
    """Whether a text is one think block and white space, nothing else."""
    text = text.strip()
    return (
        text.startswith(THINK_OPEN)
        and text.endswith(THINK_CLOSE)
        and text.count(THINK_OPEN) == 1
        and text.count(THINK_CLOSE) == 1
    )
