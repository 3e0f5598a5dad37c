"""What a run prints on its way: evaluations, completions, findings."""

from collections.abc import Mapping
from typing import Any

from grpo.algorithm.rollout import Rollout
from grpo.evaluation.intervals import accuracy_text
from grpo.runtime.console import fitted, paint, paragraph, printable, say, width

SHOWN = 4  # completions each time


def show_evaluation(entry: Mapping[str, Any], improved: bool) -> None:
    """Print one line about an evaluation on the way."""
    best = "  best so far, saved" if improved and entry["step"] else ""
    more = f"{100 * entry['well_formed']:.0f}% well-formed"
    if "reward" in entry:
        more = f"reward {entry['reward']:.3f}, {more}"
    if entry.get("drift") is not None:
        more += f", drift {nats(entry['drift'])}"
    for name, of_task in entry.get("tasks", {}).items():
        more += f", {printable(name)} {100 * of_task['accuracy']:.1f}%"
    say(f"step {entry['step']:>4}  validation {accuracy_text(entry)}, {more}{best}")


def show_completions(step: int, rollout: Rollout) -> None:
    """Print the first completion of each of a step's first groups, with its reward by part."""
    per_group, columns = len(rollout.completion_texts) // len(rollout.problems), width()
    names = list(rollout.rewards[0].parts)
    say(fitted(f"step {step:>4}  reward  " + "  ".join([*(f"{name:>5}" for name in names), "completion"]), columns))
    for i, problem in enumerate(rollout.problems[:SHOWN]):
        reward, text = rollout.rewards[i * per_group], rollout.completion_texts[i * per_group]
        numbers = [reward.parts[name] for name in names]
        parts = [
            f"{'-' if n is None else format(n, '.2f'):>{max(5, len(name))}}"
            for n, name in zip(numbers, names, strict=True)
        ]
        mark = "right" if reward.correct else "wrong"
        total = "-" if reward.total is None else f"{reward.total:.2f}"
        row = f"  {total:>6}  {'  '.join(parts)}  "
        row = fitted(f"{row}{printable(problem.question)}  {printable(text)}", columns - 9)
        say(f"    {paint(mark, 'green' if reward.correct else 'red')}{row}")


def show_finding(finding: Mapping[str, Any]) -> None:
    """Print a finding on the run's health."""
    paragraph(f"step {finding['step']:>4}  {finding['name']}: {finding['text']}", indent=11)
    for example in finding.get("examples", ()):
        paragraph(f"    {example}", indent=6)


def nats(value: float) -> str:
    """Format with three decimals, and no minus before a zero."""
    return f"{round(value, 3) + 0.0:.3f}"
