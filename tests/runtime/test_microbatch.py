"""Out of memory: fewer rows in a pass, the same completions, the same gradient, and the run continues.

The tests simulate a device that is short of memory: the model raises for more rows than "fit", in its forward pass
or, through a hook, in the backward pass.
"""

import json

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import train_grpo
from grpo.algorithm import grpo as grpo_module
from grpo.algorithm.grpo import GRPO
from grpo.generation.probe import probe_scorer, supports_common_prefix
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.record.checkpoint import newest_checkpoint
from grpo.runtime.device import is_out_of_memory
from grpo.runtime.microbatch import AdaptiveMicrobatch, split_microbatches
from grpo.scoring.tokens import left_pad
from grpo.step_probe import measured_step
from grpo.trainer import Trainer
from tasks.arithmetic import Arithmetic
from tasks.registry import make_task
from tests.helpers.runs import kept_gradients

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
MPS = RuntimeError(
    "MPS backend out of memory (MPS allocated: 5.00 GB, other allocations: 1.00 GB, max allowed: 6 GB)"
)
SETTINGS = {
    "batch_size": 4,
    "num_generations": 6,
    "num_inner_updates": 1,
    "learning_rate": 0.0,
    "clip_grad_norm": 1e9,
    "max_new_tokens": 6,
    "min_operand": -1,
    "max_operand": 1,
}


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 60))
def test_microbatches_cover_every_row_once_and_keep_groups_whole_where_one_fits(prompts, group, rows_per_pass):
    cut = split_microbatches(prompts * group, group, rows_per_pass)
    assert [row for rows in cut for row in range(rows.start, rows.stop)] == list(range(prompts * group))
    assert all(rows.stop - rows.start <= rows_per_pass for rows in cut)
    for rows in cut:
        if rows_per_pass >= group:
            assert rows.start % group == rows.stop % group == 0
        else:
            assert rows.start // group == (rows.stop - 1) // group


def test_the_rows_are_halved_in_whole_groups_then_within_one_and_stay_halved():
    def work(rows_per_pass):
        seen.append(rows_per_pass)
        if rows_per_pass > fits:
            raise CUDA
        return rows_per_pass

    microbatch, seen, fits = AdaptiveMicrobatch("a test", 40, 8), [], 2
    assert microbatch.run(work) == 2
    assert seen == [40, 16, 8, 4, 2]
    assert microbatch.run(work) == 2
    assert seen[5:] == [2]
    fits = 0
    with pytest.raises(ValueError, match="one completion at a time"):
        microbatch.run(work)


def test_only_errors_about_memory_are_taken_for_it():
    assert is_out_of_memory(CUDA)
    assert is_out_of_memory(MPS)
    assert is_out_of_memory(RuntimeError("Invalid buffer size: 9.75 GiB"))  # MPS, for one tensor that is too large
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not is_out_of_memory(RuntimeError("The size of tensor a (3) must match"))
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="must match"):
        AdaptiveMicrobatch("a test", 4, 2).run(lambda _rows: raising(RuntimeError("must match")))


def raising(error):
    raise error


def short_of_memory(model, monkeypatch, where, fits, error=CUDA):
    """Make a model raise for more than `fits` rows: "sampling", "forward" (with gradient) or "backward"."""
    true_forward = model.forward

    def refuse(gradient):
        raise error

    def forward(*args, **kwargs):
        packed, training = kwargs.get("layout"), torch.is_grad_enabled()
        rows = kwargs["input_ids"].shape[0] if packed is None else len(packed.completion_lengths)
        if rows > fits and training == (where == "forward") and where != "backward":
            raise error
        out = true_forward(*args, **kwargs)
        if rows > fits and training and where == "backward":
            out.logits.register_hook(refuse)
        return out

    monkeypatch.setattr(model, "forward", forward)


def a_grpo(model, **more):
    """Return GRPO on the tiny model, with the settings that the tests share."""
    config = resolve({"model": str(model), **SETTINGS, **more})
    return GRPO(config, make_task(config), load(str(model), torch.device("cpu")))


@pytest.fixture(scope="module")
def whole(model):
    """Return the gradient and the rollout of a step with enough memory."""
    grpo = a_grpo(model)
    gradients = kept_gradients(grpo)
    rollout = grpo.step(1).rollout
    assert gradients[0].norm() > 0.01, "or it would prove nothing"
    return gradients[0], rollout


@pytest.mark.parametrize(
    ("where", "fits", "error"),
    [(where, fits, CUDA) for where in ("sampling", "forward", "backward") for fits in (23, 5, 1)]
    + [("backward", 6, MPS)],
    ids=str,
)
def test_the_step_is_repeated_with_fewer_rows_and_has_the_same_gradient(
    where, fits, error, model, whole, monkeypatch, capsys
):
    gradient, expected = whole
    short = a_grpo(model)
    gradients = kept_gradients(short)
    short_of_memory(short.policy, monkeypatch, where, fits, error)
    outcome, entry = measured_step(short, 1)
    assert outcome.rollout.completion_texts == expected.completion_texts
    assert entry["skipped_updates"] == 0
    assert len(gradients) == 1
    difference = gradients[0] - gradient  # float32 rounds differently when it sums in another order
    assert difference.abs().max().item() < 1e-6
    assert (difference.norm() / gradient.norm()).item() < 5e-6
    microbatch = short.sample_microbatch if where == "sampling" else short.update_microbatch
    assert microbatch.rows == {23: 12, 6: 6, 5: 3, 1: 1}[fits]
    said = capsys.readouterr().out
    assert "Memory ran out" in said
    short.step(2)
    assert capsys.readouterr().out == "", "the reduced size is kept"


TINY = ["--num-iterations", "4", "--batch-size", "2", "--num-generations", "2", "--num-inner-updates", "2"]
TINY += ["--eval-every", "4", "--eval-problems", "4", "--save-every", "1", "--show-every", "0", "--max-operand", "1"]
TINY += ["--min-operand", "-1", "--max-new-tokens", "6", "--train-anyway"]


@pytest.fixture
def train(model, tmp_path, monkeypatch):
    """Run train_grpo.py; from step `first` on, memory holds only `fits` rows with gradient."""
    true_step = GRPO.step

    def run(name, fits=None, first=1):
        def step(self, number):
            if fits is not None and number == first:
                short_of_memory(self.policy, monkeypatch, "forward", fits)
            return true_step(self, number)

        monkeypatch.setattr(GRPO, "step", step)
        return CliRunner().invoke(
            train_grpo.main, [*TINY, "--model", str(model), "--output-dir", str(tmp_path / name)]
        )

    return run


def test_the_reduced_size_is_stored_and_a_resume_begins_with_it(train, tmp_path):
    assert train("run", fits=2).exit_code == 0
    checkpoint, _ = newest_checkpoint(tmp_path / "run")
    assert checkpoint.state["limits"]["update"] == 2
    config = resolve({**checkpoint.state["config"]})
    again = Trainer(config, make_task(config), {})
    again._restore()
    assert again.grpo.update_microbatch.rows == 2
    other = Trainer(resolve({**checkpoint.state["config"], "micro_batch_size": 2}), make_task(config), {})
    other._restore()
    assert other.grpo.update_microbatch.rows == 4, "a new --micro-batch-size is tried anew"


def test_where_nothing_fits_the_run_ends_in_one_line_and_later_continues_to_the_same_weights(train, tmp_path):
    assert train("whole").exit_code == 0
    result = train("run", fits=0, first=3)
    assert result.exit_code == 1
    error = [line for line in result.stderr.splitlines() if not line.startswith("step ")]
    assert len(error) == 1
    assert error[0].startswith("Error: memory ran out in the update")
    checkpoint, problems = newest_checkpoint(tmp_path / "run")
    assert (checkpoint.step, problems) == (2, [])
    assert [row["step"] for row in json.loads((tmp_path / "run/grpo_metrics.json").read_text())["steps"]] == [1, 2]
    assert train("run").exit_code == 0
    for name in ("policy", "optimizer"):
        path = f"checkpoints/step-00000004/{name}.safetensors"
        assert (tmp_path / "run" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


def test_a_model_that_does_not_fit_at_all_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(grpo_module, "frozen_copy", lambda model: raising(CUDA))
    result = CliRunner().invoke(train_grpo.main, ["--output-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr == "Error: starter does not fit into memory; use a smaller model, or --device cpu\n"


@pytest.mark.parametrize("error", [CUDA, MPS], ids=["cuda", "mps"])
def test_running_out_of_memory_is_never_taken_for_a_model_that_does_not_support_a_shortcut(error, monkeypatch):
    lm = load("starter", torch.device("cpu"))
    prompts = lm.prompts([Arithmetic().messages(f"What is ({n} + 1) + 1?") for n in range(2)])
    ids, mask = left_pad(prompts, lm.pad_id, lm.model.device)
    true_forward = lm.model.forward

    def forward(*args, **kwargs):
        cache = kwargs.get("past_key_values")
        if "layout" in kwargs or (cache is not None and cache.get_seq_length()):
            raise error
        return true_forward(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", forward)
    for tried in (
        lambda: probe_scorer(lm.model, ids, mask),
        lambda: supports_common_prefix(lm.model, prompts, lm.pad_id),
    ):
        with pytest.raises(RuntimeError, match="memory"):
            tried()


def test_memory_that_runs_out_for_the_moments_of_the_optimizer_leaves_no_half_made_ones(model, monkeypatch):
    def after_one_step(fail):
        torch.manual_seed(0)
        grpo = a_grpo(model, learning_rate=1e-3)
        parameters = list(grpo.policy.parameters())
        true_zeros_like = torch.zeros_like

        def zeros_like(x, *args, **kwargs):
            if fail and any(x is p for p in parameters):
                fail.pop()
                raise CUDA
            return true_zeros_like(x, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros_like", zeros_like)
            grpo.step(1)
        return torch.cat([p.detach().flatten() for p in parameters])

    assert torch.equal(after_one_step([True]), after_one_step([]))
