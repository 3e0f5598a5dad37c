"""Print the result of a run at its end, or how to continue when it is stopped."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo.evaluation.intervals import accuracy_text
from grpo.model.saving import SAVED_MODEL
from grpo.record import samples
from grpo.record.schema import evaluations
from grpo.report.progress import nats, show_finding
from grpo.runtime.console import command_line, duration, printable, say, width

PHASES = {"sample": "sampling", "reference": "reference", "update": "update"}


def conclude(folder: Path, record: Mapping[str, Any], seconds: float, example: str) -> None:
    """Print the accuracies before and after, findings, times, files, and a command that asks the model `example`."""
    before, after = _first_and_last_test(record)
    steps = record["steps"]
    reason = record["finished"]["reason"]
    say(f"\nDone after step {len(steps)} ({reason}), in {duration(seconds)}. The best policy: step {after['step']}.")
    rows = [("test accuracy", before, after)]
    rows += [(f"skill: {name}", before["skills"][name], after["skills"][name]) for name in after["skills"]]
    _say_accuracies(rows, record.get("before_sft"))
    for line in by_category(before, after) + sampled(before, after) + drifted(after):
        say(f"  {line}")
    if kl := [s["kl"] for s in steps[-10:] if s["kl"] is not None]:
        say(f"  KL to reference    {fmean(kl):.3f} nats a token (mean of the last {len(kl)} steps)")
    if after["step"] == 0:
        say("  No evaluation was better than the start, so saved_model/ holds the starting model.")
    say("  A loss near 0 is normal: advantages have mean 0 in each group, and the ratio starts at 1.")
    _list_findings(record)
    _say_times(record)
    pictures = ["grpo_overview.png", "grpo_training_curve.png"]
    pictures += ["grpo_kl_divergence.png"] if record["config"]["beta"] else []
    pictures += ["grpo_sft_curve.png"] if record.get("sft") else []
    say(f"Written to {printable(str(folder))}/: {SAVED_MODEL}/, grpo_metrics.json, {samples.FILE_NAME}, and plots:")
    say(f"  {', '.join(pictures)} (plot_metrics.py --html writes a page)")
    model = [] if folder == Path() else ["--model", str(folder / SAVED_MODEL)]
    say(command_line("Next:", ["python", "inference.py", *model, "--compare"], [example]))


def _first_and_last_test(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the test of the starting policy and the test of the saved policy."""
    tests = evaluations(record, "test")
    return tests[0], tests[-1]


def _say_accuracies(rows: Sequence[tuple[str, Any, Any]], before_sft: Mapping[str, Any] | None) -> None:
    """Print accuracies before and after training, beside their names if all lines fit the terminal, else below."""
    table = [(printable(name), accuracy_text(was), f"  ->  {accuracy_text(now)}") for name, was, now in rows]
    table += [("before fine-tuning", accuracy_text(before_sft), "")] if before_sft else []
    lines = [f"  {name:<18} {was:>32}{now}" for name, was, now in table]
    if max(map(len, lines)) >= width():
        # `say` breaks long lines at double spaces. A single space after the arrow keeps it on the line of
        # the accuracy that follows.
        lines = [f"  {name}\n    {was}{now.replace('->  ', '-> ')}" for name, was, now in table]
    for line in lines:
        say(line)


def show_interruption(folder: Path, place: str, reason: str) -> None:
    """Print what was saved and how to continue, after a run has stopped early at `place`, such as "step 25"."""
    optional = {"plots": "grpo_overview.png", f"{SAVED_MODEL}/": SAVED_MODEL}
    *saved, last = ["Checkpoint", "metrics", *(what for what, name in optional.items() if (folder / name).exists())]
    say(f"\nStopped after {place} ({reason}). {', '.join(saved)} and {last} are in {printable(str(folder))}/.")
    say("The same command continues from here.")


def show_already_finished(folder: Path, record: Mapping[str, Any]) -> None:
    """Print the result of a run that is already finished, and the two ways to continue."""
    before, after = _first_and_last_test(record)
    ending = record["finished"]
    say(f"The run in {printable(str(folder.resolve()))} is finished: {ending['reason']} (step {ending['step']}).")
    say(f"  test accuracy  {accuracy_text(before)}  ->  {accuracy_text(after)}")
    _list_findings(record)
    say("Plots are drawn again. A larger --num-iterations continues the run; --fresh moves it aside and starts over.")


def _list_findings(record: Mapping[str, Any]) -> None:
    if record.get("findings"):
        say("Findings about this run (explained in grpo/diagnostics/README.md):")
    for finding in record.get("findings", ()):
        show_finding(finding)


def _say_times(record: Mapping[str, Any]) -> None:
    """Print the time of each phase over all launches, tokens a second, and the last launch's peak memory."""
    phases = seconds_by_phase(record)
    total = sum(phases.values())
    shown = [f"{name} {spent:.1f} s ({100 * spent / total:.0f}%)" for name, spent in phases.items() if spent > 0.05]
    say(f"  Time: {', '.join(shown)}")
    say(f"  {tokens_per_second(record):,.0f} tokens a second during the steps")
    if memory := record["finished"]["peak_memory"]:
        say(f"  At most {memory / 2**20:,.0f} MiB of memory")


def by_category(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return lines with accuracies before and after training, for the twelve categories least accurate at the end."""
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
    """Format pass@k and maj@k before and after training; return no line if they were not measured."""
    lines = []
    for name in ("pass", "maj"):
        was, now = before.get(f"{name}_at_k", {}), after.get(f"{name}_at_k", {})
        both = [f"{name}@{k} {100 * was[k]:.1f}% -> {100 * now[k]:.1f}%" for k in now if k in was]
        lines += ["sampled:  " + ", ".join(both)] if both else []
    return lines


def drifted(after: Mapping[str, Any]) -> list[str]:
    """Format the drift of the saved policy from the starting model; return no line if it was not measured."""
    drift = after.get("drift")
    return [] if drift is None else [f"drift              {nats(drift)} nats a token on unrelated questions"]


def seconds_by_phase(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds that each phase of a run took; no second is counted in two phases."""
    steps, evals = record["steps"], record["evals"]
    phases = {"fine-tuning": _sum(record.get("sft", []), "time/total")}
    phases |= {name: _sum(steps, f"time/{phase}") for phase, name in PHASES.items()}
    rewards = sorted({name for row in steps for name in row if name.startswith("time/reward/")})
    phases |= {f"reward {name.removeprefix('time/reward/')}": _sum(steps, name) for name in rewards}
    return phases | {"evaluation": _sum(evals, "time/evaluate"), "saving": _sum(steps, "time/save")}


def tokens_per_second(record: Mapping[str, Any]) -> float:
    """Return how many tokens of prompts and completions a run trains on per second."""
    return _sum(record["steps"], "tokens") / max(1e-9, _sum(record["steps"], "time/total"))


def _sum(rows: list[Mapping[str, Any]], name: str) -> float:
    return sum(row.get(name) or 0.0 for row in rows)
