"""Compare models on the same held-out problems, measured in the way a training run measures its policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.config import TrainConfig
from grpo.evaluation.drift import plain_prompts
from grpo.evaluation.evaluator import Evaluation, Evaluator, proportion
from grpo.evaluation.intervals import accuracy_text, paired_interval
from grpo.generation.probe import probe
from grpo.model.chat_template import task_for
from grpo.model.language_model import fitting_task
from grpo.model.loading import load
from grpo.runtime.console import printable, say
from grpo.runtime.device import choose_device
from tasks.base import Task
from tasks.unrelated import QUESTIONS

LABEL_WIDTH = 20  # characters of a row's label
COLUMN_WIDTH = 34  # characters of a model's column
ACCURACY_WIDTH = 29  # characters of an accuracy with its interval, such as 100.0% [99.3, 100.0], n = 508


@dataclass(frozen=True)
class Measured:
    """The figures of one model."""

    name: str
    evaluations: Mapping[str, Evaluation]  # by name: first the task, then the skills
    sampled: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # pass_at_k and maj_at_k, by k
    drift: float | None = None  # drift from the first model on unrelated questions, nats a token


def measure(
    names: Sequence[str], config: TrainConfig, task: Task, skills: Mapping[str, Task], split: str
) -> list[Measured]:
    """Return each model's figures, measured with the limits of `config`. Only one model at a time is in memory.

    Drift is None for the first model, and for a model whose tokenizer gives the questions other ids. Problems that
    are too long for the first model are left out and named. Raises ValueError if a model cannot be loaded, or has too
    few positions for a problem that the first model answered.
    """
    measured: list[Measured] = []
    start = None
    for name in names:
        lm = load(name, choose_device(config.device), config.precision, template_args=config.chat_template_arg)
        task = task_for(lm, task)
        fitting = fitting_task(lm, task, config)
        if fitting is not task and measured:
            raise ValueError(f"{name} has too few positions for some problems of {names[0]}; name it first")
        if fitting is not task:
            say(printable(fitting.notes[-1]))
        task = fitting
        _, decoder = probe(lm, task)
        evaluator = Evaluator(config, task, skills if split == "test" else {}, decoder)
        evaluations = evaluator.by_name(lm, split)
        sampled = evaluator.sampled(lm, split)
        if start is not None and start.prompts == plain_prompts(lm, QUESTIONS):
            evaluator.start = start
        measured.append(Measured(name, evaluations, sampled, evaluator.drift(lm)))
        if start is None:
            evaluator.remember_start(lm)
            start = evaluator.start
        del lm
    return measured


def table(measured: Sequence[Measured], split: str, columns: int | None) -> list[str]:
    """Return the lines of a table: a row per figure, a column per model and, for two models, one for the difference.

    If a terminal has too few columns for the table, each cell is on a line of its own.
    """
    heads = [shortened(model.name, COLUMN_WIDTH - 2) for model in measured] + ["difference"] * (len(measured) == 2)
    rows = figures(measured, split)
    if columns is None or LABEL_WIDTH + 2 + COLUMN_WIDTH * len(heads) <= columns:
        return [
            (f"{label:<{LABEL_WIDTH}}  " + "".join(f"{cell:<{COLUMN_WIDTH}}" for cell in cells)).rstrip()
            for label, cells in (("", heads), *rows)
        ]
    longest = max(12, columns - ACCURACY_WIDTH - 6)
    heads = [shortened(head, longest) for head in heads]
    lines = []
    for label, cells in rows:
        margin = " " * (len(label) - len(label.lstrip()) + 2)
        names = [f"{margin}{head:<{max(map(len, heads))}}  " for head in heads] if len(heads) > 1 else [margin]
        lines += [label, *(name + cell for name, cell in zip(names, cells, strict=False) if cell)]
    return lines


def figures(measured: Sequence[Measured], split: str) -> list[tuple[str, list[str]]]:
    """Return the rows of the table: a label and one cell per model.

    With two models, rows of accuracies get a third cell, the difference.
    """
    task, *skills = measured[0].evaluations
    evaluations = [model.evaluations[task] for model in measured]
    rows = [(split, accuracies([e.right for e in evaluations]))]
    rows.append(("  well-formed", [f"{100 * e.well_formed:.1f}%" for e in evaluations]))
    for category in evaluations[0].categories:
        rows.append((f"  {category}", accuracies([e.categories[category] for e in evaluations])))
    for estimate, by_k in measured[0].sampled.items():
        for k in by_k:
            label = f"  {estimate.partition('_')[0]}@{k}, sampled"
            rows.append((label, [f"{100 * model.sampled[estimate][k]:.1f}%" for model in measured]))
    for skill in skills:
        rows.append((skill, accuracies([model.evaluations[skill].right for model in measured])))
    if any(model.drift is not None for model in measured):
        drifts = ["" if model.drift is None else f"{model.drift:.3f} nats a token" for model in measured]
        rows.append(("drift from the first", drifts))
    return rows


def accuracies(rights: Sequence[Sequence[bool]]) -> list[str]:
    """Format accuracies with Wilson intervals; for two, add the paired difference in percentage points."""
    cells = [accuracy_text(proportion(right)) for right in rights]
    if len(rights) == 2:
        difference, low, high = paired_interval(*rights)
        cells.append(f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
    return cells


def as_json(measured: Sequence[Measured]) -> dict[str, Any]:
    """Return the figures of the table as JSON values, with accuracies from 0 to 1.

    With exactly two models, add their differences.
    """
    task, *skills = measured[0].evaluations
    models = [
        {
            "model": model.name,
            **model.evaluations[task].to_dict(),
            **model.sampled,
            "skills": {name: model.evaluations[name].to_dict() for name in skills},
            "drift": model.drift,
        }
        for model in measured
    ]
    if len(measured) != 2:
        return {"models": models}
    first = measured[0].evaluations
    second = measured[1].evaluations
    categories = second[task].categories
    difference = {
        **_difference(first[task].right, second[task].right),
        "categories": {name: _difference(right, categories[name]) for name, right in first[task].categories.items()},
        "skills": {name: _difference(first[name].right, second[name].right) for name in skills},
    }
    return {"models": models, "difference": difference}


def _difference(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    return dict(zip(("accuracy", "ci_low", "ci_high"), paired_interval(first, second), strict=True))


def answers(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return each answer of each model as JSON values: question, gold answer, completion, whether it is right."""
    return [
        {
            "model": model.name,
            "task": name,
            "question": attempt.problem.question,
            "gold": attempt.problem.answer,
            "completion": attempt.completion,
            "answer": None if attempt.answer is None else str(attempt.answer),
            "right": attempt.correct,
        }
        for model in measured
        for name, evaluation in model.evaluations.items()
        for attempt in evaluation.attempts
    ]


def shortened(name: str, longest: int) -> str:
    """Return a model's name. If it has more than `longest` characters, … replaces the beginning."""
    name = printable(name)
    return name if len(name) <= longest else f"…{name[1 - longest :]}"
