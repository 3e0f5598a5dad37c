"""The named reward functions and their weights.

Each function takes an `Attempt` and returns a number from 0 to 1. It accepts any completion and takes time linear in
its length. To add a reward, write it here and name it in REWARDS, or keep it in a file of your own (`--reward
FILE.py:FUNCTION=WEIGHT`, see `tasks/common/user_file.py`). In the metrics, `reward/<name>` is the mean of a
reward times its weight.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

from tasks.base import Answer, Attempt
from tasks.common.parsing import BLOCKS, CLOSE, OPEN, parse_as

LENGTH_WITHOUT_REWARD = 1000  # The reward `length` is 0 for a completion of at least this many characters.
REASONING_OPEN, REASONING_CLOSE = BLOCKS["reasoning"]
TAGS = (OPEN, CLOSE, *BLOCKS["think"], *BLOCKS["reasoning"])
END_MARKERS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>")
ENDINGS = (*(tag for tag in TAGS if tag.startswith("</")), *END_MARKERS)
# The default weights in all styles but `reasoning`.
SHAPED = {"format": 0.2, "close": 0.2, "exact": 0.6}
# The default weights in the `reasoning` style: those of the well-known GSM8K demo for TRL
# (https://gist.github.com/willccbb, grpo_demo.py).
DEMO = {"correctness": 2.0, "integer": 0.5, "strict_format": 0.5, "soft_format": 0.5, "xml_count": 0.5}


def _last_answer(attempt: Attempt) -> Answer | None:
    """Parse the text between the last <answer> and the next </answer>; return None if no valid answer is there."""
    _, opening, rest = attempt.completion.rpartition(OPEN)
    text, closing, _ = rest.partition(CLOSE)
    return parse_as(attempt.kind, text.strip()) if opening and closing else None


def correctness(attempt: Attempt) -> float:
    """Return 1 if the last answer block holds the problem's own answer, whatever text is around the block."""
    answer = _last_answer(attempt)
    gold = attempt.gold
    if isinstance(answer, str) or isinstance(gold, str) or answer is None or gold is None:
        return float(answer is not None and answer == gold)
    return float(abs(answer - gold) <= attempt.problem.tolerance)


def integer(attempt: Attempt) -> float:
    """Return 1 if the last answer block holds a whole number (any number, if the right answer is not whole)."""
    answer = _last_answer(attempt)
    gold = attempt.gold
    if answer is None or isinstance(answer, str):
        return 0.0
    return float(answer % 1 == 0 or (gold is not None and gold % 1 != 0))


def strict_format(attempt: Attempt) -> float:
    r"""Return 1 for `<reasoning>\n…\n</reasoning>\n<answer>\n…\n</answer>`, with or without a line feed after it."""
    text = attempt.completion.removesuffix("\n")
    middle = f"\n{REASONING_CLOSE}\n{OPEN}\n"
    once = all(text.count(tag) == 1 for tag in (REASONING_OPEN, REASONING_CLOSE, OPEN, CLOSE, middle))
    inside = text.removeprefix(f"{REASONING_OPEN}\n").removesuffix(f"\n{CLOSE}")
    framed = len(text) - len(inside) == len(REASONING_OPEN) + len(CLOSE) + 2
    return float(once and framed and middle in inside)


def soft_format(attempt: Attempt) -> float:
    """Return 1 for a reasoning block at the start, then an answer block; white space may separate them."""
    text = attempt.completion.lstrip()
    _, closing, rest = text.partition(REASONING_CLOSE)
    rest = rest.lstrip()
    return float(text.startswith(REASONING_OPEN) and bool(closing) and rest.startswith(OPEN) and CLOSE in rest)


def xml_count(attempt: Attempt) -> float:
    """Return 0.25 for each of the four tags that occurs exactly once and on a line of its own.

    Each character after the last `</answer>` and its line feed costs 0.001; the sum is at least 0.
    """
    text = attempt.completion
    marks = (f"{REASONING_OPEN}\n", f"\n{REASONING_CLOSE}\n", f"\n{OPEN}\n", f"\n{CLOSE}")
    after = text.rpartition(CLOSE)[2].removeprefix("\n") if CLOSE in text else ""
    return max(0.0, 0.25 * sum(text.count(mark) == 1 for mark in marks) - 0.001 * len(after))


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    """Return the first word of a letter's Unicode name: LATIN, CYRILLIC, CJK, …; "" if it is not a letter."""
    return unicodedata.name(letter, "").partition(" ")[0] if letter.isalpha() else ""


def language(attempt: Attempt) -> float:
    """Return the share of the completion's letters, without tags, that are in a script of the question.

    Return 1 if the question or the completion has no letters.
    """
    scripts = {_script(c) for c in attempt.problem.question} - {""}
    text = attempt.completion
    for tag in TAGS:
        text = text.replace(tag, " ")
    counts = {letter: count for letter, count in Counter(text).items() if _script(letter)}
    inside = sum(count for letter, count in counts.items() if _script(letter) in scripts)
    return inside / sum(counts.values()) if counts and scripts else 1.0


def one_ending(attempt: Attempt) -> float:
    """Return 1 if the completion ends in `</answer>`, repeats no tag, and has no end marker such as <|im_end|>."""
    text = attempt.completion.rstrip()
    repeated = any(text.count(tag) > 1 for tag in TAGS) or any(marker in text for marker in END_MARKERS)
    return float(text.endswith(CLOSE) and not repeated)


def repeats_an_ending(completion: str) -> bool:
    """Return whether a closing tag or an end marker is repeated, as by a model that does not know where to stop."""
    return any(completion.count(ending) > 1 for ending in ENDINGS)


def length(attempt: Attempt) -> float:
    """Return 1 − characters / 1000, but never less than 0; 0 if the completion is not well-formed."""
    return max(0.0, 1 - len(attempt.completion) / LENGTH_WITHOUT_REWARD) if attempt.well_formed else 0.0


REWARDS: dict[str, Callable[[Attempt], float]] = {
    "format": lambda attempt: float(attempt.well_formed),
    "close": lambda attempt: float(attempt.close),
    "exact": lambda attempt: float(attempt.correct),
    "correctness": correctness,
    "integer": integer,
    "strict_format": strict_format,
    "soft_format": soft_format,
    "xml_count": xml_count,
    "language": language,
    "one_ending": one_ending,
    "length": length,
}
