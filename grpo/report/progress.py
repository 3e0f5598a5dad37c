"""What a run prints on its way: evaluations, completions, findings."""

from collections.abc import Mapping
from typing import Any

from tqdm.utils import disp_len

from grpo.algorithm.rollout import Rollout
from grpo.evaluation.intervals import accuracy_text
from grpo.record.schema import few_categories
from grpo.runtime.console import fitted, paint, paragraph, printable, say, width

SHOWN = 4  # completions each time
LEAST_TEXT = 62  # columns of a line of a completion without the parts of its reward
SHORTEST = 4  # letters of a question that is cut


def show_evaluation(entry: Mapping[str, Any], improved: bool) -> None:
    """Print one line about an evaluation on the way."""
    best = "  best so far, saved" if improved and entry["step"] else ""
    more = f"{100 * entry['well_formed']:.0f}% well-formed"
    if "reward" in entry:
        more = f"reward {entry['reward']:.3f}, {more}"
    if entry.get("drift") is not None:
        more += f", drift {nats(entry['drift'])}"
    for name, figures in few_categories(entry).items():
        more += f", {printable(name)} {100 * figures['accuracy']:.1f}%"
    say(f"step {entry['step']:>4}  validation {accuracy_text(entry)}, {more}{best}")


def show_completions(step: int, rollout: Rollout) -> None:
    """Print the first completion of each of a step's first groups, with its reward, by part if there is room."""
    per_group, columns = len(rollout.completion_texts) // len(rollout.problems), width() - 1
    names = list(rollout.rewards[0].parts)
    if columns - sum(max(5, len(name)) + 2 for name in names) < LEAST_TEXT:
        names = []
    head = "  ".join([f"step {step:>4}  reward", *(f"{name:>5}" for name in names), "completion"])
    say(fitted(head, columns))
    for i, problem in enumerate(rollout.problems[:SHOWN]):
        reward, text = rollout.rewards[i * per_group], rollout.completion_texts[i * per_group]
        parts = [f"{_two_decimals(reward.parts[name]):>{max(5, len(name))}}" for name in names]
        row = "  ".join([f"  {_two_decimals(reward.total):>6}", *parts, ""])
        mark = paint("right", "green") if reward.correct else paint("wrong", "red")
        texts = question_and_completion(problem.question, text, columns - 9 - len(row))
        say(f"    {mark}{row}{texts}")


def question_and_completion(question: str, completion: str, columns: int) -> str:
    """Return both on one line of so many columns, printable; the question is cut before the completion is."""
    question, completion = printable(question), printable(completion)
    left = max(SHORTEST, columns - disp_len(completion) - 2)
    return fitted(f"{fitted(question, left)}  {completion}", columns)


def _two_decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def show_finding(finding: Mapping[str, Any]) -> None:
    """Print a finding on the run's health."""
    paragraph(f"step {finding['step']:>4}  {finding['name']}: {finding['text']}", indent=11)
    for example in finding.get("examples", ()):
        paragraph(f"    {example}", indent=6)


def nats(value: float) -> str:
    """Format with three decimals, and no minus before a zero."""
    return f"{round(value, 3) + 0.0:.3f}"
