"""What a run measures of a model: held-out problems of its task, and what else it should still be able to do."""

from collections.abc import Mapping, Sequence
from typing import Any

from grpo.config import TrainConfig
from grpo.evaluate import Evaluation, evaluate, sampled_passes
from grpo.forgetting import StartingAnswers
from grpo.greedy import can_begin_together
from grpo.memory import PassLimit
from grpo.models import ROWS, LanguageModel
from tasks.base import Problem, Task
from tasks.unrelated import QUESTIONS

TEST_PROBLEMS = 1000  # or all there are
SKILL_PROBLEMS = 100  # of each: what is looked for are losses of many points, and there are several skills
TRIED = 4  # prompts on which a common beginning is tried


class Examiner:
    """Measures policies on the same problems each time, all greedily but pass@k."""

    def __init__(self, config: TrainConfig, task: Task, skills: Mapping[str, Task]) -> None:
        """`skills` are the neighbouring skills that the starting model has."""
        self.config, self.task, self.skills = config, task, skills
        self.limit = PassLimit("the evaluation", ROWS, 1, config.shard)
        self.start: StartingAnswers | None = None  # what drift is measured from, where it is known
        self._held: dict[tuple[str, str, int], list[Problem]] = {}
        self._prompts: dict[tuple[str, str], list[int]] = {}  # by task and question
        self._together: bool | None = None  # whether prompts may share their beginning; tried once

    def remember(self, lm: LanguageModel) -> None:
        """Keep what the starting model answers to the unrelated questions."""
        self.start = self.limit.fit(StartingAnswers.ask, lm, QUESTIONS)

    def validate(self, lm: LanguageModel) -> dict[str, Any]:
        """The validation problems, which choose the policy that is kept; and the drift from the start."""
        return {**self._measure(lm, self.task, self.problems("validation")), "drift": self._drift(lm)}

    def test(self, lm: LanguageModel) -> dict[str, Any]:
        """The test problems, which are what is quoted, and what else the model should be able to."""
        result = self._measure(lm, self.task, self.problems("test"))
        skills = {name: self._measure(lm, skill, self._of(skill)) for name, skill in self.skills.items()}
        return {**result, "drift": self._drift(lm), **self.passes(lm, "test"), "skills": skills}

    def problems(self, split: str) -> list[Problem]:
        """The problems of the task that a split is measured on."""
        return self._held_out(self.task, split, TEST_PROBLEMS if split == "test" else self.config.eval_problems)

    def evaluations(self, lm: LanguageModel, split: str) -> dict[str, Evaluation]:
        """The task (under its name) on a split, and the skills, problem by problem."""
        found = {self.task.name: self._evaluate(lm, self.task, self.problems(split))}
        return found | {
            f"skill: {name}": self._evaluate(lm, skill, self._of(skill)) for name, skill in self.skills.items()
        }

    def passes(self, lm: LanguageModel, split: str) -> dict[str, Any]:
        """pass@k by sampling, where it is asked for."""
        c = self.config
        if not c.pass_at_k:
            return {}
        asked = (self.task, self.problems(split), c.max_new_tokens, c.pass_at_k, c.seed)
        return {"pass_at_k": self.limit.fit(sampled_passes, lm, *asked, together=bool(self._together))}

    def _drift(self, lm: LanguageModel) -> float | None:
        return None if self.start is None else self.limit.fit(self.start.drift, lm)

    def _of(self, skill: Task) -> list[Problem]:
        return self._held_out(skill, "test", SKILL_PROBLEMS)

    def _measure(self, lm: LanguageModel, task: Task, problems: Sequence[Problem]) -> dict[str, Any]:
        return self._evaluate(lm, task, problems).to_dict()

    def _evaluate(self, lm: LanguageModel, task: Task, problems: Sequence[Problem]) -> Evaluation:
        """Prompts are encoded once: the problems are the same every time."""
        new = [p.question for p in problems if (task.name, p.question) not in self._prompts]
        for question, ids in zip(new, lm.prompts([task.messages(q) for q in new]), strict=True):
            self._prompts[task.name, question] = ids
        prompts = [self._prompts[task.name, p.question] for p in problems]
        if self._together is None:
            self._together = can_begin_together(lm.model, prompts[:TRIED], lm.pad_id)
        return self.limit.fit(
            evaluate,
            lm,
            task,
            problems,
            self.config.max_new_tokens,
            prompts=prompts,
            together=self._together,
        )

    def _held_out(self, task: Task, split: str, limit: int) -> list[Problem]:
        key = (task.name, split, limit)
        if key not in self._held:
            self._held[key] = task.held_out(split, limit)
        return self._held[key]
