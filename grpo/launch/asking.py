"""What a model is asked with: the task and the worked examples of the run that it came of."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import click

from grpo.model_card import read_card
from grpo.runtime.console import printable
from tasks.base import Task


def with_examples(task: Task, card: Mapping[str, Any]) -> Task:
    """Return the task with the worked examples of a card, if it has some; each task of a mixture with its own."""
    if task.parts:
        cards = card.get("tasks", {})
        return replace(task, parts={name: with_examples(p, cards.get(name, {})) for name, p in task.parts.items()})
    return replace(task, examples=card["examples"]) if card.get("examples") else task


def as_task(card: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """Return a card that asks as one task of a mixture does: the one in `names`, or the first.

    Raises UsageError if there is none of that name.
    """
    known = card.get("tasks", {})
    if len(names) > 1 or any(name not in known for name in names):
        of = f"has {printable(', '.join(known))}" if known else "was trained on no mixture"
        raise click.UsageError(f"--task is for --evaluate, or names one task of a mixture to ask as; this model {of}")
    if known and not names:
        first, *others = map(printable, known)
        click.echo(f"Asked as a problem of {first}; --task {' or '.join(others)} asks as one of those", err=True)
    return {**card, **known[names[0]]} if names else card


def before_training(name: str) -> str:
    """Return the model that a saved model was trained from. Raises ValueError if that is not known."""
    base = read_card(name).get("base_model")
    if not isinstance(base, str):
        raise ValueError(
            f"{printable(name)} does not say what it was trained from. Train first: python train_grpo.py writes the "
            "saved_model/ that --compare asks before and after"
        )
    return base
