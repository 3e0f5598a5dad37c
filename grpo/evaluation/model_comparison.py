"""Compare models on the same held-out problems, measured as a run measures its own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.config import TrainConfig
from grpo.evaluation.drift import DriftBaseline
from grpo.evaluation.evaluator import Evaluation, Evaluator, proportion
from grpo.evaluation.intervals import accuracy_text, paired_interval
from grpo.generation.probe import probe
from grpo.model.language_model import LanguageModel, check_prompts_fit
from grpo.model.loading import load
from grpo.runtime.console import printable
from grpo.runtime.device import choose_device
from tasks.base import Task
from tasks.unrelated import QUESTIONS

LABEL, COLUMN, LEAST_CELL = 20, 34, 29  # characters


@dataclass(frozen=True)
class Measured:
    """The figures of one model."""

    name: str
    evaluations: Mapping[str, Evaluation]  # of the task first, then of the skills
    sampled: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # pass_at_k and maj_at_k, by k
    drift: float | None = None  # from the first model, on unrelated questions


def measure(
    names: Sequence[str], config: TrainConfig, task: Task, skills: Mapping[str, Task], split: str
) -> list[Measured]:
    """Measure each model with the prompts and limits of `config`, one at a time in memory.

    Raises ValueError if one cannot be loaded.
    """
    found: list[Measured] = []
    start = None
    for name in names:
        lm = load(name, choose_device(config.device), config.precision)
        check_prompts_fit(lm, task, config)
        _, decoder = probe(lm, task)
        evaluator = Evaluator(config, task, skills if split == "test" else {}, decoder)
        evaluations = evaluator.by_name(lm, split)
        sampled = evaluator.sampled(lm, split)
        if start is None:
            evaluator.remember_start(lm)
            start, drift = evaluator.start, None
        else:
            drift = _drift(evaluator, start, lm)
        found.append(Measured(name, evaluations, sampled, drift))
        del lm
    return found


def _drift(evaluator: Evaluator, start: DriftBaseline, lm: LanguageModel) -> float | None:
    """Return the drift from the first model; None if their tokenizers differ, and so the meaning of ids."""
    if not start.same_prompts(lm, QUESTIONS):
        return None
    return evaluator.microbatch.run(lambda rows: start.drift(lm, rows))


def table(found: Sequence[Measured], split: str, columns: int | None) -> list[str]:
    """Return a row for each figure, a column for each model; for two models also the difference with interval.

    Where a terminal has too few columns for that, each figure has lines of its own, one a model.
    """
    heads = [shortened(model.name, COLUMN - 2) for model in found] + ["difference"] * (len(found) == 2)
    rows = figures(found, split)
    if columns is None or LABEL + 2 + COLUMN * len(heads) <= columns:
        lines = [(f"{label:<{LABEL}}  " + "".join(f"{cell:<{COLUMN}}" for cell in cells)) for label, cells in rows]
        return [" " * (LABEL + 2) + "".join(f"{head:<{COLUMN}}" for head in heads).rstrip(), *map(str.rstrip, lines)]
    longest = max(12, columns - LEAST_CELL - 6)  # with a space beside, and what a terminal leaves free
    heads = [shortened(head, longest) for head in heads]
    lines = []
    for label, cells in rows:
        margin = " " * (len(label) - len(label.lstrip()) + 2)
        names = [f"{margin}{head:<{max(map(len, heads))}}  " for head in heads] if len(heads) > 1 else [margin]
        lines += [label, *(name + cell for name, cell in zip(names, cells, strict=False) if cell)]
    return lines


def figures(found: Sequence[Measured], split: str) -> list[tuple[str, list[str]]]:
    """Return the rows of the table: a label, and a cell for each model, for two of them one of the difference too."""
    rows = []
    task = next(iter(found[0].evaluations))
    for name in found[0].evaluations:
        several = [model.evaluations[name] for model in found]
        rows.append((split if name == task else name, accuracies([e.right for e in several])))
        if name == task:
            rows.append(("  well-formed", [f"{100 * e.to_dict()['well_formed']:.1f}%" for e in several]))
            rows += [
                (f"  {category}", accuracies([e.categories[category] for e in several]))
                for category in several[0].categories
            ]
            for measure, of_first in found[0].sampled.items():
                for k in of_first:
                    label = f"  {measure.partition('_')[0]}@{k}, sampled"
                    rows.append((label, [f"{100 * model.sampled[measure][k]:.1f}%" for model in found]))
    if any(model.drift is not None for model in found):
        drifts = ["" if model.drift is None else f"{model.drift:.3f} nats a token" for model in found]
        rows.append(("drift from the first", drifts))
    return rows


def accuracies(rights: Sequence[Sequence[bool]]) -> list[str]:
    """Format accuracies with Wilson intervals, and for two of them the paired difference in points."""
    cells = [accuracy_text(proportion(right)) for right in rights]
    if len(rights) == 2:
        difference, low, high = (100 * x for x in paired_interval(*rights))
        cells.append(f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]")
    return cells


def as_json(found: Sequence[Measured]) -> dict[str, Any]:
    """Return the figures of the table as JSON values, all of them shares; for two models with their differences."""
    task, *skills = found[0].evaluations
    models = [
        {
            "model": model.name,
            **model.evaluations[task].to_dict(),
            **model.sampled,
            "skills": {name: model.evaluations[name].to_dict() for name in skills},
            "drift": model.drift if model.drift is not None and math.isfinite(model.drift) else None,
        }
        for model in found
    ]
    if len(found) != 2:
        return {"models": models}
    first, second = (model.evaluations for model in found)
    was, now = first[task].categories, second[task].categories
    return {
        "models": models,
        "difference": {
            **_difference(first[task].right, second[task].right),
            "categories": {name: _difference(was[name], now[name]) for name in was},
            "skills": {name: _difference(first[name].right, second[name].right) for name in skills},
        },
    }


def _difference(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    return dict(zip(("accuracy", "ci_low", "ci_high"), paired_interval(first, second), strict=True))


def answers(found: Sequence[Measured]) -> list[dict[str, Any]]:
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
        for model in found
        for name, evaluation in model.evaluations.items()
        for attempt in evaluation.attempts
    ]


def shortened(name: str, longest: int) -> str:
    """Return the end of a model's name, of so many letters at most."""
    name = printable(name)
    return name if len(name) <= longest else f"…{name[1 - longest :]}"
