"""What a run measures of a model: held-out problems of its task, and what else it should still be able to do."""

from collections.abc import Mapping, Sequence
from typing import Any

from grpo.config import TrainConfig
from grpo.evaluate import evaluate
from grpo.memory import PassLimit
from grpo.models import ROWS, LanguageModel
from tasks.base import Problem, Task

TEST_PROBLEMS = 1000  # or all there are
SKILL_PROBLEMS = 500


class Examiner:
    """Measures policies on the same problems each time, all greedily."""

    def __init__(self, config: TrainConfig, task: Task, skills: Mapping[str, Task]) -> None:
        """`skills` are the neighbouring skills that the starting model has."""
        self.config, self.task, self.skills = config, task, skills
        self.limit = PassLimit("the evaluation", ROWS, 1)

    def validate(self, lm: LanguageModel) -> dict[str, Any]:
        """The validation problems, which choose the policy that is kept."""
        return self._measure(lm, self.task, self.task.held_out("validation", self.config.eval_problems))

    def test(self, lm: LanguageModel) -> dict[str, Any]:
        """The test problems, which are what is quoted, and the neighbouring skills."""
        result = self._measure(lm, self.task, self.task.held_out("test", TEST_PROBLEMS))
        skills = {
            name: self._measure(lm, skill, skill.held_out("test", SKILL_PROBLEMS))
            for name, skill in self.skills.items()
        }
        return {**result, "skills": skills}

    def _measure(self, lm: LanguageModel, task: Task, problems: Sequence[Problem]) -> dict[str, Any]:
        return self.limit.fit(evaluate, lm, task, problems, self.config.max_new_tokens).to_dict()
