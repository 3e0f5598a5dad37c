"""The README.md of the model that a run saves."""

from collections.abc import Mapping
from typing import Any

from grpo.config import TrainConfig
from grpo.evaluation.intervals import accuracy_text
from grpo.record.schema import few_categories
from grpo.report.ending import drifted, sampled


def saved_readme(
    config: TrainConfig, best: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any] | None
) -> str:
    """Return README.md of saved_model/: what it is, its accuracy with n and interval, how it was made."""
    lines = [
        f"# A model trained with GRPO on {' and '.join(config.task)}",
        "",
        f"Started from `{config.model}`; the policy of step {best['step']}, the best on validation problems: "
        + (f"mean reward {best['reward']:.3f}, accuracy " if "reward" in best else "")
        + f"{accuracy_text(best)}.",
        "",
        "Greedy decoding, exact answers, Wilson 95% intervals, on problems that were not trained on:",
        "",
        "| | before | after |",
        "|---|---|---|",
    ]
    rows = [("test problems", before, after or {})]
    for name, was in few_categories(before).items():
        rows.append((f"of `{name}`", was, (after or {}).get("categories", {}).get(name, {})))
    for name, was in before.get("skills", {}).items():
        rows.append((f"skill `{name}`", was, (after or {}).get("skills", {}).get(name, {})))
    for name, was, now in rows:
        lines.append(f"| {name} | {accuracy_text(was)} | {accuracy_text(now) if now else 'not measured yet'} |")
    if config.sft_steps:
        lines += ["", f'"Before" is after {config.sft_steps} supervised steps on ideal completions.']
    if after:
        lines += ["", *(f"{line}.  " for line in drifted(after) + sampled(before, after))]
    lines += ["", "Settings:", "", "```"]
    lines += [f"{name} = {value}" for name, value in config.to_dict().items() if name != "output_dir"]
    lines += [
        "```",
        "",
        "`grpo.json` holds the task, the prompt and the token limit; inference reads them.",
        "",
    ]
    return "\n".join(lines)
