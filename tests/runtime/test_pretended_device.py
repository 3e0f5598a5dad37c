"""What runs on a device that is not the CPU: the pretended device refuses what CUDA or MPS would refuse."""

from collections.abc import Iterator

import pytest
import torch

from grpo.algorithm.grpo import GRPO
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.runtime.device import choose_device
from grpo.step_probe import measured_step
from tasks.registry import make_task
from tests.helpers.pretended_device import NAME, PretendedDevice, pretended_device
from tests.helpers.runs import a_tiny_model


@pytest.fixture
def device() -> Iterator[PretendedDevice]:
    with pretended_device() as pretended:
        yield pretended


# --- what the device refuses, and counts ---


def test_it_refuses_operands_on_two_devices_and_float64(device):
    x, index = torch.ones(3, device=NAME), torch.tensor([0, 1])
    assert (2 * x + torch.tensor(1.0)).tolist() == [3.0, 3.0, 3.0]
    assert x[index].device.type == NAME
    for wrong in (
        lambda: x + torch.ones(3),
        lambda: torch.cat([x, torch.ones(1)]),
        lambda: torch.ones(3)[index.to(NAME)],
        lambda: x.gather(0, index),
        lambda: torch.nn.functional.embedding(index, x[:, None]),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    with pytest.raises(TypeError, match="float64"):
        x.double()
    assert choose_device(NAME).type == NAME


def test_it_counts_reads(device):
    x = torch.ones(3, device=NAME)
    x.sum()
    assert not device.reads
    x.sum().item()
    x.cpu()
    x[x > 0]
    assert device.reads.total() == 3


# --- what runs on it ---

SETTINGS = {
    "batch_size": 2,
    "num_generations": 4,
    "num_inner_updates": 2,
    "max_new_tokens": 6,
    "min_operand": -1,
    "max_operand": 1,
    "learning_rate": 2e-3,
    "beta": 0.04,
    "precision": "float32",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Return the folder of a tiny model, whose completions get different rewards."""
    return str(a_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


def a_grpo(model: str, device: str, **settings: object) -> GRPO:
    config = resolve({**SETTINGS, "model": model, "device": device, **settings})
    where = torch.device(device)
    return GRPO(config, make_task(config), load(model, where), device=where)


def test_a_step_has_the_metrics_of_the_cpu(device, model):
    expected = measured_step(a_grpo(model, "cpu"), 1)[1]
    actual = measured_step(a_grpo(model, NAME), 1)[1]
    assert actual.keys() == expected.keys()
    for name in expected:
        if expected[name] is None or isinstance(expected[name], dict):
            assert actual[name] == expected[name], name
        elif not name.startswith("time/"):
            assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    assert expected["reward_std"] > 0, "a step without a gradient would show little"
