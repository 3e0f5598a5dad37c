"""Ask the trained model.

    python inference.py "What is (4 - 9) * 6?"
    python inference.py --compare "What is (4 - 9) * 6?"        before and after training
    python inference.py --temperature 1 --samples 16 --vote "What is (4 - 9) * 6?"
    python inference.py < questions.txt                          one question a line
    python inference.py --evaluate --compare                     accuracy on held-out problems, before and after

Uses saved_model/ if it is there, the bundled starter otherwise, or any model with --model. --evaluate measures as a
run does. All models get the task, prompts and limit of the last: a base is asked as the model that came of it.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grpo.config import DEVICES, MOST_TOKENS
from grpo.evaluation.intervals import majority
from grpo.model_card import read_card, resolve
from grpo.runtime.console import printable
from tasks.common.parsing import has_form, parse_answer
from tasks.common.prompts import STYLES, chat, system_prompt
from tasks.registry import TASKS, task_options

if TYPE_CHECKING:
    from grpo.model.language_model import LanguageModel

LEAST_TEMPERATURE = 1e-3  # below it, logits / temperature overflow float32
TOKENS_WITHOUT_CARD = 128  # for a model without a limit of its own


def task_setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of all tasks."""
    for name, option in reversed(task_options().items()):
        text = f"{option.meaning}  [default: the model's own]"
        command = click.option(f"--{name.replace('_', '-')}", name, type=option.type, help=text)(command)
    return command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("questions", nargs=-1)
@click.option(
    "--model",
    "models",
    multiple=True,
    help="as for training  [default: saved_model/ if there, else starter]; twice to --evaluate two",
)
@click.option("--compare", is_flag=True, help="the model before training too, side by side")
@click.option("--evaluate", is_flag=True, help="measure accuracy on held-out problems instead of asking")
@click.option("--split", type=click.Choice(("validation", "test")), help="to --evaluate on  [default: test]")
@click.option("--task", help=f"{', '.join(TASKS)} or FILE.py:NAME, to --evaluate on  [default: the model's own]")
@click.option("--task-arg", multiple=True, help="key=value, an argument of the --task in your file")
@task_setting_options
@click.option("--prompt-style", type=click.Choice(STYLES), help="to --evaluate in  [default: the model's own]")
@click.option("--shots", type=click.IntRange(0), help="worked examples, with --evaluate  [default: the model's own]")
@click.option("--pass-at-k", type=click.IntRange(0), help="also pass@k and maj@k by sampling, with --evaluate")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="completions a question")
@click.option("--vote", is_flag=True, help="answer with what most of the samples say, and their share")
@click.option(
    "--max-new-tokens", type=click.IntRange(1, MOST_TOKENS), help="longest completion  [default: the model's own]"
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="of sampling")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="where to compute")
def main(
    questions: tuple[str, ...],
    models: tuple[str, ...],
    compare: bool,
    evaluate: bool,
    temperature: float,
    samples: int,
    vote: bool,
    max_new_tokens: int | None,
    seed: int,
    device: str,
    **exam: Any,
) -> None:
    """Answer QUESTIONS (or one a line on standard input) and print completion and parsed answer."""
    given = {name: value for name, value in exam.items() if value not in (None, ())}
    if evaluate and (questions or temperature != 0 or samples > 1 or vote):
        raise click.UsageError(
            "--evaluate takes no questions, --temperature, --samples or --vote: it answers greedily"
        )
    if compare and len(models) > 1:
        raise click.UsageError("--compare finds the other model itself; give one --model")
    if not evaluate and (given or len(models) > 1):
        too_much = ", ".join(f"--{option.replace('_', '-')}" for option in given) or "--model given twice"
        raise click.UsageError(f"{too_much} is for --evaluate")
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise click.UsageError(
            f"--temperature {temperature} cannot be; 0 is greedy, else at least {LEAST_TEMPERATURE}"
        )
    if samples > 1 and temperature == 0:
        raise click.UsageError("--samples above 1 needs --temperature above 0: greedy completions are all alike")
    name = models[-1] if models else "saved_model" if Path("saved_model").is_dir() else "starter"
    if vote and samples == 1:
        raise click.UsageError("--vote is among samples; give --samples N and a --temperature")
    try:
        if evaluate:
            names = [before_training(name), name] if compare else list(models or [name])
            given |= {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
            examine(names, {**given, "device": device, "seed": seed})
            return
        asked = read_questions(questions)
        names = [before_training(name), name] if compare else [name]
        click.echo("Model: " + " -> ".join(printable(n) for n in names), err=True)
        sampling = Sampling(temperature, samples, max_new_tokens, seed)
        card = read_card(name)
        answers = [complete(n, card, asked, device, sampling) for n in names]
    except (ValueError, OSError) as error:
        raise click.ClickException(printable(str(error))) from None
    except KeyboardInterrupt:
        sys.exit(130)
    style, kind = card.get("prompt_style", "answer"), card.get("kind", "integer")
    labels = ["before: ", "after:  "] if compare else [""]
    for i, question in enumerate(asked):
        click.echo(printable(question))
        for label, completions in zip(labels, answers, strict=True):
            if vote:
                show_vote(label, completions[i], kind)
            for text in () if vote else completions[i]:
                show(label, text, style, kind)


def examine(names: Sequence[str], given: dict[str, Any]) -> None:
    """Measure the models as a run from the last one would, and print the table."""
    split = given.pop("split", "test")
    try:
        config = resolve({"model": names[-1], "pass_at_k": 0, **given})
    except ValueError as error:
        raise click.UsageError(printable(str(error))) from None

    from tasks.common.user_file import naming_own_code
    from tasks.registry import make_task
    from tasks.skills import SKILLS

    task = make_task(config)
    card = read_card(names[-1])
    other = {"task", "shots", "prompt_style"} & set(given)
    if card.get("examples") and not other:  # those of the run, whatever its data are now
        task = replace(task, examples=card["examples"])

    from grpo.evaluation.model_comparison import measure, table

    skills = {skill: SKILLS[skill] for skill in card.get("skills", []) if skill in SKILLS}
    with naming_own_code():
        found = measure(names, config, task, skills, split)
    click.echo(f"{task.name}, {split} problems, style {task.style}, greedy, up to {config.max_new_tokens} tokens")
    click.echo("\n".join(table(found, split)))


def read_questions(questions: Sequence[str]) -> list[str]:
    """Return the questions of the command line, or those of standard input. Raises ValueError for an empty one."""
    if not questions:
        if sys.stdin.isatty():
            raise ValueError('give a question, such as "What is (4 - 9) * 6?", or one a line on standard input')
        questions = [line for line in sys.stdin.read().splitlines() if line.strip()]
        if not questions:
            raise ValueError("there is no question on standard input; write one a line")
    if any(not question.strip() for question in questions):
        raise ValueError('a question is empty; ask something, such as "What is (4 - 9) * 6?"')
    # a byte that is not UTF-8 reaches Python as a lone surrogate, which no tokenizer takes
    return [question.strip().encode("utf-8", "replace").decode() for question in questions]


def before_training(name: str) -> str:
    """Return the model that a saved model was trained from. Raises ValueError if that is not known."""
    base = read_card(name).get("base_model")
    if not isinstance(base, str):
        raise ValueError(f"{name} does not say what it was trained from; --compare needs a saved_model/ of a run")
    return base


@dataclass(frozen=True)
class Sampling:
    """How to answer: greedily at temperature 0, else with samples that are a function of the seed."""

    temperature: float
    samples: int
    max_new_tokens: int | None
    seed: int


def complete(
    name: str, card: Mapping[str, Any], questions: Sequence[str], device: str, sampling: Sampling
) -> list[list[str]]:
    """Return the completions of a model for each question, asked as the card says."""
    from grpo.generation.greedy import greedy
    from grpo.model.loading import load
    from grpo.runtime.device import choose_device

    lm = load(name, choose_device(device), card.get("settings", {}).get("precision", "auto"))
    system = card.get("system_prompt") or system_prompt(
        card.get("prompt_style", "answer"), card.get("kind", "integer")
    )
    prompts = lm.prompts([chat(question, system, card.get("examples", [])) for question in questions])
    limit = sampling.max_new_tokens or card.get("max_new_tokens", TOKENS_WITHOUT_CARD)
    if sampling.temperature == 0:
        return [[text] for text in lm.decode(greedy(lm, prompts, limit).rows(with_end=False))]
    return sampled(lm, prompts, limit, sampling)


def sampled(lm: "LanguageModel", prompts: Sequence[Sequence[int]], limit: int, sampling: Sampling) -> list[list[str]]:
    """Return random completions of each prompt."""
    from grpo.generation.sampling import Generator, SamplingParams, sampling_uniforms
    from grpo.model.tokens import left_pad
    from grpo.runtime.precision import in_precision

    generator = Generator(lm.model)
    params = SamplingParams(limit, lm.end_ids, sampling.samples, sampling.temperature)
    texts = []
    for number, prompt in enumerate(prompts):
        uniforms = sampling_uniforms(sampling.seed, number, sampling.samples, limit)
        with in_precision(lm.model):
            completions = generator(*left_pad([prompt], lm.pad_id, lm.device), params, uniforms)
        texts.append(lm.decode(completions.rows(with_end=False)))
    return texts


def show_vote(label: str, texts: Sequence[str], kind: str) -> None:
    """Print the answer that most completions give, and how many do."""
    answers = [parse_answer(text, kind) for text in texts]
    place = majority(answers)
    if place is None:
        click.echo(f"  {label}none of {len(texts)} samples gives an answer")
        return
    count = answers.count(answers[place])
    share = f"{count} of {len(texts)} samples ({count / len(texts):.0%})"
    click.echo(f"  {label}{printable(str(answers[place]))}   [{share}]")


def show(label: str, text: str, style: str, kind: str) -> None:
    """Print a completion, escaped, and the answer of its kind that was parsed from it."""
    answer = parse_answer(text, kind)
    form = "" if has_form(text, style) else f", not in the form of style {style}"
    parsed = "no answer" if answer is None else f"answer {printable(str(answer))}{form}"
    click.echo(f"  {label}{printable(text)}   [{parsed}]")


if __name__ == "__main__":
    main()
