"""The base of every task: how it parses and grades a completion."""

from collections.abc import Mapping
from dataclasses import dataclass

from tasks.base import Answer, Attempt, Problem, Task
from tasks.common.parsing import PARSERS, has_form, parse_answer
from tasks.common.prompts import STYLES, system_prompt
from tasks.rewards.functions import DEMO, SHAPED

CLOSE_ENOUGH = 1  # A number is close if it differs from the right number by at most this.


@dataclass(frozen=True, kw_only=True)
class QATask(Task):
    """A task that grades the answer of each completion. Style and kind define its default system prompt.

    A subclass adds `training_problem` and `held_out`. It overrides `is_correct` and `is_close` if answers other than
    the problem's own answer can be right.
    """

    def __post_init__(self) -> None:
        if self.style not in STYLES or self.kind not in PARSERS:
            raise ValueError(f"there is no prompt style {self.style!r} for answers of kind {self.kind!r}")
        if not self.system_prompt:
            object.__setattr__(self, "system_prompt", system_prompt(self.style, self.kind))

    @property
    def default_rewards(self) -> Mapping[str, float]:
        """Return the weights, by name, of the rewards that apply unless --reward is given."""
        if self.style != "reasoning":
            return SHAPED
        return {name: weight for name, weight in DEMO.items() if name != "integer" or self.kind != "text"}

    def grade(self, problem: Problem, completion: str) -> Attempt:
        """Parse and grade any string, in time linear in its length. Raises only what a user's code raises."""
        kind = self.kind_of(problem)
        answer = parse_answer(completion, kind)
        return Attempt(
            problem=problem,
            completion=completion,
            kind=kind,
            prompt=self.messages(problem.question),
            answer=answer,
            gold=self.gold(problem),
            correct=answer is not None and self.is_correct(problem, answer),
            close=answer is not None and self.is_close(problem, answer),
            well_formed=answer is not None and has_form(completion, self.style, self.opening),
        )

    def is_correct(self, problem: Problem, answer: Answer) -> bool:
        """Return whether an answer equals the problem's answer; a number may differ by the problem's tolerance."""
        gold = self.gold(problem)
        if isinstance(answer, str) or isinstance(gold, str) or gold is None:
            return answer == gold
        return abs(answer - gold) <= problem.tolerance

    def is_close(self, problem: Problem, answer: Answer) -> bool:
        """Return whether a number is within ±1 of the problem's own answer, or a text differs only in its case."""
        gold = self.gold(problem)
        if gold is None:
            return False
        if isinstance(answer, str):
            return answer.casefold() == str(gold).casefold()
        return abs(answer - gold) <= CLOSE_ENOUGH

    def gold(self, problem: Problem) -> Answer | None:
        """Return the problem's own answer, parsed in the same way as the answer of a completion."""
        return PARSERS[self.kind_of(problem)](problem.answer)

    def kind_of(self, problem: Problem) -> str:
        """Return the kind of a problem's answer."""
        return self.kind
