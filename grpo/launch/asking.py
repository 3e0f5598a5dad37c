"""Ask a model as it was asked in training: with the task and the worked examples on its card."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import click

from grpo.model_card import read_card
from grpo.runtime.console import printable
from tasks.base import Task


def with_examples(task: Task, card: Mapping[str, Any]) -> Task:
    """Return the task with the worked examples of a card, if any; in a mixture, each task gets its own examples."""
    if task.parts:
        cards = card.get("tasks", {})
        parts = {name: with_examples(part, cards.get(name, {})) for name, part in task.parts.items()}
        return replace(task, parts=parts)
    return replace(task, examples=card["examples"]) if card.get("examples") else task


def as_task(card: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """Return a card with the prompt and examples of the task in `names`; without names, the unchanged card.

    The unchanged card of a mixture has the prompt of its first task; a line on standard error says so. Raises
    UsageError if `names` is not one task of the model's mixture.
    """
    tasks = card.get("tasks", {})
    if len(names) > 1 or any(name not in tasks for name in names):
        trained_on = f"was trained on {printable(', '.join(tasks))}" if tasks else "was not trained on a mixture"
        raise click.UsageError(
            f"--task without --evaluate must name one task of the model's mixture; this model {trained_on}"
        )
    if tasks and not names:
        first, *others = map(printable, tasks)
        click.echo(f"The question has the prompt of {first}; for another, use --task {' or '.join(others)}", err=True)
    return {**card, **tasks[names[0]]} if names else card


def before_training(name: str) -> str:
    """Return the model that a saved model was trained from. Raises ValueError if its card does not name one."""
    base = read_card(name).get("base_model")
    if not isinstance(base, str):
        raise ValueError(
            f"{printable(name)} does not say which model it was trained from. Train first: --compare needs a "
            "saved_model/ that python train_grpo.py wrote"
        )
    return base
