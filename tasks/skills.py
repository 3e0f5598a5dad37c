"""The starter's neighbouring skills, as small tasks.

GRPO does not train them; training on `arithmetic` may spoil them. Each has training problems
(for `grpo/starter/build.py`) and held-out problems of its own, disjoint by the same hash.

    single     What is -5 * 6?                         <answer>-30</answer>
    larger     Which is larger, 47 or 83?               <answer>83</answer>
    backwards  Spell stone backwards.                   enots
    letters    How many letters are in stone?           5
"""

import string
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from random import Random

from tasks.arithmetic import OPERATORS, apply
from tasks.base import Attempt, Message, Problem, seeded_rng, split_of
from tasks.common.prompts import chat, ideal_completion, system_prompt
from tasks.common.qa_task import QATask


@dataclass(frozen=True)
class Skill(QATask):
    """A neighbouring skill (`tasks.base.Task`); `draw` makes a problem of any split."""

    name: str
    draw: Callable[[Random], Problem]
    tagged: bool  # whether it is asked with the system prompt of the `answer` style and answered in its tags
    _: KW_ONLY
    kind: str = "text"
    system_prompt: str = system_prompt("answer")

    @property
    def default_rewards(self) -> Mapping[str, float]:
        """Return names and weights of the rewards: a skill is right or wrong."""
        return {"exact": 1.0}

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """Sample a problem that is not held out."""
        rng = seeded_rng(self.name, seed, step, row)
        while True:
            problem = self.draw(rng)
            if _split(problem) == "train":
                return problem

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Return up to `limit` different problems of a held-out split."""
        rng = seeded_rng(self.name, split)
        draws = (self.draw(rng) for _ in range(100 * limit))
        chosen = {p.question: p for p in draws if _split(p) == split}
        return list(chosen.values())[:limit]

    def messages(self, question: str) -> list[Message]:
        """Return the chat that asks `question`."""
        if self.tagged:
            return chat(question, self.system_prompt)
        return [{"role": "user", "content": question}]

    def completion(self, problem: Problem) -> str:
        """Return the right completion."""
        return ideal_completion(problem.answer, "answer") if self.tagged else problem.answer

    def grade(self, problem: Problem, completion: str) -> Attempt:
        """Grade the text in the answer tags, which working may precede; without tags, grade the whole completion."""
        if self.tagged:
            return super().grade(problem, completion)
        return replace(super().grade(problem, ideal_completion(completion, self.style)), completion=completion)


def _split(problem: Problem) -> str:
    """Return the split of a question; questions of the same letters share one, as `47 or 83` and `83 or 47`."""
    return split_of("".join(sorted(problem.question)))


def _single(rng: Random) -> Problem:
    """Sample one operation on the numbers that the second step of `(a op b) op c` is made of."""
    operator, a, b = rng.choice(OPERATORS), rng.randint(-10, 100), rng.randint(0, 10)
    return Problem(f"What is {a} {operator} {b}?", str(apply(operator, a, b)))


def _larger(rng: Random) -> Problem:
    a, b = rng.sample(range(100), 2)
    return Problem(f"Which is larger, {a} or {b}?", str(max(a, b)))


def _word(rng: Random) -> str:
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 6)))


def _backwards(rng: Random) -> Problem:
    word = _word(rng)
    return Problem(f"Spell {word} backwards.", word[::-1])


def _letters(rng: Random) -> Problem:
    word = _word(rng)
    return Problem(f"How many letters are in {word}?", str(len(word)))


SKILLS = {
    skill.name: skill
    for skill in (
        Skill("single", _single, tagged=True, kind="integer"),
        Skill("larger", _larger, tagged=True, kind="integer"),
        Skill("backwards", _backwards, tagged=False),
        Skill("letters", _letters, tagged=False),
    )
}
