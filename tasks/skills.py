"""Skills that the starter has besides `arithmetic`, as small tasks.

GRPO does not train these skills, but training on `arithmetic` may spoil them, so a run measures them. Each skill has
training problems, for `grpo/starter/build.py`, and held-out problems; a hash decides which problems are held out.

    single     What is -5 * 6?                         <answer>-30</answer>
    larger     Which is larger, 47 or 83?               <answer>83</answer>
    backwards  Spell stone backwards.                   enots
    letters    How many letters are in stone?           5
"""

import string
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from random import Random

from tasks.arithmetic import OPERATIONS, OPERATORS
from tasks.base import Attempt, Message, Problem, chat
from tasks.common.drawn_task import DrawnTask
from tasks.common.prompts import ideal_completion, system_prompt


@dataclass(frozen=True)
class Skill(DrawnTask):
    """A skill besides the trained task (`tasks.base.Task`)."""

    name: str
    make: Callable[[Random], Problem]  # makes a problem of any split
    # True: the prompt has the system prompt of the `answer` style, and the answer is expected in <answer> tags.
    tagged: bool
    _: KW_ONLY
    kind: str = "text"
    system_prompt: str = system_prompt("answer")

    def draw(self, rng: Random) -> Problem:
        """Return a random problem."""
        return self.make(rng)

    def key(self, problem: Problem) -> str:
        """Return the same text for questions with the same characters, such as `47 or 83` and `83 or 47`."""
        return "".join(sorted(problem.question))

    def messages(self, question: str) -> list[Message]:
        """Return the chat that asks `question`."""
        if self.tagged:
            return chat(question, self.system_prompt)
        return [{"role": "user", "content": question}]

    def completion(self, problem: Problem) -> str:
        """Return the right completion of a problem."""
        return ideal_completion(problem.answer, "answer") if self.tagged else problem.answer

    def grade(self, problem: Problem, completion: str) -> Attempt:
        """Grade the text in the answer tags; in a skill without tags, grade the whole completion."""
        if self.tagged:
            return super().grade(problem, completion)
        return replace(super().grade(problem, ideal_completion(completion, self.style)), completion=completion)


def _single(rng: Random) -> Problem:
    """Sample a problem with one operation, on numbers like those in the second step of `(a op b) op c`."""
    operator = rng.choice(OPERATORS)
    a = rng.randint(-10, 100)
    b = rng.randint(0, 10)
    return Problem(f"What is {a} {operator} {b}?", str(OPERATIONS[operator](a, b)))


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
