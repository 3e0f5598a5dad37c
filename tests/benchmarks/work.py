"""The work that both programs get, and how a worker process takes its turns.

A worker reads one JSON object a line, {"steps": 3, "evaluate": false}, takes that many steps, answers with one line,
and waits for the next line. So two workers alternate and never run at the same time.
"""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from grpo.config import TrainConfig
from grpo.evaluation.evaluator import graded
from grpo.generation.greedy import greedy
from grpo.model.language_model import LanguageModel
from grpo.model.loading import load
from grpo.model_card import PACKAGED, STARTER, resolve
from grpo.runtime.device import TRAITS, choose_device
from tasks.base import Message, Problem, Task, seeded_rng
from tasks.common.qa_task import QATask
from tasks.registry import make_task
from tasks.rewards.scoring import RewardFunction, parse_rewards

NEVER = 10**6  # an end token that no vocabulary here has, so that every completion has full length
FRAME = 8  # tokens of the starter's chat template around a user's message
# Layers, hidden size, query heads, key heads and MLP size of Qwen2.5; all other values are the starter's.
SHAPES = {
    "0.5B": (24, 896, 14, 2, 4864),
    "1.5B": (28, 1536, 12, 2, 8960),
    "3B": (36, 2048, 16, 2, 11008),
}
VOCABULARY = 151936
# The settings, besides sizes, of a step of a real model, with worked examples in its prompt.
REAL = {"shots": 4, "num_inner_updates": 2, "temperature": 1.0, "warmup_steps": 0, "learning_rate_decay": "none"}
REAL |= {"resample_tied": 0}  # TRL draws no group again


@dataclass(frozen=True)
class Size:
    """N prompts of P tokens and G completions of C tokens each.

    With P = 0 the prompts are of the arithmetic task, and completions end by themselves.
    """

    prompts: int
    group: int
    prompt: int
    completion: int

    @property
    def name(self) -> str:
        """Return the name of the size in tables and plot."""
        what = f"P={self.prompt} C={self.completion}" if self.prompt else f"arithmetic, C≤{self.completion}"
        return f"N={self.prompts} G={self.group} {what}"


@dataclass(frozen=True, kw_only=True)
class Digits(QATask):
    """A task with prompts of exactly `length` tokens: the starter's tokenizer has a token for each digit."""

    length: int
    name: str = "digits"

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """Return random digits, as a function of seed, step and row."""
        draw = seeded_rng("digits", seed, step, row)
        return Problem("".join(draw.choices("0123456789", k=self.length - FRAME)), "0")

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """Return `limit` problems of a seed that no run has."""
        return [self.training_problem(-1, 0, row) for row in range(limit)]

    def messages(self, question: str) -> list[Message]:
        """Return a chat of the digits alone."""
        return [{"role": "user", "content": question}]


@dataclass(frozen=True)
class Spec:
    """The work of a pair of workers."""

    size: Size
    model: str = "starter"
    learning_rate: float = 0.0  # 0: the default of the model
    seed: int = 0
    device: str = "cpu"
    precision: str = ""  # "": the precision of the model's settings
    max_steps: int = 200
    rows: int = 0  # completions in a pass of TRL; 0: all

    @classmethod
    def of_arguments(cls) -> "Spec":
        """Return the work in the arguments of this process."""
        given = json.loads(sys.argv[1])
        return cls(**given | {"size": Size(**given["size"])})

    @property
    def config(self) -> TrainConfig:
        """Return the settings of the model, in this size."""
        size, rate = self.size, {"learning_rate": self.learning_rate} if self.learning_rate else {}
        sizes = {"batch_size": size.prompts, "num_generations": size.group, "max_new_tokens": size.completion}
        fixed = REAL if self.model in PACKAGED else {}
        fixed = {**fixed, "precision": self.precision} if self.precision else fixed
        return resolve({"model": self.model, "device": self.device, "seed": self.seed, **fixed, **sizes, **rate})

    @property
    def task(self) -> Task:
        """Return the task of the problems."""
        return Digits(length=self.size.prompt) if self.size.prompt else make_task(self.config)

    @property
    def rewards(self) -> list[RewardFunction]:
        """Return the task's rewards; for digits, a number that differs within a group, so there is a gradient."""
        if self.size.prompt:
            return [
                RewardFunction("any", 1.0, lambda _, columns: [sum(c) % 8 / 8 for c in columns["completion_ids"]])
            ]
        return parse_rewards((), self.task.default_rewards)

    def language_model(self, precision: str = "") -> LanguageModel:
        """Return the policy before training, in float32; passes have this precision, or the one of the settings."""
        lm = load(self.model, choose_device(self.device), precision or self.config.precision)
        return replace(lm, end_ids=(NEVER,)) if self.size.prompt else lm


def random_model(folder: Path, shape: Sequence[int], vocabulary: int = VOCABULARY) -> Path:
    """Write a Llama-shaped model of these dimensions (as in SHAPES) with random weights; return its folder."""
    layers, hidden, heads, keys, inner = shape
    config = transformers.AutoConfig.from_pretrained(
        STARTER,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=hidden // heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(STARTER).save_pretrained(folder)
    return folder


class Channel:
    """The worker's end of the pipes. Output of libraries goes to standard error, which is the worker's log."""

    def __init__(self, spec: Spec, lm: LanguageModel) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._spec, self._lm = spec, lm
        self._held_out = spec.task.held_out("validation", 500)
        self.records: list[dict[str, Any]] = []

    def ready(self, **more: Any) -> None:
        """Tell the parent process that everything is loaded."""
        versions = {
            name: sys.modules[name].__version__ for name in ("torch", "transformers", "trl") if name in sys.modules
        }
        versions |= {"python": platform.python_version()}
        cuda = torch.cuda.get_device_name() if self._lm.model.device.type == "cuda" else ""
        config, dtype = self._lm.model.config, str(self._lm.model.dtype).removeprefix("torch.")
        kind = {"weights": dtype, "attention": config._attn_implementation, "cuda": cuda, **more}
        self._send(versions=versions, threads=torch.get_num_threads(), memory=self._memory(), **kind)

    def receive(self) -> dict[str, Any] | None:
        """Return the next order; None if there are no more."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def answer(self, order: dict[str, Any], **more: Any) -> None:
        """Send the records of a turn, the policy's accuracy if the order asks for it, and the peak memory."""
        accuracy = self.accuracy() if order.get("evaluate") else None
        self._send(steps=self.records, accuracy=accuracy, memory=self._memory(), **more)
        self.records = []

    def accuracy(self) -> float:
        """Return greedy accuracy on 500 validation problems, by the same code for both programs."""
        model, tokens = self._lm.model, self._spec.size.completion
        training = model.training
        lm, task = replace(self._lm, model=model.eval()), self._spec.task
        prompts = lm.prompts([task.messages(problem.question) for problem in self._held_out])
        result = graded(lm, task, self._held_out, greedy(lm, prompts, tokens).rows(with_end=False))
        model.train(training)
        return sum(result.right) / result.n

    def _memory(self) -> int | None:
        return TRAITS[self._lm.model.device.type].peak_memory(self._lm.model.device)

    def _send(self, **message: Any) -> None:
        print(json.dumps(message), file=self._out, flush=True)


def record(
    seconds: float, phases: dict[str, float], prompts: Sequence[int], completions: Sequence[int], **more: Any
) -> dict[str, Any]:
    """Return the record of a step from the lengths, in tokens, of its prompts and completions.

    The phase `update` is all the time that no other phase takes.
    """
    phases = phases | {"update": seconds - sum(phases.values())}
    counts = {"completions": len(completions), "completion_tokens": sum(completions), "prompt_tokens": sum(prompts)}
    return {"seconds": seconds, "phases": phases, **counts, **more}
