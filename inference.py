"""Ask the trained model.

    python inference.py                                          type questions, one after another
    python inference.py "What is (4 - 9) * 6?"
    python inference.py --compare "What is (4 - 9) * 6?"        before and after training
    python inference.py --temperature 1 --samples 16 --vote "What is (4 - 9) * 6?"
    python inference.py < questions.txt                          one question a line
    python inference.py --evaluate --compare                     accuracy on held-out problems, before and after

Without --model, the model is saved_model/ if it is there, else the bundled starter. --evaluate measures accuracy in
the same way as a training run. With --compare, both models get the task, prompt and token limit of the trained one.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grpo.config import DEVICES, MAX_NEW_TOKENS
from grpo.evaluation.intervals import majority
from grpo.launch.asking import as_task, before_training, with_examples
from grpo.launch.command import EXAMPLE, Asking, run_script, without_quotes
from grpo.launch.start import mistakes_are_wrong_usage
from grpo.model_card import read_card, resolve
from grpo.runtime.atomic_io import write_atomic
from grpo.runtime.console import printable, say, terminal_columns
from tasks.base import chat
from tasks.common.parsing import has_form, parse_answer
from tasks.common.prompts import DEFAULT_WORDING, STYLES, system_prompt
from tasks.registry import TASKS, task_options

if TYPE_CHECKING:
    from grpo.model.language_model import LanguageModel

MIN_TEMPERATURE = 1e-3  # Logits divided by a smaller temperature may overflow float32.
DEFAULT_MAX_NEW_TOKENS = 128  # This is the token limit for a model without a grpo.json.


def task_setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of all tasks to a command."""
    for name, option in reversed(task_options().items()):
        text = f"{option.meaning}  [default: the model's own]"
        command = click.option(f"--{name.replace('_', '-')}", name, type=option.type, help=text)(command)
    return command


@click.command(cls=Asking, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("questions", nargs=-1)
@click.option(
    "--model",
    "models",
    multiple=True,
    help="a model, as for train_grpo.py; repeatable with --evaluate  [default: saved_model/ if there, else starter]",
)
@click.option("--compare", is_flag=True, help="also ask the model as it was before training, and show both")
@click.option("--evaluate", is_flag=True, help="measure accuracy on held-out problems instead of asking")
@click.option("--split", type=click.Choice(("validation", "test")), help="problems to --evaluate on  [default: test]")
@click.option(
    "--task",
    multiple=True,
    help=f"task to --evaluate on: {', '.join(TASKS)} or FILE.py:NAME; without --evaluate, for a model of several "
    "tasks, the task whose prompt is used  [default: the model's own]",
)
@click.option("--task-arg", multiple=True, help="key=value, an argument for the task in your file; repeatable")
@task_setting_options
@click.option("--prompt-style", type=click.Choice(STYLES), help="for --evaluate  [default: the model's own]")
@click.option("--shots", type=click.IntRange(0), help="worked examples for --evaluate  [default: the model's own]")
@click.option(
    "--pass-at-k",
    type=click.IntRange(0),
    help="with --evaluate, also measure pass@k and maj@k, for k = 1, 2, 4, … up to this; 0: neither",
)
@click.option("--json", is_flag=True, help="with --evaluate, print one JSON object instead of a table")
@click.option("--answers", type=click.Path(path_type=Path), help="with --evaluate, write all answers as JSON Lines")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="completions for each question")
@click.option("--vote", is_flag=True, help="show the answer that most samples give, and how many give it")
@click.option("--max-new-tokens", type=click.IntRange(1, MAX_NEW_TOKENS), help="token limit  [default: the model's]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="seed of sampling")
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
    """Answer QUESTIONS: print each completion and the answer parsed from it.

    Without QUESTIONS, ask for them on a terminal, or read them from standard input, one a line.
    """
    given = {name: value for name, value in exam.items() if value not in (None, ()) and value is not False}
    if evaluate and (questions or temperature != 0 or samples > 1 or vote):
        raise click.UsageError("--evaluate answers greedily: leave out questions, --temperature, --samples, --vote")
    if compare and len(models) > 1:
        raise click.UsageError("--compare finds the model before training by itself, so give only one --model")
    asks_as = given.pop("task", ()) if not evaluate else ()
    if not evaluate and (given or len(models) > 1):
        options = ", ".join(f"--{option.replace('_', '-')}" for option in given) or "--model given twice"
        raise click.UsageError(f"{options} cannot be used without --evaluate")
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
        raise click.UsageError(f"--temperature {temperature} is neither 0 (greedy) nor at least {MIN_TEMPERATURE}")
    if samples > 1 and temperature == 0:
        raise click.UsageError("--samples above 1 needs --temperature above 0: greedy completions are all the same")
    if len(questions) > 1 and not any(len(question.split()) > 1 for question in questions):
        raise click.UsageError(without_quotes(questions))
    name = models[-1] if models else "saved_model" if Path("saved_model").is_dir() else "starter"
    if vote and samples == 1:
        raise click.UsageError("--vote needs several samples; give --samples N and --temperature")
    try:
        names = [before_training(name), name] if compare else list(models or [name])
        if evaluate:
            given |= {"max_new_tokens": max_new_tokens} if max_new_tokens else {}
            with memory_in_words():
                examine(names, {**given, "device": device, "seed": seed})
            return
        is_conversation = not questions and on_terminal()
        questions = [] if is_conversation else read_questions(questions)
        say("Model: " + " -> ".join(printable(n) for n in names), sys.stderr)
        sampling = Sampling(temperature, samples, max_new_tokens, seed)
        card = as_task(read_card(name), asks_as)
        if is_conversation:
            with memory_in_words():
                loaded = [load_model(n, card, device) for n in names]
            converse(loaded, card, sampling, vote)
            return
        with memory_in_words():
            answers = [complete(load_model(n, card, device), card, questions, sampling) for n in names]
        for question, *completions in zip(questions, *answers, strict=True):
            say(printable(question))
            show(completions, card, vote)
    except (ValueError, OSError) as error:
        raise click.ClickException(printable(str(error))) from None
    except KeyboardInterrupt:
        say("", sys.stderr)  # so that the shell's prompt begins on a new line
        sys.exit(130)


@contextmanager
def memory_in_words() -> Iterator[None]:
    """Raise a ValueError that tells users what to do, if memory runs out in the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        from grpo.runtime.device import is_out_of_memory

        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise ValueError(
            "memory ran out; use a smaller model, lower --samples or --max-new-tokens, or give --device cpu"
        ) from None


def examine(names: Sequence[str], given: dict[str, Any]) -> None:
    """Measure models as a training run does, all with the settings of the last model, and print a table or JSON.

    Raises ValueError if a model cannot be measured or the answers cannot be written.
    """
    split = given.pop("split", "test")
    is_json = given.pop("json", False)
    file = given.pop("answers", None)
    # Check the file first, because measuring the models may take minutes.
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise ValueError(f"--answers {printable(str(file))} cannot be written; give a file in a writable folder")
    with mistakes_are_wrong_usage():
        config = resolve({"model": names[-1], "pass_at_k": 0, **given})

    from tasks.common.user_file import naming_own_code
    from tasks.registry import make_task
    from tasks.skills import SKILLS

    task = make_task(config)
    card = read_card(names[-1])
    if not {"task", "shots", "prompt_style"} & set(given):  # Use the card's examples; the data may have changed.
        task = with_examples(task, card)

    from grpo.evaluation.model_comparison import answers, as_json, measure, table

    skills = {skill: SKILLS[skill] for skill in card.get("skills", []) if skill in SKILLS}
    with naming_own_code(), redirect_stdout(sys.stderr) if is_json else nullcontext():
        measured = measure(names, config, task, skills, split)
    how = {"task": task.name, "split": split, "prompt_style": task.style, "max_new_tokens": config.max_new_tokens}
    if is_json:
        click.echo(json.dumps({**how, **as_json(measured)}))
    else:
        say(f"{task.name}, {split} problems, style {task.style}, greedy, up to {config.max_new_tokens} tokens")
        say("\n".join(table(measured, split, terminal_columns())))
    if file is not None:
        write_atomic(file, "".join(json.dumps(row) + "\n" for row in answers(measured)).encode())


def read_questions(questions: Sequence[str]) -> list[str]:
    """Return the questions from the command line or standard input. Raises ValueError if a question is missing."""
    if not questions:
        if sys.stdin is None or sys.stdin.isatty():  # sys.stdin is None if it is closed
            raise ValueError(f'give a question, such as "{EXAMPLE}", or write one a line on standard input')
        questions = [line for line in sys.stdin.read().splitlines() if line.strip()]
        if not questions:
            raise ValueError("there is no question on standard input; write one a line")
    if any(not question.strip() for question in questions):
        raise ValueError(f'a question is empty; give one, such as "{EXAMPLE}"')
    # A byte that is not UTF-8 reaches Python as a lone surrogate, which no tokenizer accepts.
    return [question.strip().encode("utf-8", "replace").decode() for question in questions]


@dataclass(frozen=True)
class Sampling:
    """Hold the settings of generation: greedy at temperature 0, else samples that depend on the seed."""

    temperature: float
    samples: int
    max_new_tokens: int | None
    seed: int


def load_model(name: str, card: Mapping[str, Any], device: str) -> "LanguageModel":
    """Load a model in the precision that `card` names. Raises ValueError if the model cannot be loaded."""
    from grpo.model.loading import load
    from grpo.runtime.device import choose_device

    settings = card.get("settings", {})
    template_args = settings.get("chat_template_arg", ())
    return load(name, choose_device(device), settings.get("precision", "auto"), template_args=template_args)


def complete(
    lm: "LanguageModel", card: Mapping[str, Any], questions: Sequence[str], sampling: Sampling, first: int = 0
) -> list[list[str]]:
    """Return the completions of each question; samples are a function of the seed and the question's number.

    `first` is the number of the first question. Raises ValueError if a question is too long for the model.
    """
    from grpo.generation.greedy import greedy
    from grpo.generation.sampling import Generator, SamplingParams, sampling_uniforms
    from grpo.model.language_model import check_room
    from grpo.runtime.precision import in_precision
    from grpo.scoring.tokens import left_pad

    system = card.get("system_prompt") or system_prompt(
        card.get("prompt_style", "answer"), card.get("kind", "integer"), DEFAULT_WORDING
    )
    prompts = lm.prompts([chat(question, system, card.get("examples", [])) for question in questions])
    limit = sampling.max_new_tokens or card.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    check_room(lm, prompts, limit)
    if sampling.temperature == 0:
        return [[text] for text in lm.decode(greedy(lm, prompts, limit).rows(with_end=False))]
    generator = Generator(lm.model)
    params = SamplingParams(limit, lm.end_ids, sampling.samples, sampling.temperature)
    texts = []
    for number, prompt in enumerate(prompts, first):
        uniforms = sampling_uniforms(sampling.seed, number, sampling.samples, limit)
        with in_precision(lm.model):
            completions = generator(*left_pad([prompt], lm.pad_id, lm.model.device), params, uniforms)
        texts.append(lm.decode(completions.rows(with_end=False)))
    return texts


def on_terminal() -> bool:
    """Return whether standard input and output are a terminal, so that the user can be asked for questions."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def converse(models: Sequence["LanguageModel"], card: Mapping[str, Any], sampling: Sampling, vote: bool) -> None:
    """Ask for questions and answer each, until an empty line or Ctrl-D."""
    with suppress(ImportError):  # Windows has no readline.
        import readline  # noqa: F401, lets the user edit lines and recall earlier ones

    say(f"Ask a question, such as: {EXAMPLE} An empty line or Ctrl-D ends the session.", sys.stderr)
    for number in count():
        try:
            line = input("> ").strip()
        except EOFError:
            line = ""
            say()
        if not line:
            return
        try:
            with memory_in_words():
                answers = [complete(lm, card, read_questions([line]), sampling, number)[0] for lm in models]
            show(answers, card, vote)
        except ValueError as error:  # the question is too long or memory ran out; the next one may fit
            say(f"Error: {printable(str(error))}", sys.stderr)


def show(answers: Sequence[Sequence[str]], card: Mapping[str, Any], vote: bool) -> None:
    """Print each model's completions of one question or, with `vote`, the answer that most completions give."""
    style, opening = card.get("prompt_style", "answer"), card.get("opening", "")
    kind = card.get("kind", "integer")
    labels = ["before: ", "after:  "] if len(answers) > 1 else [""]
    for label, texts in zip(labels, answers, strict=True):
        if vote:
            say(f"  {label}{vote_of(texts, kind)}")
        for text in () if vote else texts:
            say(f"  {label}{printable(text)}   [{parsed(text, style, kind, opening)}]")


def vote_of(texts: Sequence[str], kind: str) -> str:
    """Return a text to show: the answer that most completions give, and how many give it."""
    answers = [parse_answer(text, kind) for text in texts]
    place = majority(answers)
    if place is None:
        return f"none of {len(texts)} samples gives an answer"
    votes = answers.count(answers[place])
    return f"{printable(str(answers[place]))}   [{votes} of {len(texts)} samples ({votes / len(texts):.0%})]"


def parsed(text: str, style: str, kind: str, opening: str = "") -> str:
    """Return a text to show: the answer parsed from a completion, and a remark if it lacks the form of the style."""
    answer = parse_answer(text, kind)
    form = "" if has_form(text, style, opening) else f", not in the form of style {style}"
    return "no answer" if answer is None else f"answer {printable(str(answer))}{form}"


if __name__ == "__main__":
    run_script(main)
