"""Compare models on the same held-out problems, measured as a run measures its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.config import TrainConfig
from grpo.evaluation.drift import DriftBaseline
from grpo.evaluation.evaluator import Evaluation, Evaluator, proportion
from grpo.evaluation.intervals import accuracy_text, paired_interval
from grpo.generation.capabilities import ModelCapabilities
from grpo.model.language_model import LanguageModel, check_prompts_fit
from grpo.model.loading import load
from grpo.runtime.console import printable
from grpo.runtime.device import choose_device
from tasks.base import Task
from tasks.unrelated import QUESTIONS

LABEL, COLUMN = 20, 34  # characters


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
        evaluator = Evaluator(config, task, skills if split == "test" else {}, ModelCapabilities.probe(lm, task))
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
    return evaluator.microbatch.run(start.drift, lm)


def table(found: Sequence[Measured], split: str) -> list[str]:
    """Return a row for each figure, a column for each model; for two models also the difference with interval."""
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
            for measure, of_first in found[0].sampled.items():
                for k in of_first:
                    label = f"  {measure.partition('_')[0]}@{k}, sampled"
                    lines.append(row(label, [f"{100 * model.sampled[measure][k]:.1f}%" for model in found]))
    if any(model.drift is not None for model in found):
        drifts = ["" if model.drift is None else f"{model.drift:.3f} nats a token" for model in found]
        lines.append(row("drift from the first", drifts))
    return lines


def accuracy_row(label: str, rights: Sequence[Sequence[bool]]) -> str:
    """Format accuracies with Wilson intervals, and for two of them the paired difference in points."""
    cells = [accuracy_text(proportion(right)) for right in rights]
    if len(rights) == 2:
        difference, low, high = (100 * x for x in paired_interval(*rights))
        cells.append(f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]")
    return row(label, cells)


def row(label: str, cells: Sequence[Any]) -> str:
    """Format one line of the table."""
    return (f"{label:<{LABEL}}  " + "".join(f"{cell:<{COLUMN}}" for cell in cells)).rstrip()


def shortened(name: str) -> str:
    """Return the end of a model's name, as much as fits a column."""
    name = printable(name)
    return name if len(name) < COLUMN - 1 else f"…{name[3 - COLUMN :]}"
