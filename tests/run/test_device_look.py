"""The look at a device before a run: it passes on a right device, and names what a faulty one computes wrongly."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import train_grpo
from grpo.generation.decoding import Decoder
from grpo.generation.sampling import sampling_uniforms
from grpo.launch import device_look
from grpo.launch.device_look import FAST, check_device, device_differences
from grpo.runtime import device as devices
from grpo.scoring import scorer
from grpo.scoring.scorer import DENSE
from tests.helpers import pretended_device as pretended
from tests.helpers.pretended_device import NAME, PretendedDevice, pretended_device
from tests.helpers.runs import options

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.mm.out, aten.addmm.default, aten.bmm.default}
LARGE = 8192  # Sums of at least this number of products are wrong; M1 and M2 begin at 32,767.
DECODER = Decoder(expands_cache=True, shares_prefix=True, holds_prefix=True)


@pytest.fixture
def small(monkeypatch):
    """Make the batch of the look small. The vocabulary stays large, and the fused output layer is still used."""
    for name, value in {"PROMPTS": 2, "GROUP": 4, "COLUMNS": 4, "LAYERS": 1}.items():
        monkeypatch.setattr(device_look, name, value)
    monkeypatch.setattr(scorer, "CHUNK", 2**20)


def add(amount):
    return lambda result, args: result.held.add_(amount)


def spoil_large_sums(result, args):
    """Change a product by 1% if it sums over a large dimension."""
    if args[0].shape[-1] >= LARGE:
        result.held.mul_(1.01)


@contextmanager
def faulty_device(operations, spoil):
    """Make a pretended device that computes these operations wrongly: `spoil(result, args)` changes the result."""

    class Faulty(PretendedDevice):
        def run(self, function, args, kwargs):
            result = super().run(function, args, kwargs)
            if function in operations and isinstance(result, pretended.OnDevice):
                spoil(result, args)
            return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretended, "PretendedDevice", Faulty)
        with pretended_device(is_reference=False):
            yield


def test_a_right_device_has_no_difference(small, capsys):
    with pretended_device():
        check_device(torch.device(NAME), "float32", FAST, DECODER)
    assert capsys.readouterr().out.startswith(f"{NAME} samples, scores and updates a made-up model as the CPU does")


@pytest.mark.parametrize(("precision", "how"), [("bfloat16", (FAST, DECODER)), ("float32", (DENSE, Decoder()))])
def test_rounding_is_no_difference_and_neither_are_shortcuts(small, precision, how):
    assert device_differences(torch.device("cpu"), precision, *how) == []


def test_the_batch_of_the_look_is_large_enough_for_the_fused_output_layer():
    model = device_look.made_up_model()
    rows, columns = device_look.PROMPTS * device_look.GROUP, device_look.COLUMNS
    tokens, _ = device_look._sample(model, DECODER, sampling_uniforms(0, 0, rows, columns))
    logits = int(tokens.completion_mask.sum()) * device_look.VOCABULARY
    assert logits > scorer.CHUNK
    assert tokens.completion_mask.sum(-1).unique().numel() > 1, "rows of different lengths"


@pytest.mark.parametrize(
    ("operations", "spoil", "expected"),
    [
        ({aten.searchsorted.Tensor}, add(1), ["sampled tokens are not the tokens that the same random numbers give"]),
        ({aten.log.default}, add(-0.01), ["log-probabilities of sampling differ by up to 0.01 nats"]),
        (PRODUCTS, spoil_large_sums, ["the gradient of", "in an update differs by 0.0", "in small passes"]),
    ],
    ids=["wrong token", "wrong log-probability", "wrong gradient over a large vocabulary"],
)
def test_a_faulty_device_is_named_with_what_differs(small, operations, spoil, expected):
    refused = pytest.raises(ValueError, match="--trust-device trains nevertheless")
    with faulty_device(operations, spoil), refused as caught:
        check_device(torch.device(NAME), "float32", FAST, DECODER)
    said = str(caught.value)
    assert said.isprintable()
    assert said.startswith(f"{NAME} does not compute what the CPU computes, in float32: ")
    for text in expected:
        assert text in said


def test_a_run_on_a_faulty_device_ends_in_one_line_unless_it_is_told_to_trust_the_device(
    model, tmp_path, monkeypatch
):
    monkeypatch.setitem(devices.TRAITS, "cpu", replace(devices.TRAITS["cpu"], is_reference=False))
    monkeypatch.setattr(device_look, "device_differences", lambda *_: ["tokens differ"])
    arguments = options(model=model, output_dir=tmp_path, num_iterations=1, eval_every=1)
    stopped = CliRunner().invoke(train_grpo.main, arguments)
    assert stopped.exit_code == 1
    assert "tokens differ" in stopped.stderr.splitlines()[-1]
    assert not (tmp_path / "grpo_metrics.json").exists()
    trusted = CliRunner().invoke(train_grpo.main, [*arguments, "--trust-device"])
    assert trusted.exit_code == 0, trusted.output
    assert "tokens differ. The run goes on, because of --trust-device." in " ".join(trusted.stdout.split())
