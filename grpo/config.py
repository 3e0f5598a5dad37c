"""Every setting of a run: once, with its default, its unit and its meaning.

A field of `TrainConfig` is the option of the same name (`learning_rate` is `--learning-rate`) and an entry
of `config` in the metrics file. The defaults are the published settings of the arithmetic experiment that
this project rebuilds. A model's folder may carry better ones for that model in `grpo.json` (the starter's
does, and so does every `saved_model/`), and what is given on the command line comes before both.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from grpo.schedule import group_size_at, learning_rate_at, parse_group_schedule
from tasks.base import KINDS, TASKS
from tasks.prompts import STYLE_TOKENS, STYLES

STARTER = Path(__file__).parent / "starter" / "model"
CARD = "grpo.json"
# a run's own; the rest is passed on with its model. A model's folder may come from anywhere: it can name no data file
OWN = (
    "model",
    "device",
    "deterministic",
    "cuda_graphs",
    "shard",
    "seed",
    "data",
    "output_dir",
    "time_limit",
    "track",
)
# what a run may go on with another value of: it decides nothing about what is learned from a step
MAY_CHANGE = (
    *("device", "deterministic", "cuda_graphs", "gradient_checkpointing", "micro_batch_size", "num_iterations"),
    *("output_dir", "save_every", "shard", "show_every", "track", "time_limit", "patience", "target_accuracy"),
)
LARGEST_FLOAT32 = 3.4e38
MOST_TOKENS = 10**6  # of a completion: no model has so many, and memory for all of them is taken at once
_DURATION = re.compile(r"(?:([0-9]{1,4})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,8})s)?")
DEVICES = ("auto", "cuda", "mps", "cpu")
VARIANTS = "Variants and schedules"
AVERAGES, RATIOS, SCALES = ("completion", "token", "constant"), ("token", "sequence"), ("group", "batch", "none")
TRACKERS = ("none", "trackio", "wandb")
DECAYS = ("none", "linear", "cosine")


def setting(default: Any, group: str, meaning: str, least: float | None = None, choices: tuple = ()) -> Any:
    """A field with its group in --help, its meaning, and the least value or the values that it may have."""
    return field(default=default, metadata={"group": group, "meaning": meaning, "least": least, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run; raises ValueError for a value that cannot be."""

    model: str = setting("starter", "Model", "starter (bundled), a Hub id, or a folder")
    device: str = setting("auto", "Model", "where to compute; auto takes cuda, then mps, then cpu", None, DEVICES)
    deterministic: bool = setting(False, "Model", "the same bits each time on CUDA too, where it is slower")
    cuda_graphs: bool = setting(False, "Model", "sample with CUDA graphs: faster, not yet run on a GPU")
    lora_rank: int = setting(0, "Model", "train an adapter of this rank instead of all weights (peft); 0: all", 0)
    lora_alpha: float = setting(32.0, "Model", "the adapter counts this divided by its rank", 1e-9)
    lora_targets: str = setting("all-linear", "Model", "layers with an adapter, as q_proj,v_proj")
    load_in_4bit: bool = setting(False, "Model", "hold the frozen weights in 4 bits, with LoRA (bitsandbytes)")
    gradient_checkpointing: bool = setting(False, "Model", "less memory: compute activations again when needed")
    shard: bool = setting(False, "Model", "spread weights, gradients and optimizer over the processes of torchrun")

    task: str = setting("arithmetic", "Task", "what the problems are", None, TASKS)
    data: str = setting("", "Task", "JSON Lines file with the problems of jsonl, or of gsm8k instead of the Hub's")
    min_operand: int = setting(0, "Task", "of arithmetic: operands are integers from this ...")
    max_operand: int = setting(10, "Task", "... to this", 1)
    prompt_style: str = setting("answer", "Task", "form of the answer the prompt asks for", None, STYLES)
    system_prompt: str = setting("", "Task", "instead of the style's own")
    reward: tuple[str, ...] = setting((), "Task", "NAME=WEIGHT or FILE.py:FUNCTION=WEIGHT, instead of the task's own")

    num_iterations: int = setting(2000, "Algorithm", "steps: one rollout and its updates each", 1)
    batch_size: int = setting(4, "Algorithm", "prompts a step", 1)
    num_generations: int = setting(8, "Algorithm", "completions a prompt (G, the group)", 2)
    max_new_tokens: int = setting(16, "Algorithm", "longest completion, tokens; think: 128, reasoning: 256", 1)
    temperature: float = setting(1.0, "Algorithm", "of sampling; log-probabilities are taken at it too", 1e-3)
    learning_rate: float = setting(1e-7, "Algorithm", "of AdamW", 0.0)
    beta: float = setting(0.04, "Algorithm", "weight of the KL to the reference; 0 loads no reference", 0.0)
    epsilon: float = setting(0.2, "Algorithm", "the ratio is clipped to 1 ± this", 0.0)
    num_inner_updates: int = setting(5, "Algorithm", "updates on one rollout", 1)
    clip_grad_norm: float = setting(0.5, "Algorithm", "largest norm of the gradient", 1e-9)
    micro_batch_size: int = setting(0, "Algorithm", "prompts a pass, for less memory; 0 takes all at once", 0)
    seed: int = setting(0, "Algorithm", "decides problems and sampling", 0)

    loss_average: str = setting(
        "completion", VARIANTS, "of the loss; token: DAPO, constant: Dr. GRPO", None, AVERAGES
    )
    ratio: str = setting("token", VARIANTS, "what a ratio and its clipping are of; sequence: GSPO", None, RATIOS)
    epsilon_high: float = setting(0.0, VARIANTS, "clip the ratio to 1 + this above (DAPO: 0.28); 0: as epsilon", 0.0)
    scale_rewards: str = setting("group", VARIANTS, "advantages over the std of; none: Dr. GRPO", None, SCALES)
    mask_truncated: bool = setting(False, VARIANTS, "learn nothing from completions that the token limit cut off")
    resample_tied: int = setting(0, VARIANTS, "other problems for groups all right or all wrong, at most so often", 0)
    target_kl: float = setting(0.0, VARIANTS, "adapt beta towards this KL, nats a token; 0: beta stays", 0.0)
    warmup_steps: int = setting(0, VARIANTS, "steps in which the learning rate rises to its value", 0)
    learning_rate_decay: str = setting("none", VARIANTS, "of the learning rate, to the last step", None, DECAYS)
    group_schedule: str = setting("", VARIANTS, "completions a prompt, first step to last, as 8:4")
    refresh_reference_every: int = setting(0, VARIANTS, "steps until the policy becomes the reference; 0: never", 0)

    eval_every: int = setting(50, "Evaluation and output", "steps between evaluations on validation", 1)
    eval_problems: int = setting(500, "Evaluation and output", "validation problems each time", 1)
    pass_at_k: int = setting(0, "Evaluation and output", "also pass@k by sampling on the test problems; 0: not", 0)
    save_every: int = setting(25, "Evaluation and output", "steps between checkpoints", 1)
    patience: int = setting(0, "Evaluation and output", "stop after so many evaluations without a better one", 0)
    target_accuracy: float = setting(0.0, "Evaluation and output", "stop at this validation accuracy, up to 1", 0.0)
    time_limit: str = setting("", "Evaluation and output", "end this launch in time: 3h, 90m, 1h30m")
    show_every: int = setting(50, "Evaluation and output", "steps between printed completions; 0: never", 0)
    track: str = setting("none", "Evaluation and output", "send metrics to a tracker as well", None, TRACKERS)
    output_dir: str = setting(".", "Evaluation and output", "folder for everything that is written")

    def __post_init__(self) -> None:
        if isinstance(self.reward, list):  # as JSON has it
            object.__setattr__(self, "reward", tuple(self.reward))
        for f in fields(self):
            _check(f.name, getattr(self, f.name), f.type, f.metadata)
        if self.time_limit:
            parse_duration(self.time_limit)
        if self.group_schedule:
            parse_group_schedule(self.group_schedule)
        for name in ("target_kl", "refresh_reference_every"):
            if getattr(self, name) and not self.beta:
                raise ValueError(f"{name} is about the KL to the reference, which beta 0 leaves out; give a beta")
        if self.refresh_reference_every and self.lora_rank:
            raise ValueError("refresh_reference_every cannot be with lora_rank: the reference is the frozen base")
        if self.load_in_4bit and not self.lora_rank:
            raise ValueError(
                "load_in_4bit needs lora_rank: weights in 4 bits cannot be trained, an adapter over them can"
            )
        if self.shard and self.load_in_4bit:
            raise ValueError("shard cannot be with load_in_4bit: weights in 4 bits cannot be spread")
        if self.max_new_tokens > MOST_TOKENS:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at most {MOST_TOKENS}")
        if self.warmup_steps >= self.num_iterations:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be below num_iterations")

    @property
    def depends_on_length(self) -> bool:
        """Whether what is done in a step depends on how many there are."""
        return bool(self.group_schedule) or self.learning_rate_decay != "none"

    def at(self, step: int, beta: float) -> "TrainConfig":
        """The settings of one step (from 1), as schedules and the adapted `beta` have them."""
        rate = learning_rate_at(
            step, self.num_iterations, self.learning_rate, self.warmup_steps, self.learning_rate_decay
        )
        group = self.num_generations
        if self.group_schedule:
            group = group_size_at(step, self.num_iterations, *parse_group_schedule(self.group_schedule))
        return replace(self, learning_rate=rate, num_generations=group, beta=beta)

    def differences(self, earlier: Mapping[str, Any]) -> list[str]:
        """The settings in which this launch departs from an earlier one of the run, and may not."""
        earlier = {**TrainConfig().to_dict(), **earlier}  # a setting that the run's version did not have
        may_change = set(MAY_CHANGE) - ({"num_iterations"} if self.depends_on_length else set())
        return [
            f"{name} {_shown(earlier[name])} (now {_shown(value)})"
            for name, value in self.to_dict().items()
            if name not in may_change and earlier[name] != value
        ]

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return {**asdict(self), "reward": list(self.reward)}

    def passed_on(self) -> dict[str, Any]:
        """What a saved model hands to a run that starts from it: all but place, model, seed, and files to be run."""
        passed = {name: value for name, value in self.to_dict().items() if name not in OWN}
        return passed | {"reward": []} if any(map(_names_a_file, self.reward)) else passed


def model_folder(name: str) -> Path | None:
    """The folder of a model on this machine, `starter` included; None for the name of a Hub model."""
    folder = STARTER if name == "starter" else Path(name)
    return folder if os.path.isdir(folder) else None  # unlike Path.is_dir, never raises: any text may be asked for


def read_card(name: str) -> dict[str, Any]:
    """What `grpo.json` in a model's folder says (task, settings, skills, …); empty where there is none."""
    folder = model_folder(name)
    if folder is None or not (folder / CARD).is_file():
        return {}
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{folder / CARD} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CARD} is not JSON ({error}); restore or delete it") from None
    if not isinstance(card, dict):
        raise ValueError(f"{folder / CARD} is not a JSON object; restore or delete it")
    for name, value in card.items():
        if name in CARD_ENTRIES and not CARD_ENTRIES[name](value):
            raise ValueError(f"{folder / CARD} cannot have {value!r} as {name!r}; restore or delete it")
    return card


CARD_ENTRIES = {
    "settings": lambda value: isinstance(value, dict),
    "step": lambda value: isinstance(value, int) and value >= 0,
    "max_new_tokens": lambda value: (
        isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_TOKENS
    ),
    "system_prompt": lambda value: isinstance(value, str),
    "prompt_style": lambda value: value in STYLES,
    "kind": lambda value: value in KINDS,
    "base_model": lambda value: isinstance(value, str),
    "skills": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
}


def resolve(given: Mapping[str, Any]) -> TrainConfig:
    """The settings of a run: those given, then those that the model's folder carries, then the defaults."""
    card = read_card(given.get("model", "starter")).get("settings", {})
    if unknown := sorted(set(card) - {f.name for f in fields(TrainConfig) if f.name not in OWN}):
        raise ValueError(f"the model's {CARD} has settings that it cannot have: {', '.join(unknown)}")
    if any(isinstance(spec, str) and _names_a_file(spec) for spec in _list(card.get("reward"))):
        raise ValueError(f"the model's {CARD} names a reward in a file, which a model cannot; remove it there")
    carried = {"task": "arithmetic", "prompt_style": "answer", **card}
    style = given.get("prompt_style", carried["prompt_style"])
    of_another = set()  # what the model carries for another style or task is nothing for this one
    if style != carried["prompt_style"]:
        of_another = {"max_new_tokens", "system_prompt", "reward"}
    elif given.get("task", carried["task"]) != carried["task"]:
        of_another = {"system_prompt", "reward"}
    card = {name: value for name, value in card.items() if name not in of_another}
    limit = {"max_new_tokens": STYLE_TOKENS[style]} if style in STYLES else {}
    given_alone = TrainConfig(**{**limit, **given})  # its mistakes are the call's, those that come now the card's
    try:
        return replace(given_alone, **{name: value for name, value in card.items() if name not in given})
    except ValueError as error:
        raise ValueError(f"{model_folder(given_alone.model) / CARD}: {error}; restore or delete it") from None


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text or "none"


def _names_a_file(reward: str) -> bool:
    return ":" in reward


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _check(name: str, value: Any, kind: type, metadata: Any) -> None:
    if kind == tuple[str, ...]:
        if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{name} is {value!r}; it must be a list of texts")
        return
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{name} is {value!r}; it must be {kind.__name__}")
    if kind is float and not abs(value) <= LARGEST_FLOAT32:  # nor NaN
        raise ValueError(f"{name} is {value}; it must be a finite number")
    least, choices = metadata["least"], metadata["choices"]
    if least is not None and value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least:g}")
    if choices and value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def parse_duration(text: str) -> int:
    """Seconds in 3h, 90m, 1h30m or 45s; raises ValueError for anything else, and for none at all."""
    match = _DURATION.fullmatch(text.strip().lower())
    parts = [int(part or 0) for part in match.groups()] if match else [0]
    if not any(parts):
        raise ValueError(f"time_limit is {text!r}; write it as 3h, 90m, 1h30m or 45s")
    hours, minutes, seconds = parts
    return 3600 * hours + 60 * minutes + seconds
