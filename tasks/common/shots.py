"""Worked examples in the prompt: solved training problems as turns before the question (`--shots`)."""

from dataclasses import replace

from tasks.base import Problem, Task, task_of
from tasks.common.prompts import after_opening, ideal_completion
from tasks.common.qa_task import QATask

MAX_TRIES = 50  # the largest number of training problems that are tried for one example
ROWS_BETWEEN_TRIES = 10**6  # more than the problems of a step, so that two rows never try the same problem


def solution(task: Task, problem: Problem) -> str | None:
    """Return a right completion in the style of the problem's task, with the problem's working if possible.

    If the chat template ends each prompt with <think>, the completion continues after this tag.

    The working is left out if a completion that shows it is not graded as right and well-formed, for example because
    the working contains a tag. Return None if the completion without working fails this check too.
    """
    own_task = task_of(task, problem)
    for working in dict.fromkeys((problem.working, "")):
        completion = after_opening(ideal_completion(problem.answer, own_task.style, working), own_task.opening)
        attempt = task.grade(problem, completion)
        if attempt.correct and attempt.well_formed:
            return completion
    return None


def with_shots(task: QATask, shots: int) -> QATask:
    """Return the task with `shots` solved training problems before each question, always the same ones.

    The problems belong to step -1, which no run trains on: the steps of a run begin at 1. Raises ValueError if too
    few problems are found.
    """
    solutions: dict[str, str] = {}  # the right completion for each question
    for row in range(MAX_TRIES * shots):
        if len(solutions) == shots:
            break
        problem = task.training_problem(0, -1, row)
        completion = solution(task, problem)
        if completion is not None:
            solutions.setdefault(problem.question, completion)
    if len(solutions) < shots:
        raise ValueError(f"--shots is {shots}; only {len(solutions)} different training problems were found")
    examples = []
    for question, completion in solutions.items():
        examples += [{"role": "user", "content": question}, {"role": "assistant", "content": completion}]
    return replace(task, examples=examples)


def with_shots_in_system_prompt(task: Task) -> Task:
    """Return the task with its worked examples as text after the system prompt instead of turns of the chat."""
    texts = [message["content"].strip() for message in task.examples]
    examples = [f"Example:\n{question}\n{answer}" for question, answer in zip(texts[::2], texts[1::2], strict=True)]
    return replace(task, system_prompt="\n\n".join((task.system_prompt, *examples)), examples=())


def solved_problem(task: Task, seed: int, step: int, row: int) -> tuple[Problem, str]:
    """Return a training problem and a right completion for it; they depend only on seed, step and row.

    Problems without a right completion are skipped. Raises ValueError if none of MAX_TRIES problems has one.
    """
    for attempt in range(MAX_TRIES):
        problem = task.training_problem(seed, step, row + attempt * ROWS_BETWEEN_TRIES)
        completion = solution(task, problem)
        if completion is not None:
            return problem, completion
    raise ValueError(f"the task knows no right completion for any of {MAX_TRIES} training problems")
