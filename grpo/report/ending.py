"""What a run prints at its end, or where it is stopped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo.evaluation.intervals import accuracy_text
from grpo.model.saving import SAVED_MODEL
from grpo.record import samples
from grpo.report.progress import nats, show_finding
from grpo.runtime.console import command_line, duration, printable, say, width

PHASES = {"sample": "sampling", "reference": "reference", "update": "update"}


def conclude(folder: Path, record: Mapping[str, Any], seconds: float, example: str) -> None:
    """Print what the run reached, what it cost the neighbouring skills, and what to do next.

    `example` is a question to try.
    """
    pictures = ["grpo_overview.png", "grpo_training_curve.png"]
    pictures += ["grpo_kl_divergence.png"] if record["config"]["beta"] else []
    pictures += ["grpo_sft_curve.png"] if record.get("sft") else []
    tests = [entry for entry in record["evals"] if entry["split"] == "test"]
    before, after = tests[0], tests[-1]
    steps = record["steps"]
    kl = [s["kl"] for s in steps[-10:] if s["kl"] is not None]
    reason = record["finished"]["reason"]
    say(f"\nDone after step {len(steps)} ({reason}), in {duration(seconds)}. The best policy: step {after['step']}.")
    rows = [("test accuracy", before, after)]
    rows += [(f"skill: {name}", before["skills"][name], after["skills"][name]) for name in after["skills"]]
    _say_accuracies(rows, record.get("before_sft"))
    for line in by_category(before, after) + sampled(before, after) + drifted(after):
        say(f"  {line}")
    if kl:
        say(f"  KL to reference    {fmean(kl):.3f} nats a token (mean of the last {len(kl)} steps)")
    if after["step"] == 0:
        say("  No evaluation was better than the start, so saved_model/ holds the starting model.")
    say("  A loss near 0 is normal: advantages are centred in each group and the ratio starts at 1.")
    _list_findings(record)
    _say_times(record)
    say(
        f"Written to {printable(str(folder))}/: {SAVED_MODEL}/, grpo_metrics.json, {samples.FILE_NAME}, and pictures:"
    )
    say(f"  {', '.join(pictures)} (plot_metrics.py --html: a page)")
    where = [] if folder == Path() else ["--model", str(folder / SAVED_MODEL)]
    say(command_line("Next:", ["python", "inference.py", *where, "--compare"], [example]))


def _say_accuracies(rows: Sequence[tuple[str, Any, Any]], before_sft: Mapping[str, Any] | None) -> None:
    """Print accuracies before and after, each on one line of the terminal if all of them fit, else below its name."""
    table = [(printable(name), accuracy_text(was), f"  ->  {accuracy_text(now)}") for name, was, now in rows]
    table += [("before fine-tuning", accuracy_text(before_sft), "")] if before_sft else []
    lines = [f"  {name:<18} {was:>32}{now}" for name, was, now in table]
    if max(map(len, lines)) >= width():
        apart, together = "->  ", "-> "  # an arrow is not parted from its figure where a line breaks
        lines = [f"  {name}\n    {was}{now.replace(apart, together)}" for name, was, now in table]
    for line in lines:
        say(line)


def show_interruption(folder: Path, place: str, reason: str) -> None:
    """Print, after a signal, what was saved and how to continue. `place` is where it stopped, such as "step 25"."""
    there = {"plots": "grpo_overview.png", f"{SAVED_MODEL}/": SAVED_MODEL}
    *saved, last = ["Checkpoint", "metrics", *(what for what, name in there.items() if (folder / name).exists())]
    say(f"\nStopped after {place} ({reason}). {', '.join(saved)} and {last} are in {printable(str(folder))}/.")
    say("The same command continues from here.")


def show_already_finished(folder: Path, record: Mapping[str, Any]) -> None:
    """Print, in the folder of a run that has ended, what it reached and the two ways to continue."""
    tests = [entry for entry in record["evals"] if entry["split"] == "test"]
    ending = record["finished"]
    say(f"The run in {printable(str(folder.resolve()))} is finished: {ending['reason']} (step {ending['step']}).")
    say(f"  test accuracy  {accuracy_text(tests[0])}  ->  {accuracy_text(tests[-1])}")
    _list_findings(record)
    say("The plots are drawn again. A larger --num-iterations continues it; --fresh moves it aside and starts over.")


def _list_findings(record: Mapping[str, Any]) -> None:
    if record.get("findings"):
        say("Findings about this run (explained in grpo/diagnostics/README.md):")
    for finding in record.get("findings", ()):
        show_finding(finding)


def _say_times(record: Mapping[str, Any]) -> None:
    """Print where the time of all launches went, and how much memory the last one took."""
    phases = seconds_by_phase(record)
    total = sum(phases.values())
    shown = [f"{name} {spent:.1f} s ({100 * spent / total:.0f}%)" for name, spent in phases.items() if spent > 0.05]
    say(f"  Time: {', '.join(shown)}")
    say(f"  {tokens_per_second(record):,.0f} tokens a second in the steps")
    if memory := record["finished"]["peak_memory"]:
        say(f"  At most {memory / 2**20:,.0f} MiB of memory")


def by_category(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Format accuracies by category before and after, at most twelve, those that are lowest now, in their order."""
    now = after.get("categories", {})
    shown = sorted(sorted(now, key=lambda name: now[name]["accuracy"])[:12])
    if not shown:
        return []
    lines = [("by category, before", before.get("categories", {})), ("by category, after", now)]
    return [
        f"{label:<20}" + "".join(f"  {name} {100 * rows[name]['accuracy']:3.0f}%" for name in shown if name in rows)
        for label, rows in lines
    ]


def sampled(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Format pass@k and maj@k before and after, if they were measured."""
    lines = []
    for name in ("pass", "maj"):
        was, now = before.get(f"{name}_at_k", {}), after.get(f"{name}_at_k", {})
        both = [f"{name}@{k} {100 * was[k]:.1f}% -> {100 * now[k]:.1f}%" for k in now if k in was]
        lines += ["sampled:  " + ", ".join(both)] if both else []
    return lines


def drifted(after: Mapping[str, Any]) -> list[str]:
    """Format how far the saved policy is from the start on what it was not trained on."""
    drift = after.get("drift")
    return [] if drift is None else [f"drift              {nats(drift)} nats a token on unrelated questions"]


def seconds_by_phase(record: Mapping[str, Any]) -> dict[str, float]:
    """Return seconds of sampling, each reward function, reference, update, evaluation and saving, without overlap."""
    steps, evals = record["steps"], record["evals"]
    phases = {"fine-tuning": _sum(record.get("sft", []), "time/total")}
    phases |= {name: _sum(steps, f"time/{phase}") for phase, name in PHASES.items()}
    rewards = sorted({name for row in steps for name in row if name.startswith("time/reward/")})
    phases |= {f"reward {name.removeprefix('time/reward/')}": _sum(steps, name) for name in rewards}
    return phases | {"evaluation": _sum(evals, "time/evaluate"), "saving": _sum(steps, "time/save")}


def tokens_per_second(record: Mapping[str, Any]) -> float:
    """Return the prompt and completion tokens of the rollouts, for each second of the steps."""
    return _sum(record["steps"], "tokens") / max(1e-9, _sum(record["steps"], "time/total"))


def _sum(rows: list[Mapping[str, Any]], name: str) -> float:
    return sum(row.get(name) or 0.0 for row in rows)
