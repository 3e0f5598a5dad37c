"""Spell a word backwards: the published example of a task that is too hard because of tokenization.

    Spell batori backwards.      <answer>irotab</answer>

A model that reads whole pieces of words as one token does not see the letters that it is asked to reverse. The
words are made up, 4 to 8 letters with consonants and vowels in turn, so that no model knows them by heart.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from tasks.base import Problem, seeded_rng, split_of
from tasks.common.qa_task import QATask

CONSONANTS, VOWELS = "bcdfghklmnprstvz", "aeiou"
SHORTEST, LONGEST = 4, 8
HINTS = {
    "too_hard": "Where a token is a piece of a word, as in most models, tokens hide the letters that are asked for."
}


@dataclass(frozen=True, kw_only=True)
class Reverse(QATask):
    """The task of words backwards (`tasks.base.Task`)."""

    name: str = "reverse"
    kind: str = "text"
    hints: Mapping[str, str] = field(default_factory=lambda: HINTS)

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """Return the training problem of a row of a step."""
        rng = seeded_rng("reverse", seed, step, row)
        while True:
            word = made_up_word(rng)
            if _split(word) == "train":
                return _problem(word)

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Return up to `limit` different problems of a held-out split."""
        rng = seeded_rng("reverse", split)
        words = (made_up_word(rng) for _ in range(100 * limit))
        return [_problem(word) for word in dict.fromkeys(w for w in words if _split(w) == split)][:limit]


def made_up_word(rng: Random) -> str:
    """Sample a word of 4 to 8 letters, consonants and vowels in turn, that is not the same backwards."""
    while True:
        letters = (CONSONANTS, VOWELS) if rng.random() < 0.5 else (VOWELS, CONSONANTS)
        word = "".join(rng.choice(letters[i % 2]) for i in range(rng.randint(SHORTEST, LONGEST)))
        if word != word[::-1]:
            return word


def _split(word: str) -> str:
    """Return the split of a word, which it shares with the word spelled backwards."""
    return split_of(min(word, word[::-1]))


def _problem(word: str) -> Problem:
    return Problem(f"Spell {word} backwards.", word[::-1])
