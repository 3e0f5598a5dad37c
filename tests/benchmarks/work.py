"""The work that both programs are given, and how a worker process takes its turns.

A worker reads one JSON object a line, {"steps": 3, "evaluate": false}, does that many steps, answers with one line,
and blocks on the next: two workers alternate without being in each other's way.
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
from grpo.runtime.device import choose_device, peak_memory
from tasks.base import Message, Problem, Task, seeded_rng
from tasks.common.qa_task import QATask
from tasks.registry import make_task
from tasks.rewards.scoring import RewardFunction, parse_rewards

NEVER = 10**6  # an end token that no vocabulary here has, so that every completion is of full length
FRAME = 8  # tokens of the starter's chat template around a user's message
SHAPES = {  # layers, hidden, query heads, key heads, MLP, of Qwen2.5; the rest of the starter's configuration
    "0.5B": (24, 896, 14, 2, 4864),
    "1.5B": (28, 1536, 12, 2, 8960),
    "3B": (36, 2048, 16, 2, 11008),
}
VOCABULARY = 151936
# a real model with worked examples in its prompt, and what is fixed about a step of it besides its size
REAL = {"shots": 4, "num_inner_updates": 2, "temperature": 1.0, "warmup_steps": 0, "learning_rate_decay": "none"}
REAL |= {"resample_tied": 0}  # TRL draws no group again


@dataclass(frozen=True)
class Size:
    """N prompts of P tokens, G completions of C each; P = 0: the arithmetic task, completions end by themselves."""

    prompts: int
    group: int
    prompt: int
    completion: int

    @property
    def name(self) -> str:
        """As tables and plot have it."""
        what = f"P={self.prompt} C={self.completion}" if self.prompt else f"arithmetic, C≤{self.completion}"
        return f"N={self.prompts} G={self.group} {what}"


@dataclass(frozen=True)
class Digits(QATask):
    """Prompts of exactly `length` tokens: the starter's tokenizer has one for each digit."""

    length: int
    name: str = "digits"

    def training_problem(self, seed: int, step: int, row: int) -> Problem:
        """Random digits, a function of the place."""
        draw = seeded_rng("digits", seed, step, row)
        return Problem("".join(draw.choices("0123456789", k=self.length - FRAME)), "0")

    def held_out(self, split: str, limit: int) -> list[Problem]:
        """More of them."""
        return [self.training_problem(-1, 0, row) for row in range(limit)]

    def messages(self, question: str) -> list[Message]:
        """The digits alone."""
        return [{"role": "user", "content": question}]


@dataclass(frozen=True)
class Spec:
    """What one pair of workers does."""

    size: Size
    model: str = "starter"
    learning_rate: float = 0.0  # 0: the default of the model
    seed: int = 0
    device: str = "cpu"
    precision: str = ""  # "": that of the model's settings
    max_steps: int = 200
    rows: int = 0  # completions in a pass of TRL; 0: all

    @classmethod
    def of_arguments(cls) -> "Spec":
        """The one that a worker is started with."""
        given = json.loads(sys.argv[1])
        return cls(**given | {"size": Size(**given["size"])})

    @property
    def config(self) -> TrainConfig:
        """The settings: those of the model, in this size."""
        size, rate = self.size, {"learning_rate": self.learning_rate} if self.learning_rate else {}
        sizes = {"batch_size": size.prompts, "num_generations": size.group, "max_new_tokens": size.completion}
        fixed = REAL if self.model in PACKAGED else {}
        fixed = {**fixed, "precision": self.precision} if self.precision else fixed
        return resolve({"model": self.model, "device": self.device, "seed": self.seed, **fixed, **sizes, **rate})

    @property
    def task(self) -> Task:
        """Where the problems come from."""
        return Digits(length=self.size.prompt) if self.size.prompt else make_task(self.config)

    @property
    def rewards(self) -> list[RewardFunction]:
        """Those of the task; for digits, a number that differs within a group, so that there is a gradient."""
        if self.size.prompt:
            return [
                RewardFunction("any", 1.0, lambda _, columns: [sum(c) % 8 / 8 for c in columns["completion_ids"]])
            ]
        return parse_rewards((), self.task.default_rewards)

    def language_model(self, precision: str = "") -> LanguageModel:
        """The policy before training, in float32; `precision` of passes, or that of the settings."""
        lm = load(self.model, choose_device(self.device), precision or self.config.precision)
        return replace(lm, end_ids=(NEVER,)) if self.size.prompt else lm


def random_model(folder: Path, shape: Sequence[int], vocabulary: int = VOCABULARY) -> Path:
    """A Llama-shaped model of these dimensions (as in SHAPES) with random weights, and the starter's tokenizer."""
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
    """A worker's end of the pipes. What libraries print goes to stderr, which is the worker's log."""

    def __init__(self, spec: Spec, lm: LanguageModel) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._spec, self._lm = spec, lm
        self._held_out = spec.task.held_out("validation", 500)
        self.records: list[dict[str, Any]] = []

    def ready(self, **more: Any) -> None:
        """Say that everything is loaded."""
        versions = {
            name: sys.modules[name].__version__ for name in ("torch", "transformers", "trl") if name in sys.modules
        }
        versions |= {"python": platform.python_version()}
        cuda = torch.cuda.get_device_name() if self._lm.device.type == "cuda" else ""
        config, dtype = self._lm.model.config, str(self._lm.model.dtype).removeprefix("torch.")
        kind = {"weights": dtype, "attention": config._attn_implementation, "cuda": cuda, **more}
        self._send(versions=versions, threads=torch.get_num_threads(), memory=self._memory(), **kind)

    def receive(self) -> dict[str, Any] | None:
        """The next order; None when there are no more."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def answer(self, order: dict[str, Any], **more: Any) -> None:
        """The records of a turn, what the policy now scores if that was asked, and the memory held at most."""
        accuracy = self.accuracy() if order.get("evaluate") else None
        self._send(steps=self.records, accuracy=accuracy, memory=self._memory(), **more)
        self.records = []

    def accuracy(self) -> float:
        """Greedy, on 500 validation problems: the same code for both programs."""
        model, tokens = self._lm.model, self._spec.size.completion
        training = model.training
        lm, task = replace(self._lm, model=model.eval()), self._spec.task
        prompts = lm.prompts([task.messages(problem.question) for problem in self._held_out])
        result = graded(lm, task, self._held_out, greedy(lm, prompts, tokens).rows(with_end=False))
        model.train(training)
        return sum(result.right) / result.n

    def _memory(self) -> int | None:
        return peak_memory(self._lm.device)

    def _send(self, **message: Any) -> None:
        print(json.dumps(message), file=self._out, flush=True)


def record(
    seconds: float, phases: dict[str, float], prompts: Sequence[int], completions: Sequence[int], **more: Any
) -> dict[str, Any]:
    """One step: `prompts` are the lengths of the N prompts, `completions` those of the completions.

    What no other phase takes is the update, with all that a program does besides.
    """
    phases = phases | {"update": seconds - sum(phases.values())}
    counts = {"completions": len(completions), "completion_tokens": sum(completions), "prompt_tokens": sum(prompts)}
    return {"seconds": seconds, "phases": phases, **counts, **more}
