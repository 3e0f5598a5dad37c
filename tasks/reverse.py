"""Spell a word backwards: a published example of a task that is too hard because of tokenization.

    Spell batori backwards.      <answer>irotab</answer>

A model that reads whole pieces of words as one token does not see the letters that it is asked to reverse. The
words are made up, with 4 to 8 letters, alternately consonants and vowels, so that no model knows them by heart.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from tasks.base import Problem
from tasks.common.drawn_task import DrawnTask

CONSONANTS = "bcdfghklmnprstvz"
VOWELS = "aeiou"
MIN_LETTERS = 4
MAX_LETTERS = 8
HINTS = {
    "too_hard": "In most models a token is a piece of a word: such tokens hide the letters that this task asks for."
}


@dataclass(frozen=True, kw_only=True)
class Reverse(DrawnTask):
    """The task of spelling words backwards (`tasks.base.Task`)."""

    name: str = "reverse"
    kind: str = "text"
    hints: Mapping[str, str] = field(default_factory=lambda: HINTS)

    def draw(self, rng: Random) -> Problem:
        """Return a random problem."""
        word = made_up_word(rng)
        return Problem(f"Spell {word} backwards.", word[::-1])

    def key(self, problem: Problem) -> str:
        """Return the same text for a word and for that word spelled backwards, so that both are in one split."""
        return min(problem.answer, problem.answer[::-1])


def made_up_word(rng: Random) -> str:
    """Sample a word of 4 to 8 letters, alternately consonants and vowels, that is not a palindrome."""
    while True:
        letters = (CONSONANTS, VOWELS) if rng.random() < 0.5 else (VOWELS, CONSONANTS)
        word = "".join(rng.choice(letters[i % 2]) for i in range(rng.randint(MIN_LETTERS, MAX_LETTERS)))
        if word != word[::-1]:
            return word
