"""Compose the README.md of the model that a run saves."""

from collections.abc import Mapping
from typing import Any

from grpo.config import TrainConfig
from grpo.evaluation.intervals import accuracy_text
from grpo.record.schema import few_categories
from grpo.report.ending import drifted, sampled


def saved_readme(
    config: TrainConfig, best: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any] | None
) -> str:
    """Return the text of saved_model/README.md: accuracies with n and interval, and the settings of the run.

    `best` is an evaluation on validation problems; `before` and `after` are on test problems. `after` is None until
    the run ends.
    """
    lines = [
        f"# A model trained with GRPO on {' and '.join(config.task)}",
        "",
        f"Trained from `{config.model}`. The policy of step {best['step']} was the best on validation problems: "
        + (f"mean reward {best['reward']:.3f}, accuracy " if "reward" in best else "")
        + f"{accuracy_text(best)}.",
        "",
        "Accuracy in greedy decoding, with Wilson's 95% interval, on problems that were not trained on:",
        "",
        "| | before | after |",
        "|---|---|---|",
    ]
    rows = [("test problems", before, after or {})]
    for name, was in few_categories(before).items():
        rows.append((f"category `{name}`", was, (after or {}).get("categories", {}).get(name, {})))
    for name, was in before.get("skills", {}).items():
        rows.append((f"skill `{name}`", was, (after or {}).get("skills", {}).get(name, {})))
    for name, was, now in rows:
        lines.append(f"| {name} | {accuracy_text(was)} | {accuracy_text(now) if now else 'not measured yet'} |")
    if config.sft_steps:
        lines += ["", f'"Before" was measured after {config.sft_steps} supervised steps on ideal completions.']
    if after:
        lines += ["", *(f"{line}.  " for line in drifted(after) + sampled(before, after))]
    lines += ["", "Settings:", "", "```"]
    lines += [f"{name} = {value}" for name, value in config.to_dict().items() if name != "output_dir"]
    lines += [
        "```",
        "",
        "`inference.py` reads the task, the prompt and the token limit from `grpo.json`.",
        "",
    ]
    return "\n".join(lines)
