"""The base of a task: how it asks a question, and how it parses and grades the completion."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from tasks.base import Answer, Attempt, Message, Problem, Task, chat
from tasks.common.parsing import PARSERS, has_form, parse_answer
from tasks.common.prompts import STYLES, system_prompt
from tasks.rewards.functions import default_rewards

CLOSE_ENOUGH = 1  # a number that is off by at most this is close


@dataclass(frozen=True, kw_only=True)
class QATask:
    """The base of a task: a prompt style, the kind of its answers, a system prompt, and perhaps worked examples.

    The default system prompt is that of style and kind. A subclass adds `name`, `training_problem` and `held_out`,
    and overrides `is_correct` if many answers are right, and `is_close`.
    """

    parts: ClassVar[Mapping[str, Task]] = {}  # it is no mixture
    style: str = "answer"
    kind: str = "integer"
    system_prompt: str = ""
    examples: Sequence[Message] = ()  # worked examples, as turns between the system prompt and the question
    example: str = "..."
    hints: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    knows_right: bool = True
    notes: Sequence[str] = ()  # remarks on the problems, for the start of a run

    def __post_init__(self) -> None:
        if self.style not in STYLES or self.kind not in PARSERS:
            raise ValueError(f"there is no prompt style {self.style!r} for answers of kind {self.kind!r}")
        if not self.system_prompt:
            object.__setattr__(self, "system_prompt", system_prompt(self.style, self.kind))

    @property
    def default_rewards(self) -> Mapping[str, float]:
        """Return names and weights of the rewards that apply unless --reward is given."""
        return default_rewards(self.style, self.kind)

    def listed(self) -> Iterable[Problem]:
        """Return all problems, if they are not drawn but listed, in a file for instance."""
        return ()

    def messages(self, question: str) -> list[Message]:
        """Return the chat that asks `question`."""
        return chat(question, self.system_prompt, self.examples)

    def grade(self, problem: Problem, completion: str) -> Attempt:
        """Parse and grade `completion`. Accepts any string, never raises, runs in linear time."""
        kind = self.kind_of(problem)
        answer = parse_answer(completion, kind)
        return Attempt(
            problem=problem,
            completion=completion,
            style=self.style,
            kind=kind,
            prompt=self.messages(problem.question),
            answer=answer,
            gold=self.gold(problem),
            correct=answer is not None and self.is_correct(problem, answer),
            close=answer is not None and self.is_close(problem, answer),
            well_formed=answer is not None and has_form(completion, self.style),
        )

    def is_correct(self, problem: Problem, answer: Answer) -> bool:
        """Return whether a parsed answer is right; by default, whether it equals the problem's own answer."""
        return answer == self.gold(problem)

    def is_close(self, problem: Problem, answer: Answer) -> bool:
        """Return whether a parsed answer is nearly right, by default like the problem's own.

        That is a number within ±1 of it, or a text that differs from it in case at most.
        """
        gold = self.gold(problem)
        if gold is None:
            return False
        if isinstance(answer, str):
            return answer.casefold() == str(gold).casefold()
        return abs(answer - gold) <= CLOSE_ENOUGH

    def gold(self, problem: Problem) -> Answer | None:
        """Return the problem's own answer, parsed like a completion's."""
        return PARSERS[self.kind_of(problem)](problem.answer)

    def kind_of(self, problem: Problem) -> str:
        """Return the kind of a problem's answer."""
        return self.kind
