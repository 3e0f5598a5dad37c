"""Memory that runs out at any operation of a pass with a gradient: the pass is repeated, with the same result."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.algorithm.grpo import GRPO
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.runtime.microbatch import AdaptiveMicrobatch
from grpo.sft import SupervisedTrainer
from tasks.registry import make_task
from tests.helpers.runs import a_tiny_model

SETTINGS = {"batch_size": 1, "num_generations": 2, "num_inner_updates": 1, "max_new_tokens": 4, "sft_batch_size": 2}
SETTINGS |= {"min_operand": -1, "max_operand": 1, "learning_rate": 2e-3, "beta": 0.04, "device": "cpu"}


class Shortage(TorchDispatchMode):
    """Raise OutOfMemoryError at operation number `fails_at`, counted from 1, and append its name to `failed`.

    Views need no memory, and are not counted.
    """

    def __init__(self, fails_at: int, failed: list[str]) -> None:
        super().__init__()
        self.operations, self.fails_at, self.failed = 0, fails_at, failed

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "aten" and not function.is_view:  # not the marks of torch's profiler
            self.operations += 1
            if self.operations == self.fails_at:
                self.failed.append(function.name())
                raise torch.OutOfMemoryError(f"out of memory in {function.name()}")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def run_out_of_memory(monkeypatch) -> Callable[[], list[str]]:
    """Return a function after which memory runs out once at each operation of every pass, one after the other.

    A pass that is repeated has as many rows as before, so it must compute the same numbers to the bit. The function
    returns a list that gets the name of each operation in which memory ran out.
    """
    true_run = AdaptiveMicrobatch.run
    failed: list[str] = []

    def run(self: AdaptiveMicrobatch, work: Callable[[int], Any]) -> Any:
        numbers = itertools.count(1)

        def attempt(rows: int) -> Any:
            with Shortage(next(numbers), failed):
                return work(rows)

        return true_run(self, attempt)

    def begin() -> list[str]:
        monkeypatch.setattr(AdaptiveMicrobatch, "run", run)
        monkeypatch.setattr(AdaptiveMicrobatch, "_halve", lambda self: None)
        return failed

    return begin


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Return the folder of a tiny model."""
    return str(a_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


def a_grpo(model: str) -> GRPO:
    config = resolve({**SETTINGS, "model": model})
    return GRPO(config, make_task(config), load(model, torch.device("cpu")))


def assert_same_state(actual: GRPO, expected: GRPO) -> None:
    """Compare weights, moments, and the optimizer's counts of its steps, to the bit."""
    states = actual.update.state_dict(), expected.update.state_dict()
    for part in ("policy", "optimizer"):
        assert states[0][part].keys() == states[1][part].keys()
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), (part, name)


def test_a_step_is_the_same_if_memory_runs_out_at_any_operation_of_reference_and_updates(model, run_out_of_memory):
    expected, short = a_grpo(model), a_grpo(model)
    rollout = expected.sampler.sample(1, 2)
    expected.sampler = short.sampler = SimpleNamespace(sample=lambda *_: rollout)
    loss = expected.step(1).updates[0].loss
    failed = run_out_of_memory()
    assert short.step(1).updates[0].loss == loss
    assert failed[-1] == "aten::_fused_adamw_"
    assert_same_state(short, expected)


def test_a_supervised_step_is_the_same_if_memory_runs_out_at_any_operation(model, run_out_of_memory):
    expected, short = a_grpo(model), a_grpo(model)
    for grpo in (expected, short):
        supervised(grpo).step(1)  # so that the moments are not 0
    loss = supervised(expected).step(2)["loss"]
    failed = run_out_of_memory()
    assert supervised(short).step(2)["loss"] == loss
    assert failed[-1] == "aten::_fused_adamw_"
    assert_same_state(short, expected)


def supervised(grpo: GRPO) -> SupervisedTrainer:
    """Return the object that takes supervised steps with the policy and the optimizer of GRPO."""
    return SupervisedTrainer(grpo.config, grpo.sampler.lm, grpo.sampler.task, grpo.update)
