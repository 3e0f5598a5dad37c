"""How a task asks and how it reads what comes back: what the tasks of --task have in common."""

from collections.abc import Mapping
from dataclasses import dataclass

from tasks.base import Attempt, Message, Problem
from tasks.parsing import PARSERS, parse_answer
from tasks.prompts import STYLES, chat, system_prompt
from tasks.rewards import default_rewards


@dataclass(frozen=True, kw_only=True)
class Form:
    """A prompt style, the kind of the answers, and the system prompt; "" is that of style and kind."""

    style: str = "answer"
    kind: str = "integer"
    system_prompt: str = ""

    def __post_init__(self) -> None:
        if self.style not in STYLES or self.kind not in PARSERS:
            raise ValueError(f"there is no prompt style {self.style!r} for answers of kind {self.kind!r}")
        if not self.system_prompt:
            object.__setattr__(self, "system_prompt", system_prompt(self.style, self.kind))

    @property
    def default_rewards(self) -> Mapping[str, float]:
        """Names and weights of the rewards where none are given."""
        return default_rewards(self.style, self.kind)

    def messages(self, question: str) -> list[Message]:
        """The chat that asks `question`."""
        return chat(question, self.system_prompt)

    def judge(self, problem: Problem, completion: str) -> Attempt:
        """A completion with the answer that is parsed from it; total, linear in its length."""
        kind = self.kind_of(problem)
        return Attempt(
            problem=problem,
            completion=completion,
            style=self.style,
            kind=kind,
            prompt=self.messages(problem.question),
            answer=parse_answer(completion, self.style, kind),
            gold=PARSERS[kind](problem.answer),
        )

    def kind_of(self, problem: Problem) -> str:
        """The kind of a problem's answer."""
        return self.kind
