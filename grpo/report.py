"""What a run prints, from its start to its end, and the README.md of the model it saves."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from grpo.algorithm.rollout import Rollout
from grpo.config import TrainConfig, ordered_fields
from grpo.evaluation.intervals import accuracy_text
from grpo.generation.capabilities import ModelCapabilities
from grpo.model.language_model import LanguageModel
from grpo.model.saving import SAVED_MODEL
from grpo.model_card import recipe_of
from grpo.record import samples
from grpo.runtime.console import duration, fitted, paint, paragraph, printable, say, width
from tasks.registry import task_options

PHASES = {"sample": "sampling", "reference": "reference", "update": "update"}
HUB_EXAMPLE = "python train_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct"
SHOWN = 4  # completions each time


def introduce(
    config: TrainConfig, lm: LanguageModel, environment: Mapping[str, Any], capabilities: ModelCapabilities
) -> None:
    """Print the model, the device, the resolved settings, and what the model does not support."""
    millions = sum(p.numel() for p in lm.model.parameters()) / 1e6
    where = environment["device"]
    if lm.device.type == "cpu":
        where = f"cpu, {environment['threads']} threads"
    where += f", {environment['precision']}"
    if environment["processes"] > 1:
        where = f"{environment['processes']} processes, each {where}"
    if config.model == "starter":
        say(f"Training the bundled starter model ({millions:.1f}M parameters) on {where}.")
        say(f"To train a Hub model instead: {HUB_EXAMPLE}")
    else:
        say(f"Training {printable(config.model)} ({millions:,.1f}M parameters) on {where}.")
    for note in lm.notes:
        say(note)
    if recipe := recipe_of(config.model):
        say(f"Its recipe is grpo/recipes/{recipe.name}; the command line overrides it.")
    _say_settings(config)
    shared = {"the update": capabilities.supports_packing, "sampling": capabilities.supports_cache_expansion}
    if unshared := " and ".join(work for work, is_shared in shared.items() if not is_shared):
        say(f"This model's prompts cannot be shared by a group: in {unshared} each is run once a completion.\n")


def _say_settings(config: TrainConfig) -> None:
    """Print the settings of algorithm and task, and of the others those that are not the default."""
    line, options = "Settings:", task_options()
    for f in ordered_fields():
        value = getattr(config, f.name)
        if f.name in ("model", "output_dir") or value in ("", ()):
            continue
        if f.name in options and config.task not in options[f.name].tasks:
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


def show_outlook(outlook: Mapping[str, Any], seconds: float, steps: int, memory: int | None) -> None:
    """Print what a look before the first step found, with the expected seconds of a step and the memory so far."""
    o, g = outlook, outlook["num_generations"]
    say(f"Outlook: {o['teaching']:.0%} of {o['groups']} groups of {g} completions teach something.")
    say(
        f"  pass@1 {o['pass_at_1']:.0%}, pass@{g} {o['pass_at_g']:.0%}, "
        f"{o['well_formed']:.0%} well-formed, {o['truncated']:.0%} cut off by the token limit"
    )
    held = f", {memory / 2**20:,.0f} MiB of memory so far" if memory else ""
    say(f"  about {seconds:.2g} s a step, {duration(seconds * steps)} for all of them{held}\n")


def show_choice_by_reward() -> None:
    """Print that the mean reward chooses the best policy, and what would decide what is right."""
    say("The best policy is that of the highest mean reward on validation: all rewards are your own functions,")
    say("and accuracy counts only answers that equal the problem's own. What is right, --correct decides.\n")


def show_fine_tuning(entry: Mapping[str, Any], when: str, teaches_working: bool = True) -> None:
    """Print the test of the model before or after the supervised steps."""
    say(f"{when} fine-tuning: test {accuracy_text(entry)}, {100 * entry['well_formed']:.0f}% well-formed")
    if not teaches_working:
        say("The task's training problems have no working: answers alone are taught.")


def show_evaluation(entry: Mapping[str, Any], improved: bool) -> None:
    """Print one line about an evaluation on the way."""
    best = "  best so far, saved" if improved and entry["step"] else ""
    more = f"{100 * entry['well_formed']:.0f}% well-formed"
    if "reward" in entry:
        more = f"reward {entry['reward']:.3f}, {more}"
    if entry.get("drift") is not None:
        more += f", drift {nats(entry['drift'])}"
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


def conclude(folder: Path, record: Mapping[str, Any], seconds: float, example: str) -> None:
    """Print what the run reached, what it cost the neighbouring skills, and what to do next.

    `example` is a question to try.
    """
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
    if was := record.get("before_sft"):
        say(f"  before fine-tuning {accuracy_text(was):>32}")
    for line in by_category(before, after) + sampled(before, after) + drifted(after):
        say(f"  {line}")
    if kl:
        say(f"  KL to reference    {fmean(kl):.3f} nats a token (mean of the last {len(kl)} steps)")
    if after["step"] == 0:
        say("  No evaluation was better than the start, so saved_model/ holds the starting model.")
    say("  A loss near 0 is normal: advantages are centred in each group and the ratio starts at 1.")
    _list_findings(record)
    _say_times(record)
    say(f"Written to {folder}/: {SAVED_MODEL}/, grpo_metrics.json, {samples.FILE_NAME}, and as pictures")
    say("  grpo_overview.png, grpo_training_curve.png, grpo_kl_divergence.png (plot_metrics.py --html: a page)")
    if record.get("sft"):
        say("  and grpo_sft_curve.png")
    where = "" if folder == Path() else f" --model {folder / SAVED_MODEL}"
    say(f'Next: python inference.py{where} --compare "{example}"')


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


def nats(value: float) -> str:
    """Format with three decimals, and no minus before a zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def drifted(after: Mapping[str, Any]) -> list[str]:
    """Format how far the saved policy is from the start on what it was not trained on."""
    drift = after.get("drift")
    return [] if drift is None else [f"drift              {nats(drift)} nats a token on unrelated questions"]


def show_finding(finding: Mapping[str, Any]) -> None:
    """Print a finding on the run's health."""
    paragraph(f"step {finding['step']:>4}  {finding['name']}: {finding['text']}", indent=11)
    for example in finding.get("examples", ()):
        paragraph(f"    {example}", indent=6)


def _list_findings(record: Mapping[str, Any]) -> None:
    if record.get("findings"):
        say("Findings about this run (explained in grpo/diagnostics/README.md):")
    for finding in record.get("findings", ()):
        show_finding(finding)


def interrupted(folder: Path, place: str, reason: str) -> None:
    """Print, after a signal, what was saved and how to continue. `place` is where it stopped, such as "step 25"."""
    *saved, last = ["Checkpoint", "metrics", "plots"] + [f"{SAVED_MODEL}/"] * (folder / SAVED_MODEL).exists()
    say(f"\nStopped after {place} ({reason}). {', '.join(saved)} and {last} are in {folder}/.")
    say("The same command continues from here.")


def continuing(place: str, threads_then: int, threads_now: int) -> None:
    """Print, at the start of a launch that continues a run, where it continues, such as "step 25"."""
    say(f"Continuing from the checkpoint of {place}.")
    if threads_then != threads_now:
        say(f"It was computed with {threads_then} threads, now there are {threads_now}: the last digits may differ.")


def already_finished(folder: Path, record: Mapping[str, Any]) -> None:
    """Print, in the folder of a run that has ended, what it reached and the two ways to continue."""
    tests = [entry for entry in record["evals"] if entry["split"] == "test"]
    ending = record["finished"]
    say(f"The run in {folder.resolve()} is finished: {ending['reason']} (step {ending['step']}).")
    say(f"  test accuracy  {accuracy_text(tests[0])}  ->  {accuracy_text(tests[-1])}")
    _list_findings(record)
    say("The plots are drawn again. A larger --num-iterations continues it; --fresh moves it aside and starts over.")


def model_card(
    config: TrainConfig, best: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any] | None
) -> str:
    """Return README.md of saved_model/: what it is, its accuracy with n and interval, how it was made."""
    lines = [
        f"# A model trained with GRPO on {config.task}",
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
