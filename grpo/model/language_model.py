"""A causal language model with its tokenizer: chats become prompts, token ids become texts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo.config import TrainConfig
from grpo.runtime.console import printable
from tasks.base import Message, Task, first_few, task_of
from tasks.common.prompts import ideal_completion
from tasks.common.shots import solved_problem

MAX_CHARACTERS_PER_TOKEN = 64  # Before encoding, a question is cut to this many characters per position of the model.
MAX_NAMED_QUESTIONS = 5  # An error or a note names at most this many questions.
MEASURED_PROBLEMS = 64  # `limit_note` measures the completions of this many training problems.


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer and the ids that generation needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]  # every token id that ends a turn
    pad_id: int
    notes: tuple[str, ...] = ()  # remarks on the model's prompts, printed at the start of a run
    dropout: dict[str, float] = field(default_factory=dict)  # rates in config.json; dropout itself is switched off
    template_args: Mapping[str, Any] = field(default_factory=dict)  # variables of the chat template, by name

    @property
    def positions(self) -> int | None:
        """Return the number of tokens that prompt and completion may have together; None if there is no limit."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def prompts(self, chats: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Return the prompts as token ids. Raises ValueError if the template refuses a chat or an id is too large."""
        prompts = [encode_chat(self.tokenizer, chat, **self.template_args) for chat in chats]
        rows = self.model.get_input_embeddings().weight.shape[0]
        if (largest := max(map(max, filter(None, prompts)), default=0)) >= rows:
            raise ValueError(f"the tokenizer produces id {largest}, but the model's embedding has only {rows} rows")
        return prompts

    def completion(self, text: str) -> list[int]:
        """Return a completion as token ids, with the token that ends the turn. Control tokens are encoded as text.

        Raises ValueError if the tokenizer has no token that ends a turn.
        """
        end_id = template_end_id(self.tokenizer)
        if end_id is None:
            raise ValueError("the tokenizer has no token that ends a turn, so the model cannot learn completions")
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids, end_id]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each row of token ids, special tokens included."""
        return self.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message], **template_args: Any) -> list[int]:
    """Return the ids of the prompt for the assistant's turn; control tokens in the messages are encoded as text."""
    options = {**template_args, "tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
    return render(tokenizer, chat, add_generation_prompt=True, **options)["input_ids"]


def template_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the special token with which the chat template ends an assistant's turn, else the EOS id."""
    completion = "c0mpl3ti0n"
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": completion}]
    _, separator, after = render(tokenizer, chat).rpartition(completion)
    if separator and (ids := tokenizer(after.strip(), add_special_tokens=False)["input_ids"]):
        token = tokenizer.added_tokens_decoder.get(ids[0])
        if token is not None and token.special:
            return ids[0]
    return tokenizer.eos_token_id


def render(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message], **options: Any) -> Any:
    """Render a chat with the template. Raises ValueError, in one printable line, if the template refuses the chat."""
    try:
        return tokenizer.apply_chat_template(list(chat), **({"tokenize": False} | options))
    except TemplateError as error:
        reason = printable(" ".join(str(error).split()))[:300]
        raise ValueError(f"the model's chat template refuses the prompt: {reason}") from None


def switch_off_dropout(model: PreTrainedModel) -> dict[str, float]:
    """Set all dropout to 0, so that train mode computes the same as eval mode; return the configured rates.

    GPT-2 has dropout modules. Other models keep the rate as a number in a module, or read it from the configuration.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)
    entries = model.config.to_dict().items()
    rates = {name: rate for name, rate in entries if "drop" in name and isinstance(rate, float) and rate}
    for name in rates:
        setattr(model.config, name, 0.0)
    return rates


def check_room(lm: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise ValueError if the longest prompt with a completion has more tokens than the model has positions."""
    longest = max(map(len, prompts))
    if lm.positions is not None and longest + max_new_tokens > lm.positions:
        raise ValueError(
            f"the longest prompt has {longest:,} tokens and a completion up to {max_new_tokens:,}, together more "
            f"than the model's {lm.positions:,} positions; shorten the question or lower --max-new-tokens"
        )


def fitting_task(lm: LanguageModel, task: Task, config: TrainConfig) -> Task:
    """Return the task without the problems whose prompt and completion have more tokens than the model has positions.

    A note of the returned task counts and names the problems left out. If all fit, return `task` itself. Raises
    ValueError, with the place in the file, if most problems are too long, or if the task cannot leave them out.

    If the task generates its problems, only one is checked. A token has at least one byte, so a question is encoded
    only if it has more bytes than the prompt has tokens left.
    """
    if lm.positions is None:
        return task
    if task.parts:
        parts = {name: fitting_task(lm, part, config) for name, part in task.parts.items()}
        notes = [f"{name}: {part.notes[-1]}" for name, part in parts.items() if part is not task.parts[name]]
        return replace(task, parts=parts, notes=[*task.notes, *notes]) if notes else task
    room = lm.positions - config.max_new_tokens
    max_characters = MAX_CHARACTERS_PER_TOKEN * lm.positions
    [frame] = lm.prompts([task.messages("?")])
    problems = list(task.listed()) or [task.training_problem(config.seed, 1, 0)]
    too_long = []
    for problem in problems:
        if len(frame) + len(problem.question.encode()) > room:
            [prompt] = lm.prompts([task.messages(problem.question[:max_characters])])
            if len(prompt) > room:
                too_long.append((problem, len(prompt)))
    if not too_long:
        return task
    limits = (
        f"with --max-new-tokens {config.max_new_tokens} they need more than the {lm.positions:,} positions of "
        f"{config.model}"
    )
    if 2 * len(too_long) <= len(problems):
        rest = task.without({problem.question for problem, _ in too_long})
        if rest is not None:
            places = (f"{problem.place}: {tokens:,} tokens" for problem, tokens in too_long)
            count = f"{len(too_long):,} of {len(problems):,} problems"
            note = f"{count} are left out: their prompts are too long, and {limits}"
            return replace(rest, notes=[*task.notes, f"{note} ({first_few(places, MAX_NAMED_QUESTIONS)})."])
    problem, tokens = too_long[0]
    place = f"{problem.place}: " if problem.place else ""
    at_least = "more than " if len(problem.question) > max_characters else ""
    examples = f" with {len(task.examples) // 2} worked examples" if task.examples else ""
    advice = "lower --shots" if examples and len(frame) > room / 2 else "shorten or remove the question"
    if len(too_long) > 1:
        places = first_few((other.place for other, _ in too_long[1:]), MAX_NAMED_QUESTIONS - 1)
        advice += f" (and {len(too_long) - 1} more of {len(problems):,}: {places})"
    raise ValueError(f"{place}the prompt{examples} has {at_least}{tokens:,} tokens, and {limits}; {advice}")


def limit_note(lm: LanguageModel, task: Task, config: TrainConfig) -> str | None:
    """Return a note if completions that the run teaches, shows or asks for exceed --max-new-tokens, else None.

    Fine-tuning teaches ideal completions, worked examples show them, and every run needs at least the bare answers. A
    model that has learned to write longer completions is cut off every time, so no completion gets a reward. Raises
    ValueError if the run has supervised steps, but the task knows no right completion.
    """
    rows = range(MEASURED_PROBLEMS)
    if config.sft_steps:
        texts = [solved_problem(task, config.seed, -1, row)[1] for row in rows]
        what = "completions that fine-tuning teaches"
    elif texts := _example_completions(task):
        what = "worked examples in the prompt"
    else:
        problems = [task.training_problem(config.seed, -1, row) for row in rows]
        texts = [ideal_completion(problem.answer, task_of(task, problem).style) for problem in problems]
        what = "right answers without any working"
    lengths = [len(lm.completion(text)) for text in texts]
    limit = config.max_new_tokens
    too_long = sum(length > limit for length in lengths)
    if not too_long:
        return None
    longest = max(lengths)
    advice = f"Take --max-new-tokens {longest}"
    if lm.positions is not None and longest >= lm.positions:
        advice = f"The model has only {lm.positions:,} positions, so shorten them"
    return (
        f"{too_long} of {len(texts)} {what} have more tokens than --max-new-tokens {limit}: such completions are cut "
        f"off before they end, so they cannot be right. {advice}: the longest of the {len(texts)} has {longest:,}."
    )


def _example_completions(task: Task) -> list[str]:
    """Return the completions in the worked examples of a task, or of all tasks of a mixture."""
    turns = [turn for part in (task.parts.values() or [task]) for turn in part.examples]
    return [turn["content"] for turn in turns if turn["role"] == "assistant"]


def longest_example(lm: LanguageModel, task: Task) -> int:
    """Return the number of tokens of the longest completion among the worked examples; 0 if there are none."""
    return max((len(lm.completion(text)) for text in _example_completions(task)), default=0)
