"""What a run says: at its start, on the way, at its end, and in the card of the model it saves."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo.config import TrainConfig
from grpo.console import duration, fitted, paint, paragraph, printable, say, width
from grpo.files import SAMPLES
from grpo.models import SAVED_MODEL, LanguageModel
from grpo.rollout import RolloutBatch
from grpo.timing import seconds_by_phase, tokens_per_second

HUB_EXAMPLE = "python train_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct"
SHOWN = 4  # completions each time


def introduce(
    config: TrainConfig, lm: LanguageModel, environment: Mapping[str, Any], shared: Mapping[str, bool]
) -> None:
    """Say which model is trained on what, the settings that were resolved, and what a group's prompt is shared in."""
    millions = sum(p.numel() for p in lm.model.parameters()) / 1e6
    where = environment["device"]
    if lm.device.type == "cpu":
        where = f"cpu, {environment['threads']} threads"
    if environment["processes"] > 1:
        where = f"{environment['processes']} processes, each {where}"
    if config.model == "starter":
        say(f"Training the bundled starter model ({millions:.1f}M parameters) on {where}.")
        say(f"To train a Hub model instead: {HUB_EXAMPLE}")
    else:
        say(f"Training {printable(config.model)} ({millions:,.1f}M parameters) on {where}.")
    for note in lm.notes:
        say(note)
    _say_settings(config)
    if alone := " and ".join(work for work, is_shared in shared.items() if not is_shared):
        say(f"This model's prompts cannot be shared by a group: in {alone} each is run once a completion.\n")


def _say_settings(config: TrainConfig) -> None:
    """The settings of algorithm and task, and of the others those that are not the default."""
    line = "Settings:"
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name in ("model", "output_dir") or value in ("", ()):
            continue
        if f.metadata["group"] not in ("Task", "Algorithm") and value == f.default:
            continue
        text = " ".join(value) if isinstance(value, tuple) else str(value)
        item = f"{f.name}={printable(text)}"
        if len(line) + len(item) > 99:
            say(line)
            line = "         "
        line += " " + item
    say(line + "\n")


def accuracy_text(entry: Mapping[str, Any]) -> str:
    """An accuracy with its interval and n: 97.2% [95.4, 98.3], n = 500."""
    low, high = 100 * entry["ci_low"], 100 * entry["ci_high"]
    return f"{100 * entry['accuracy']:.1f}% [{low:.1f}, {high:.1f}], n = {entry['n']}"


def show_evaluation(entry: Mapping[str, Any], improved: bool) -> None:
    """One line for an evaluation on the way."""
    best = "  best so far, saved" if improved and entry["step"] else ""
    more = f"{100 * entry['well_formed']:.0f}% well-formed"
    if entry.get("drift") is not None:
        more += f", drift {nats(entry['drift'])}"
    say(f"step {entry['step']:>4}  validation {accuracy_text(entry)}, {more}{best}")


def show_completions(step: int, rollout: RolloutBatch) -> None:
    """A small table: the first completions of a step's first groups, each with its reward by part."""
    per_group, columns = len(rollout.completions) // len(rollout.problems), width()
    names = list(rollout.rewards[0].parts)
    say(fitted(f"step {step:>4}  reward  " + "  ".join([*(f"{name:>5}" for name in names), "completion"]), columns))
    for i, problem in enumerate(rollout.problems[:SHOWN]):
        reward, text = rollout.rewards[i * per_group], rollout.completions[i * per_group]
        numbers = [reward.parts[name] for name in names]
        parts = [
            f"{'-' if n is None else format(n, '.2f'):>{max(5, len(name))}}"
            for n, name in zip(numbers, names, strict=True)
        ]
        mark = "right" if reward.correct else "wrong"
        row = f"  {reward.total:>6.2f}  {'  '.join(parts)}  "
        row = fitted(f"{row}{printable(problem.question)}  {printable(text)}", columns - 9)
        say(f"    {paint(mark, 'green' if reward.correct else 'red')}{row}")


def conclude(folder: Path, record: Mapping[str, Any], seconds: float) -> None:
    """What the run reached, what it cost the neighbouring skills, and what to do next."""
    tests = [entry for entry in record["evals"] if entry["split"] == "test"]
    before, after = tests[0], tests[-1]
    steps = record["steps"]
    kl = [s["kl"] for s in steps[-10:] if s["kl"] is not None]
    reason = record["finished"]["reason"]
    say(f"\nDone after step {len(steps)} ({reason}), in {duration(seconds)}. The best policy: step {after['step']}.")
    rows = [("test accuracy", before, after)]
    rows += [(f"skill: {name}", before["skills"][name], after["skills"][name]) for name in after["skills"]]
    for name, was, now in rows:
        say(f"  {name:<18} {accuracy_text(was):>32}  ->  {accuracy_text(now)}")
    for line in by_category(before, after) + passes(before, after) + drifted(after):
        say(f"  {line}")
    if kl:
        say(f"  KL to the start    {fmean(kl):.3f} nats a token (mean of the last {len(kl)} steps)")
    if after["step"] == 0:
        say("  No evaluation was better than the start, so saved_model/ holds the starting model.")
    say("  A loss near 0 is normal: advantages are centred in each group and the ratio starts at 1.")
    _list_findings(record)
    _say_times(record)
    say(f"Written to {folder}/: {SAVED_MODEL}/, grpo_metrics.json, {SAMPLES}, and as pictures")
    say("  grpo_overview.png, grpo_training_curve.png, grpo_kl_divergence.png (plot_metrics.py --html: a page)")
    where = "" if folder == Path() else f" --model {folder / SAVED_MODEL}"
    question = "What is (4 - 9) * 6?" if record["config"]["task"] == "arithmetic" else "..."
    say(f'Next: python inference.py{where} --compare "{question}"')


def _say_times(record: Mapping[str, Any]) -> None:
    """Where the time of all launches went, and how much memory the last one took."""
    phases = seconds_by_phase(record)
    total = sum(phases.values())
    shown = [f"{name} {spent:.1f} s ({100 * spent / total:.0f}%)" for name, spent in phases.items() if spent > 0.05]
    say(f"  Time: {', '.join(shown)}")
    say(f"  {tokens_per_second(record):,.0f} tokens a second in the steps")
    if memory := record["finished"]["peak_memory"]:
        say(f"  At most {memory / 2**20:,.0f} MiB of memory")


def by_category(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Accuracies by category before and after: at most twelve of them, those with the lowest now, in their order."""
    now = after.get("categories", {})
    shown = sorted(sorted(now, key=lambda name: now[name]["accuracy"])[:12])
    if not shown:
        return []
    lines = [("by category, before", before.get("categories", {})), ("by category, after", now)]
    return [
        f"{label:<20}" + "".join(f"  {name} {100 * rows[name]['accuracy']:3.0f}%" for name in shown if name in rows)
        for label, rows in lines
    ]


def passes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """pass@k before and after, where it was measured."""
    was, now = before.get("pass_at_k", {}), after.get("pass_at_k", {})
    both = [f"pass@{k} {100 * was[k]:.1f}% -> {100 * now[k]:.1f}%" for k in now if k in was]
    return ["sampled:  " + ", ".join(both)] if both else []


def nats(value: float) -> str:
    """Three decimals, and no minus before a zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def drifted(after: Mapping[str, Any]) -> list[str]:
    """How far the saved policy is from the start where it was not trained."""
    drift = after.get("drift")
    return [] if drift is None else [f"drift              {nats(drift)} nats a token on unrelated questions"]


def show_finding(finding: Mapping[str, Any]) -> None:
    """A finding on the run's health, when it arises or in the list at the end."""
    paragraph(f"step {finding['step']:>4}  {finding['name']}: {finding['text']}", indent=11)
    for example in finding.get("examples", ()):
        paragraph(f"    {example}", indent=6)


def _list_findings(record: Mapping[str, Any]) -> None:
    if record.get("findings"):
        say("What is not well with this run (README, When a run does not learn):")
    for finding in record.get("findings", ()):
        show_finding(finding)


def interrupted(folder: Path, step: int, reason: str) -> None:
    """After a signal: what there is, and how to go on."""
    say(f"\nStopped after step {step} ({reason}). Checkpoint, metrics, plots and {SAVED_MODEL}/ are in {folder}/.")
    say("The same command goes on from here.")


def going_on(step: int, threads_then: int, threads_now: int) -> None:
    """At the start of a launch that continues a run."""
    say(f"Going on from the checkpoint of step {step}.")
    if threads_then != threads_now:
        say(f"It was computed with {threads_then} threads, now there are {threads_now}: the last digits may differ.")


def already_finished(folder: Path, record: Mapping[str, Any]) -> None:
    """At a launch in the folder of a run that has ended: what it reached, and the two ways on."""
    tests = [entry for entry in record["evals"] if entry["split"] == "test"]
    ending = record["finished"]
    say(f"The run in {folder.resolve()} is finished: {ending['reason']} (step {ending['step']}).")
    say(f"  test accuracy  {accuracy_text(tests[0])}  ->  {accuracy_text(tests[-1])}")
    _list_findings(record)
    say("The plots are drawn again. A larger --num-iterations goes on; --fresh moves it aside and starts over.")


def model_card(
    config: TrainConfig, best: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any] | None
) -> str:
    """README.md of saved_model/: what it is, what it can do with n and interval, how it was made."""
    lines = [
        f"# A model trained with GRPO on {config.task}",
        "",
        f"Started from `{config.model}`; the policy of step {best['step']}, the best on validation problems: "
        f"{accuracy_text(best)}.",
        "",
        "Greedy decoding, exact answers, Wilson 95% intervals, on problems that were not trained on:",
        "",
        "| | before | after |",
        "|---|---|---|",
    ]
    rows = [("test problems", before, after or {})]
    for name, was in before.get("skills", {}).items():
        rows.append((f"skill `{name}`", was, (after or {}).get("skills", {}).get(name, {})))
    for name, was, now in rows:
        lines.append(f"| {name} | {accuracy_text(was)} | {accuracy_text(now) if now else 'not measured yet'} |")
    if after:
        lines += ["", *(f"{line}.  " for line in drifted(after) + passes(before, after))]
    lines += ["", "Settings:", "", "```"]
    lines += [f"{name} = {value}" for name, value in config.to_dict().items() if name != "output_dir"]
    lines += [
        "```",
        "",
        "`grpo.json` holds the task, the prompt and the token limit; inference reads them.",
        "",
    ]
    return "\n".join(lines)
