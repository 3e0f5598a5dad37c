"""Worked examples in the prompt: solved training problems as turns before the question (`--shots`)."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

from tasks.base import Message, Problem, Task, task_of
from tasks.common.prompts import ideal_completion
from tasks.common.qa_task import QATask

DRAWS = 50  # training problems to look at for each example
APART = 10**6  # rows between them


def solution(task: Task, problem: Problem) -> str | None:
    """Return a right completion in the style of the problem's task, with the problem's working if it has one.

    Return None if there is none that the task itself calls right: the working may hold a tag.
    """
    style = task_of(task, problem).style
    for working in dict.fromkeys((problem.working, "")):
        completion = ideal_completion(problem.answer, style, working)
        attempt = task.grade(problem, completion)
        if attempt.correct and attempt.well_formed:
            return completion
    return None


def with_shots(task: QATask, shots: int) -> QATask:
    """Return the task with so many solved training problems before each question, always the same ones.

    Steps of a run begin at 1, so step -1 is never trained on. Raises ValueError if there are not so many problems.
    """
    drawn = (task.training_problem(0, -1, row) for row in range(DRAWS * shots))
    found = list(islice(_solved(task, drawn), shots))
    if len(found) < shots:
        raise ValueError(f"--shots is {shots}; only {len(found)} different training problems were found")
    return replace(task, examples=[message for turn in found for message in turn])


def solved_problem(task: Task, seed: int, step: int, row: int) -> tuple[Problem, str]:
    """Return a training problem and a right completion of it, a pure function of the three numbers.

    Problems without one are skipped. Raises ValueError if there is none among many.
    """
    for attempt in range(DRAWS):
        problem = task.training_problem(seed, step, row + attempt * APART)
        completion = solution(task, problem)
        if completion is not None:
            return problem, completion
    raise ValueError("no training problem was found that the task knows a right completion of")


def _solved(task: QATask, problems: Iterable[Problem]) -> Iterable[tuple[Message, Message]]:
    """Yield question and solution of each problem that has one, no question twice."""
    asked = set()
    for problem in problems:
        completion = solution(task, problem)
        if completion is not None and problem.question not in asked:
            asked.add(problem.question)
            yield {"role": "user", "content": problem.question}, {"role": "assistant", "content": completion}
