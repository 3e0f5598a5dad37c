"""What runs on a device that is not the CPU: the pretended device refuses what CUDA or MPS would refuse."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import inference
import train_grpo
from grpo import trainer
from grpo.algorithm.grpo import GRPO
from grpo.generation import sampling
from grpo.generation.decoding import Decoder
from grpo.generation.sampling import Generator, SamplingParams, sampling_uniforms
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.runtime.device import choose_device
from grpo.scoring import output_layer
from grpo.scoring.attention.layout import Layout
from grpo.scoring.tokens import left_pad
from grpo.step_probe import measured_step
from tasks.registry import make_task
from tests.helpers.pretended_device import NAME, PretendedDevice, pretended_device
from tests.helpers.runs import a_tiny_model, trained


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
        lambda: torch.tensor(1.0).add_(x.sum()),
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


# --- how much memory the logits take ---


class Largest(TorchDispatchMode):
    """Note the most elements of any tensor that an operation makes."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.most = max([self.most, *(x.numel() for x in tree_leaves(results) if isinstance(x, torch.Tensor))])
        return results


def test_tokens_are_drawn_a_few_rows_at_a_time(device, monkeypatch):
    monkeypatch.setattr(sampling, "DEVICE_PROBABILITIES", 3 * 50)
    logits, uniforms = torch.randn(8, 50), sampling_uniforms(0, 1, 8, 1)[:, 0].float()
    expected = sampling.draw(logits, uniforms, 0.7)
    logits, uniforms = logits.to(NAME), uniforms.to(NAME)
    with Largest() as seen:
        actual = sampling.draw(logits, uniforms, 0.7)
    assert [x.tolist() for x in actual] == [x.tolist() for x in expected]
    assert seen.most == 3 * 50


def test_the_output_layer_computes_a_block_of_logits_at_a_time(device, monkeypatch):
    monkeypatch.setattr(output_layer, "DEVICE_MAX_PRODUCT", 16 * 50)
    layer = torch.nn.Linear(4, 50).to(NAME)
    hidden, ids = torch.randn(64, 4, device=NAME, requires_grad=True), torch.zeros(64, dtype=torch.long, device=NAME)
    with Largest() as seen:
        output_layer.linear_logprobs(layer, hidden, ids, 1.0)[0].sum().backward()
    assert seen.most == 16 * 50


# --- how often the host waits for the device ---

FOUR_BY_FOUR = {"batch_size": 4, "num_generations": 4, "num_inner_updates": 5, "max_new_tokens": 16}


@pytest.mark.parametrize("prompts_per_pass", [4, 2])
def test_a_step_of_4_by_4_with_5_updates_reads_at_most_30_times(device, model, prompts_per_pass):
    # At most 8 outside of sampling: loss and gradient norm of each update, and 3 metrics that the device computes.
    # Reference and updates read nothing else, even if a micro-batch is cut out of the step.
    grpo = a_grpo(model, NAME, **FOUR_BY_FOUR, micro_batch_size=prompts_per_pass)
    device.reads.clear()
    measured_step(grpo, 1)
    assert device.reads.total() <= 30, device.reads
    reads_of_sampling = sum(count for place, count in device.reads.items() if place.startswith("grpo/generation/"))
    assert device.reads.total() - reads_of_sampling <= 9, device.reads


def test_the_decode_loop_reads_at_most_3_times_in_10_tokens(device, model):
    lm = load(model, torch.device(NAME))
    ids, mask = left_pad([[1, 2, 3], [4, 5]], lm.pad_id, torch.device("cpu"))

    def reads(tokens: int) -> int:
        device.reads.clear()
        params = SamplingParams(tokens, stop_ids=[-1], n=4)  # no row ends, so every one has `tokens` tokens
        completions = Generator(lm.model, Decoder(expands_cache=True))(
            ids, mask, params, sampling_uniforms(0, 1, 8, tokens)
        )
        assert completions.lengths.tolist() == 8 * [tokens]
        return device.reads.total()

    assert 0 < reads(44) - reads(4) <= 0.3 * 40


def test_reference_and_updates_make_the_layout_of_a_step_once(model, monkeypatch):
    made = []
    of = Layout.of
    grpo = a_grpo(model, "cpu", **FOUR_BY_FOUR)
    monkeypatch.setattr(Layout, "of", lambda *arguments: made.append(of(*arguments)) or made[-1])
    grpo.step(1)
    assert len(made) == 1


# --- whole runs ---

# The most reads of a run, by file. A file that is not named reads nothing. Files that save read each tensor once.
# Counts of generation depend on how many tokens the completions have, and so have some slack.
READS_WITH_EVERY_PHASE = {
    "grpo/algorithm/update.py": 49,
    "grpo/evaluation/drift.py": 8,
    "grpo/generation/decoding.py": 50,
    "grpo/generation/sampling.py": 60,
    "grpo/model/saving.py": 11,
    "grpo/record/checkpoint.py": 187,
    "grpo/runtime/shortcuts.py": 20,
    "grpo/scoring/scorer.py": 20,
    "grpo/scoring/tokens.py": 8,
    "grpo/sft.py": 1,
    "grpo/step_probe.py": 8,
}
READS_WITH_AN_ADAPTER = {
    "grpo/algorithm/update.py": 30,
    "grpo/evaluation/drift.py": 5,
    "grpo/generation/decoding.py": 28,
    "grpo/generation/sampling.py": 38,
    "grpo/model/lora.py": 20,
    "grpo/model/saving.py": 14,
    "grpo/record/checkpoint.py": 70,
    "grpo/runtime/shortcuts.py": 10,
    "grpo/scoring/scorer.py": 12,
    "grpo/scoring/tokens.py": 4,
    "grpo/step_probe.py": 4,
}


@pytest.fixture
def scripts(device, monkeypatch) -> None:
    """Let --device of the scripts name the pretended device. Draw no plots, which take a second."""
    for script in (train_grpo.main, inference.main):
        option = next(option for option in script.params if option.name == "device")
        monkeypatch.setattr(option, "type", click.Choice([*option.type.choices, NAME]))
    monkeypatch.setattr(trainer, "draw_all", lambda *_: None)


def assert_reads(device: PretendedDevice, most: dict[str, int]) -> None:
    """Fail if a file has read more often than `most` allows."""
    files: Counter[str] = Counter()
    for place, count in device.reads.items():
        files[place.split(":")[0]] += count
    assert not files - Counter(most), device.reads


def assert_same_run(actual: Path, expected: Path, records: list[dict[str, Any]]) -> None:
    """Compare metrics, samples and saved tensors of two runs."""
    for part in ("sft", "steps", "evals"):
        assert len(records[0][part]) == len(records[1][part]), part
        for row, expected_row in zip(records[0][part], records[1][part], strict=True):
            assert_close(row, expected_row, part)
    assert (actual / "grpo_samples.jsonl").read_bytes() == (expected / "grpo_samples.jsonl").read_bytes()
    paths = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    assert paths == sorted(path.relative_to(actual) for path in actual.rglob("*.safetensors"))
    for path in paths:
        tensors, expected_tensors = load_file(actual / path), load_file(expected / path)
        assert tensors.keys() == expected_tensors.keys(), path
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected_tensors[name], rtol=1e-3, atol=1e-4, msg=f"{path} {name}")


def assert_close(actual: Any, expected: Any, place: str) -> None:
    """Compare two values of a record: numbers to 3 digits, everything else but seconds exactly."""
    if isinstance(expected, dict):
        names = {name for name in expected if not name.startswith("time/")}
        assert names == {name for name in actual if not name.startswith("time/")}, place
        for name in names:
            assert_close(actual[name], expected[name], f"{place}.{name}")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-4), place
    else:
        assert actual == expected, place


def test_a_run_with_every_phase_is_the_run_of_the_cpu(scripts, device, model, tmp_path):
    settings = {"sft_steps": 1, "shots": 1, "micro_batch_size": 1, "save_every": 1, "eval_every": 1}
    mine, theirs = tmp_path / NAME, tmp_path / "cpu"
    trained(model, mine, device=NAME, num_iterations=1, **settings)
    record, _ = trained(model, mine, device=NAME, num_iterations=2, **settings)  # goes on from the checkpoint
    assert_reads(device, READS_WITH_EVERY_PHASE)
    assert_same_run(mine, theirs, [record, trained(model, theirs, num_iterations=2, **settings)[0]])
    question = ["--model", str(mine / "saved_model"), "What is (1 + 0) - 1?"]
    device.reads.clear()
    answers = [CliRunner().invoke(inference.main, ["--device", where, *question]).stdout for where in (NAME, "cpu")]
    assert device.reads, "the question was answered on the device"
    assert answers[0] == answers[1]
    assert "<answer>" in answers[0]


def test_a_run_with_an_adapter_is_the_run_of_the_cpu(scripts, device, model, tmp_path):
    settings = {"num_iterations": 1, "lora_rank": 4, "eval_every": 1}
    records = [trained(model, tmp_path / where, device=where, **settings)[0] for where in (NAME, "cpu")]
    assert_reads(device, READS_WITH_AN_ADAPTER)
    assert_same_run(tmp_path / NAME, tmp_path / "cpu", records)
