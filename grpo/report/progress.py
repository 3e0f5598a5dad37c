"""Print what happens during training: evaluations, completions, findings."""

from collections.abc import Mapping
from typing import Any

from tqdm.utils import disp_len

from grpo.algorithm.rollout import Rollout
from grpo.evaluation.intervals import accuracy_text
from grpo.record.schema import few_categories
from grpo.runtime.console import fitted, paint, paragraph, printable, say, width

SHOWN_COMPLETIONS = 4  # At most this many completions of a step are printed.
MIN_COLUMNS_BESIDE_PARTS = 62  # With fewer columns left for texts, the parts of the reward are not shown.
MIN_QUESTION_COLUMNS = 4  # A question is never cut to fewer columns.


def show_evaluation(entry: Mapping[str, Any], improved: bool) -> None:
    """Print one line about an evaluation on validation problems."""
    best = "  best so far, saved" if improved and entry["step"] else ""
    more = f"{100 * entry['well_formed']:.0f}% well-formed"
    if "reward" in entry:
        more = f"reward {entry['reward']:.3f}, {more}"
    if entry.get("drift") is not None:
        more += f", drift {nats(entry['drift'])}"
    say(f"step {entry['step']:>4}  validation {accuracy_text(entry)}, {more}{best}")
    categories = few_categories(entry)
    if categories:
        shares = (f"{printable(name)} {100 * part['accuracy']:.1f}%" for name, part in categories.items())
        paragraph(f"           {', '.join(shares)}", indent=11)


def show_completions(step: int, rollout: Rollout) -> None:
    """Print one completion for each of the first groups, with its reward and, if they fit, the reward's parts."""
    columns = width() - 1
    names = list(rollout.rewards[0].parts)
    if columns - sum(max(5, len(name)) + 2 for name in names) < MIN_COLUMNS_BESIDE_PARTS:
        names = []
    head = "  ".join([f"step {step:>4}  reward", *(f"{name:>5}" for name in names), "completion"])
    say(fitted(head, columns))
    for i, problem in enumerate(rollout.problems[:SHOWN_COMPLETIONS]):
        row = i * rollout.num_generations
        reward = rollout.rewards[row]
        parts = [f"{_two_decimals(reward.parts[name]):>{max(5, len(name))}}" for name in names]
        figures = "  ".join([f"  {_two_decimals(reward.total):>6}", *parts, ""])
        mark = paint("right", "green") if reward.correct else paint("wrong", "red")
        texts = question_and_completion(problem.question, rollout.completion_texts[row], columns - 9 - len(figures))
        say(f"    {mark}{figures}{texts}")


def show_reward_error(step: int, error: str, count: int, completions: int) -> None:
    """Print why a user's reward failed on `count` of the `completions` of a step."""
    counted = f"{count} of {completions} completions have no reward; later failures with this error are only counted"
    paragraph(f"step {step:>4}  {error}: {counted}", indent=11)


def question_and_completion(question: str, completion: str, columns: int) -> str:
    """Return question and completion as one printable line of at most `columns`; the question is cut first."""
    question, completion = printable(question), printable(completion)
    left = max(MIN_QUESTION_COLUMNS, columns - disp_len(completion) - 2)
    return fitted(f"{fitted(question, left)}  {completion}", columns)


def _two_decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def show_finding(finding: Mapping[str, Any]) -> None:
    """Print a finding with its examples."""
    paragraph(f"step {finding['step']:>4}  {finding['name']}: {finding['text']}", indent=11)
    for example in finding.get("examples", ()):
        paragraph(f"    {example}", indent=6)


def nats(value: float) -> str:
    """Format a value in nats with three decimals; zero has no minus sign."""
    return f"{round(value, 3) + 0.0:.3f}"
