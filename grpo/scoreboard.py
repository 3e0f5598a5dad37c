"""Models measured on the same held-out problems, in the way in which a run measures its own, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.config import TrainConfig
from grpo.console import printable
from grpo.evaluate import Evaluation, proportion
from grpo.examiner import Examiner
from grpo.forgetting import StartingAnswers
from grpo.intervals import paired_interval
from grpo.models import LanguageModel, choose_device, load
from grpo.report import accuracy_text
from tasks.base import Task
from tasks.unrelated import QUESTIONS

LABEL, COLUMN = 20, 34  # characters


@dataclass(frozen=True)
class Measured:
    """What was found of one model."""

    name: str
    evaluations: Mapping[str, Evaluation]  # of the task first, then of the skills
    passes: Mapping[str, float] = field(default_factory=dict)  # pass@k by k
    drift: float | None = None  # from the first model, on unrelated questions


def measure(
    names: Sequence[str], config: TrainConfig, task: Task, skills: Mapping[str, Task], split: str
) -> list[Measured]:
    """Measure each model with the prompts and limits of `config`; one at a time is held in memory.

    Raises ValueError where one cannot be loaded.
    """
    found: list[Measured] = []
    start = None
    for name in names:
        examiner = Examiner(config, task, skills if split == "test" else {})
        lm = load(name, choose_device(config.device))
        evaluations = examiner.evaluations(lm, split)
        passes = examiner.passes(lm, split).get("pass_at_k", {})
        if start is None:
            examiner.remember(lm)
            start, drift = examiner.start, None
        else:
            drift = _drift(examiner, start, lm)
        found.append(Measured(name, evaluations, passes, drift))
        del lm
    return found


def _drift(examiner: Examiner, start: StartingAnswers, lm: LanguageModel) -> float | None:
    """The drift from the first model; None where a model of another tokenizer has another meaning for its ids."""
    if not start.same_prompts(lm, QUESTIONS):
        return None
    return examiner.limit.fit(start.drift, lm)


def table(found: Sequence[Measured], split: str) -> list[str]:
    """A row for each figure, a column for each model; with two models, the difference with its paired interval."""
    heads = [shortened(model.name) for model in found] + ["difference"] * (len(found) == 2)
    lines = [row("", heads)]
    task = next(iter(found[0].evaluations))
    for name in found[0].evaluations:
        several = [model.evaluations[name] for model in found]
        lines.append(accuracy_row(split if name == task else name, [e.right for e in several]))
        if name == task:
            lines.append(row("  well-formed", [f"{100 * e.to_dict()['well_formed']:.1f}%" for e in several]))
            for category in several[0].categories:
                lines.append(accuracy_row(f"  {category}", [e.categories[category] for e in several]))
            for k in found[0].passes:
                lines.append(row(f"  pass@{k}, sampled", [f"{100 * model.passes[k]:.1f}%" for model in found]))
    if any(model.drift is not None for model in found):
        drifts = ["" if model.drift is None else f"{model.drift:.3f} nats a token" for model in found]
        lines.append(row("drift from the first", drifts))
    return lines


def accuracy_row(label: str, rights: Sequence[Sequence[bool]]) -> str:
    """Accuracies with their Wilson intervals, and for two of them the paired difference in points."""
    cells = [accuracy_text(proportion(right)) for right in rights]
    if len(rights) == 2:
        difference, low, high = (100 * x for x in paired_interval(*rights))
        cells.append(f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]")
    return row(label, cells)


def row(label: str, cells: Sequence[Any]) -> str:
    """One line of the table."""
    return (f"{label:<{LABEL}}  " + "".join(f"{cell:<{COLUMN}}" for cell in cells)).rstrip()


def shortened(name: str) -> str:
    """The end of a model's name, as much as a column has room for."""
    name = printable(name)
    return name if len(name) < COLUMN - 1 else f"…{name[3 - COLUMN :]}"
