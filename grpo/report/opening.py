"""Print what a user should know before the first step of a run."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from grpo.config import TrainConfig, ordered_fields
from grpo.evaluation.intervals import accuracy_text
from grpo.model.language_model import LanguageModel
from grpo.model_card import recipe_of
from grpo.runtime.console import (
    WIDEST,
    command_line,
    duration,
    fitted,
    paragraph,
    printable,
    say,
    show_command,
    width,
)
from grpo.runtime.device import TRAITS, device_notes, processes_for
from grpo.setting import as_typed
from tasks.registry import task_options, task_shares

HUB_EXAMPLE = ("python", "train_grpo.py", "--model", "Qwen/Qwen2.5-0.5B-Instruct")


def introduce(
    config: TrainConfig,
    lm: LanguageModel,
    environment: Mapping[str, Any],
    task_notes: Sequence[str] = (),
) -> None:
    """Print the model, the device and the settings."""
    millions = sum(p.numel() for p in lm.model.parameters()) / 1e6
    where = environment["device"]
    if lm.model.device.type == "cpu":
        where = f"cpu, {environment['threads']} threads"
    where += f", {environment['precision']}"
    if environment["processes"] > 1:
        where = f"{environment['processes']} processes, each {where}"
    if config.model == "starter":
        say(f"Training the bundled starter model ({millions:.1f}M parameters) on {where}.")
        say(command_line("To train a Hub model instead:", HUB_EXAMPLE))
    else:
        say(f"Training {printable(config.model)} ({millions:,.1f}M parameters) on {where}.")
    for note in (*device_notes(lm.model.device), *lm.notes, *task_notes):
        say(printable(note))
    processes = processes_for(lm.model.device, config.batch_size)
    if processes > 1 and "WORLD_SIZE" not in os.environ:  # torchrun sets WORLD_SIZE
        cards = TRAITS[lm.model.device.type].count()
        command = ("torchrun", "--nproc-per-node", str(processes), "train_grpo.py")
        show_command(f"This run uses 1 of {cards} GPUs. With the same options, this uses {processes}:", command)
    if recipe := recipe_of(config.model):
        say(f"The model's settings come from grpo/recipes/{recipe.name}; the command line overrides them.")
    _say_settings(config)


def _say_settings(config: TrainConfig) -> None:
    """Print the non-empty settings of task and algorithm, and other settings that differ from their defaults."""
    line = "Settings:"
    options = task_options()
    columns = min(WIDEST, width()) - 2
    tasks = {share.spec for share in task_shares(config.task)}
    for f in ordered_fields():
        value = getattr(config, f.name)
        if f.name in ("model", "output_dir") or value in ("", ()):
            continue
        if f.name in options and not tasks & set(options[f.name].tasks):
            continue
        if f.metadata["group"] not in ("Task", "Algorithm") and value == f.default:
            continue
        text = " ".join(value) if isinstance(value, tuple) else str(value)
        item = f"{f.name}={printable(text)}"
        if len(line) + len(item) > columns:
            say(line)
            line = "         "
        line += " " + item
    say(line + "\n")


def show_continuation(place: str, threads_then: int, threads_now: int) -> None:
    """Print where a run continues, such as "step 25", and whether the number of threads has changed."""
    say(f"Continuing from the checkpoint of {place}.")
    if threads_then != threads_now:
        say(f"The run used {threads_then} threads before and uses {threads_now} now: results may differ slightly.")


def show_outlook(outlook: Mapping[str, Any], seconds: float, steps: int, memory: int | None) -> None:
    """Print the outlook, the expected time of a step and of all `steps`, and `memory`, the bytes used so far."""
    show_shares(outlook)
    memory_text = f", {memory / 2**20:,.0f} MiB of memory so far" if memory else ""
    step = duration(seconds, decimals=True)
    say(f"  about {step} a step, {duration(seconds * steps)} for all steps{memory_text}\n")


def show_shares(outlook: Mapping[str, Any]) -> None:
    """Print the outlook: shares of mixed groups, and of right, well-formed and truncated completions."""
    o, g = outlook, outlook["num_generations"]
    mixed = round(o["teaching"] * o["groups"])
    say(f"Outlook: {mixed} of {o['groups']} groups have mixed rewards, so a non-zero advantage.")
    say(f"  pass@1 {o['pass_at_1']:.0%}, pass@{g} {o['pass_at_g']:.0%}: the room for improvement is {_room(o)}")
    say(f"  {o['well_formed']:.0%} well-formed, {o['truncated']:.0%} cut off by the token limit")


def _room(outlook: Mapping[str, Any]) -> str:
    """Return the room for improvement, as text: pass@G − pass@1, where G is the group size."""
    return f"{outlook['pass_at_g'] - outlook['pass_at_1']:.0%}"


def show_trials(
    trials: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], options: Sequence[str], script: Sequence[str]
) -> None:
    """Print a table of trials, and a command with the settings of the best trial if enough of its groups are mixed.

    A trial is a pair: the settings that differ from the run's (none in the first trial), and the shares measured with
    them. The command has the words of `script`, then `options`, which are empty if no trial is good enough.
    """
    _, look = trials[0]
    best_of_group = f"pass@{look['num_generations']}"
    say(f"\nThe same {look['groups']} problems under other settings:")
    say(f"  {'setting':29} well-formed cut off pass@1 {best_of_group:>7} room mixed")
    for changes, o in trials:
        words = {name: value for name, value in changes.items() if value != ""}
        name = " ".join(v[-1] if isinstance(v, tuple) else f"{as_typed(name)} {v}" for name, v in words.items())
        say(
            f"  {fitted(name or 'as asked', 29):29} {o['well_formed']:>11.0%} {o['truncated']:>7.0%} "
            f"{o['pass_at_1']:>6.0%} {o['pass_at_g']:>7.0%} {_room(o):>4} {o['teaching']:>5.0%}"
        )
    say(f"  room: the room for improvement, {best_of_group} - pass@1")
    say("  mixed: the share of groups with mixed rewards, from which GRPO learns")
    if options:
        show_command("The setting with the most mixed groups:", [*script, *options])
    elif look["all_right"] == 1:
        say("All answers are right already: take harder problems.")
    else:
        say("None of these settings helps: take easier problems, a larger model, or --sft-steps 50 before GRPO.")


def show_stop(folder: str, is_kept: bool) -> None:
    """Print why a run ends before its first step, and how to train nevertheless."""
    kept = f"The fine-tuned model is kept in {folder}; --fresh starts over with other settings." if is_kept else ""
    paragraph(
        "Stopped before the first step: hardly any group has mixed rewards, so GRPO would learn hardly anything. "
        f"{kept or 'The folder is free for a run with other settings.'} --train-anyway trains nevertheless.",
        indent=0,
    )


def show_choice_by_reward(always: bool) -> None:
    """Print when the mean reward chooses the best policy, and how to define which answers are right.

    If not `always`, the mean reward chooses only until an answer is right.
    """
    if not always:
        paragraph(
            "Until an answer to a validation problem is right, the policy with the highest mean reward is saved; "
            "from then on, the policy with the highest accuracy. Accuracy counts only answers that equal the "
            "problem's answer. To define which answers are right, pass --correct FILE.py:FUNCTION.",
            indent=0,
        )
        say()
        return
    paragraph(
        "The policy with the highest mean reward on validation problems is saved, because all rewards are your own "
        "functions. Accuracy counts only answers that equal the problem's answer. To define which answers are right, "
        "pass --correct FILE.py:FUNCTION.",
        indent=0,
    )
    say()


def show_fine_tuning(entry: Mapping[str, Any], when: str, teaches_working: bool = True) -> None:
    """Print the model's test accuracy before or after the supervised steps."""
    say(f"{when} fine-tuning: test {accuracy_text(entry)}, {100 * entry['well_formed']:.0f}% well-formed")
    if not teaches_working:
        say("The task's training problems have no worked steps, so fine-tuning trains on answers alone.")
