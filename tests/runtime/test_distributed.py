"""Several processes against one process: the same run, also if it is stopped or fails. On the CPU, with gloo."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import peft  # noqa: F401, once, not in every fork
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import train_grpo
from grpo.algorithm import update
from grpo.algorithm.rollout import RolloutSampler
from grpo.evaluation import evaluator
from grpo.record.checkpoint import newest_checkpoint
from grpo.record.metrics import load_metrics, without_times
from grpo.runtime import sharding
from grpo.runtime.ranks import ONE, ConnectedRanks, full_tensor
from grpo.runtime.sharding import distribute_like, is_sharded, local_tensor
from tasks.common import watch
from tests.helpers.runs import ENVIRONMENT, ROOT, forked, options, together, wait_for

SAME = 1e-5  # Weights, which 6 steps move by more than 0.001, agree within this.
MORE = {"num_iterations": 6, "eval_every": 3, "save_every": 3, "batch_size": 4, "learning_rate": 1e-3}
VARIANTS = {
    "replicated": {},
    "sharded": {"shard": True},
    "sharded, small passes": {"shard": True, "micro_batch_size": 1, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def alone(model):
    """Return a function from settings to the folder of a run of six steps in one process."""
    known = {}

    def run(**settings):
        key = json.dumps(settings)
        if key not in known:
            known[key] = model.parent / f"alone-{len(known)}"
            status, _, said = forked(train_grpo.main, arguments(model, known[key], **settings))
            assert status == 0, said
        return known[key]

    return run


def arguments(model, folder, **settings):
    return options(**{**MORE, **settings, "model": model, "output_dir": folder})


def train_in_two(model, folder, **settings):
    """Train in two processes, check that both ended with status 0, and return the output of each."""
    ends = [fork.wait() for fork in together(train_grpo.main, arguments(model, folder, **settings))]
    assert [status for status, _, _ in ends] == [0, 0], ends
    return [out for _, out, _ in ends]


def largest_difference(one, other, name="policy.safetensors"):
    some, others = (load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / name) for run in (one, other))
    assert some.keys() == others.keys()
    assert all(some[k].shape == others[k].shape and some[k].dtype == others[k].dtype for k in some)
    return max(float((some[k] - others[k]).abs().max()) for k in some)


def assert_same_run(one, other):
    first, second = (load_metrics(folder) for folder in (one, other))
    assert len(first["steps"]) == len(second["steps"])
    for mine, theirs in zip(first["steps"], second["steps"], strict=True):
        mine, theirs = without_times(mine), without_times(theirs)
        near = {name: value and pytest.approx(value, rel=2e-3, abs=1e-4) for name, value in mine.items()}
        assert theirs == near
    for name in ("reward_mean", "accuracy", "tokens", "completion_length", "tied_groups_fraction"):
        assert [row[name] for row in first["steps"]] == [row[name] for row in second["steps"]], name
    assert [row["accuracy"] for row in first["evals"]] == [row["accuracy"] for row in second["evals"]]


def test_two_processes_fine_tune_as_one_does(model, alone, tmp_path):
    first = {"sft_steps": 4, "sft_batch_size": 6, "sft_learning_rate": 1e-3, "num_iterations": 2}
    one = alone(**first)
    train_in_two(model, tmp_path / "run", **first)
    assert largest_difference(one, tmp_path / "run") < SAME
    losses = [[entry["loss"] for entry in load_metrics(run)["sft"]] for run in (one, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
    assert_same_run(one, tmp_path / "run")


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_two_processes_train_what_one_does(settings, model, alone, tmp_path):
    one = alone()
    said = train_in_two(model, tmp_path / "run", **settings)
    assert largest_difference(one, tmp_path / "run") < SAME
    assert largest_difference(one, tmp_path / "run", "optimizer.safetensors") < SAME
    assert_same_run(one, tmp_path / "run")
    moved = load_file(model / "model.safetensors")
    now = load_file(tmp_path / "run/saved_model/model.safetensors")
    assert now.keys() == moved.keys()
    assert max(float((now[name] - moved[name]).abs().max()) for name in now) > 100 * SAME, "or it would prove nothing"
    assert said[1] == "", "only rank 0 prints"
    files = [sorted(str(p.relative_to(run)) for p in run.rglob("*")) for run in (one, tmp_path / "run")]
    assert files[0] == files[1]


def test_two_machines_of_two_processes_that_shard_within_each_do_so_too(model, alone, tmp_path, monkeypatch):
    true_shard = sharding.fully_shard

    def on_a_mesh_of_two_by_two(module, mesh, **more):
        assert mesh.shape == (2, 2)
        assert mesh.get_local_rank("process") == int(os.environ["RANK"]) % 2
        return true_shard(module, mesh=mesh, **more)

    monkeypatch.setattr(sharding, "fully_shard", on_a_mesh_of_two_by_two)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    forks = together(train_grpo.main, arguments(model, tmp_path / "run", shard=True), processes=4)
    ends = [fork.wait() for fork in forks]
    assert [status for status, _, _ in ends] == [0] * 4, ends
    for name in ("policy.safetensors", "optimizer.safetensors"):
        assert largest_difference(alone(), tmp_path / "run", name) < SAME
    assert_same_run(alone(), tmp_path / "run")


@pytest.mark.parametrize("shard", [False, True])
def test_the_fused_output_layer_does_so_too(shard, model, alone, tmp_path, monkeypatch):
    one = alone()
    monkeypatch.setattr("grpo.scoring.scorer.CHUNK", 64)  # fewer logits are held, all at once
    train_in_two(model, tmp_path / "run", shard=shard)
    # Two ways to the same log-probabilities differ by rounding, which 6 steps of Adam enlarge.
    assert largest_difference(one, tmp_path / "run") < 10 * SAME


@pytest.mark.parametrize("shard", [False, True])
def test_groups_that_are_sampled_again_are_shared_out_too(shard, model, alone, tmp_path):
    settings = {"resample_tied": 2, "scale_rewards": "batch", "mask_truncated_completions": True}
    one = alone(**settings)
    assert any(row["resampled_groups"] % 2 for row in load_metrics(one)["steps"]), (
        "an odd number cannot be shared evenly"
    )
    train_in_two(model, tmp_path / "run", shard=shard, **settings)
    assert largest_difference(one, tmp_path / "run") < SAME
    assert_same_run(one, tmp_path / "run")


NOVELTY = """
def novelty(prompts, completions, **columns):
    texts = [completion[0]["content"] for completion in completions]
    return [1 - texts.count(text) / len(texts) for text in texts]
"""


@pytest.mark.parametrize("more", [{}, {"resample_tied": 2}, {"shard": True}], ids=str)
def test_a_reward_that_looks_at_the_whole_batch_gives_the_same_in_two_processes(more, model, alone, tmp_path):
    file = model.parent / "novelty.py"
    file.write_text(NOVELTY)
    settings = {"reward": f"{file}:novelty=1", **more}
    one = alone(**{**settings, "shard": False})
    train_in_two(model, tmp_path / "run", **settings)
    assert largest_difference(one, tmp_path / "run") < SAME
    assert_same_run(one, tmp_path / "run")
    samples, others = (
        [json.loads(line) for line in (run / "grpo_samples.jsonl").read_text().splitlines()]
        for run in (one, tmp_path / "run")
    )
    assert [(entry["completion"], entry["reward"]) for entry in samples] == [
        (entry["completion"], entry["reward"]) for entry in others
    ]
    if not more.get("resample_tied"):
        first = [entry for entry in samples if entry["step"] == 1]  # two groups of four: what rank 0 sampled
        texts = [entry["completion"] for entry in first]
        assert [entry["reward"] for entry in first] != [1 - texts.count(text) / len(texts) for text in texts], (
            "or it would prove nothing"
        )


@pytest.mark.parametrize("shard", [False, True])
def test_an_adapter_is_trained_and_merged_as_in_one_process(shard, model, alone, tmp_path):
    one = alone(lora_rank=2)
    train_in_two(model, tmp_path / "run", lora_rank=2, shard=shard)
    assert largest_difference(one, tmp_path / "run") < SAME
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        some, others = (load_file(run / "saved_model" / name) for run in (one, tmp_path / "run"))
        assert some.keys() == others.keys()
        assert max(float((some[k] - others[k]).abs().max()) for k in some) < SAME


@pytest.mark.parametrize("shard", [False, True])
def test_the_problems_of_pass_at_k_are_shared_out_too(shard, model, alone, tmp_path):
    settings = {"pass_at_k": 2, "num_iterations": 2, "eval_every": 2}

    def before(rank):
        true_uniforms = evaluator.sampling_uniforms

        def noted(seed, place, *args):
            with (tmp_path / f"places of {rank}").open("a") as file:
                file.write(f"{place}\n")
            return true_uniforms(seed, place, *args)

        evaluator.sampling_uniforms = noted

    forks = together(train_grpo.main, arguments(model, tmp_path / "run", shard=shard, **settings), before=before)
    ends = [fork.wait() for fork in forks]
    assert [status for status, _, _ in ends] == [0, 0], ends
    first, second = (
        [e for e in load_metrics(run)["evals"] if "pass_at_k" in e] for run in (alone(**settings), tmp_path / "run")
    )
    assert len(first) == len(second) == 2
    for name in ("pass_at_k", "maj_at_k"):
        assert [entry[name] for entry in first] == [entry[name] for entry in second]
    assert 0 < first[-1]["pass_at_k"]["2"] < 1, "or it would prove nothing"
    places = [(tmp_path / f"places of {rank}").read_text().split() for rank in (0, 1)]
    assert {*places[0], *places[1]} == {str(place) for place in range(first[0]["n"])}
    assert len({*places[0]} & {*places[1]}) <= 1, "the last problem fills up an odd number"


def out_of_memory_once(owner, name, call):
    """Return a `before` that makes rank 1 run out of memory in one call of a function, counted from 1."""

    def before(rank):
        calls, work = itertools.count(1), getattr(owner, name)

        def wrapper(*args, **kwargs):
            if rank == 1 and next(calls) == call:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return work(*args, **kwargs)

        setattr(owner, name, wrapper)

    return before


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(RolloutSampler, "_sample", 4), (update, "grpo_loss", 3), (evaluator, "greedy", 2)],
    ids=["sampling", "an update", "an evaluation"],
)
def test_a_process_that_runs_out_of_memory_repeats_its_own_part(owner, name, call, model, alone, tmp_path):
    settings = {"resample_tied": 2, "scale_rewards": "batch", "mask_truncated_completions": True}
    before = out_of_memory_once(owner, name, call)
    forks = together(train_grpo.main, arguments(model, tmp_path / "run", **settings), before=before)
    ends = [fork.wait() for fork in forks]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert largest_difference(alone(**settings), tmp_path / "run") < SAME
    assert_same_run(alone(**settings), tmp_path / "run")


@pytest.mark.parametrize(
    ("owner", "name", "settings"),
    [
        (ConnectedRanks, "sum_gradients", {}),
        (update, "grpo_loss", {"shard": True}),
        (RolloutSampler, "_sample", {"shard": True}),
    ],
    ids=["a sum of gradients", "a sharded update", "sharded sampling"],
)
def test_work_that_all_do_together_is_not_repeated_by_one(owner, name, settings, model, tmp_path):
    before = out_of_memory_once(owner, name, 3)
    forks = together(train_grpo.main, arguments(model, tmp_path / "run", **settings), before=before)
    (first, _, _), (second, _, said) = [fork.wait() for fork in forks]
    assert (first, second) == (1, 1)
    assert "process 1: memory ran out" in said
    assert "Traceback" not in said
    assert newest_checkpoint(tmp_path / "run")[0].step == 0


def test_one_process_continues_what_two_began_and_the_other_way_round(model, alone, tmp_path):
    train_in_two(model, tmp_path / "run", num_iterations=3, shard=True)
    assert forked(train_grpo.main, arguments(model, tmp_path / "run", num_iterations=5))[0] == 0
    train_in_two(model, tmp_path / "run", shard=True)
    assert largest_difference(alone(), tmp_path / "run") < SAME
    assert len(load_metrics(tmp_path / "run")["steps"]) == 6


def test_a_signal_to_one_process_stops_both_at_the_same_step(model, tmp_path):
    folder = tmp_path / "run"
    forks = together(train_grpo.main, arguments(model, folder, num_iterations=5000, eval_every=5000, save_every=1))
    wait_for(lambda: list(folder.glob("checkpoints/step-*[1-9]")))
    os.kill(forks[1].pid, signal.SIGTERM)
    ends = [fork.wait() for fork in forks]
    assert [status for status, _, _ in ends] == [143, 143]
    assert "SIGTERM" in ends[0][1]
    assert newest_checkpoint(folder)[0].step == load_metrics(folder)["steps"][-1]["step"]


def test_the_time_limit_of_one_process_is_that_of_train_in_two(model, tmp_path):
    train_in_two(model, tmp_path / "run", num_iterations=100_000, eval_every=100_000, time_limit="2s")
    assert load_metrics(tmp_path / "run")["finished"]["reason"] == "the time limit"


def test_the_time_limit_ends_two_processes_although_a_reward_does_not_return(model, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "FIRST_LINE_SECONDS", 0.3)
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "calls = 0\n"
        "def f(completions, **columns):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 5:\n"
        "        time.sleep(60)\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n",
        encoding="utf-8",
    )
    train_in_two(model, tmp_path / "run", reward=f"{tmp_path / 'mine.py'}:f=1", time_limit="4s")
    record = load_metrics(tmp_path / "run")
    assert record["finished"]["reason"] == "the time limit"
    assert 1 <= record["finished"]["step"] == len(record["steps"]) < 5


def test_a_process_that_dies_ends_the_others_in_one_line(model, tmp_path):
    folder = tmp_path / "run"
    forks = together(train_grpo.main, arguments(model, folder, num_iterations=5000, eval_every=5000, save_every=1))
    wait_for(lambda: list(folder.glob("checkpoints/step-*[1-9]")))
    os.kill(forks[1].pid, signal.SIGKILL)
    (status, _, said), (killed, _, _) = [fork.wait() for fork in forks]
    assert (status, killed) == (1, -signal.SIGKILL)
    assert said.strip().splitlines()[-1].startswith("Error: another process of this run has ended")
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"batch_size": 3}, "--batch-size 2"), ({"batch_size": 1}, "--batch-size 2"), ({"device": "mps"}, "mps")],
)
def test_settings_that_cannot_be_shared_out_are_refused_in_one_line(settings, word, model, tmp_path):
    ends = [f.wait() for f in together(train_grpo.main, arguments(model, tmp_path / "run", **settings))]
    for status, _, said in ends:
        assert status == 1
        assert word in said
        assert said.count("\n") == 1


def test_a_process_that_joins_late_is_told_the_mistake_too(model, tmp_path, monkeypatch):
    true_init = dist.init_process_group

    def late(*args, **kwargs):
        true_init(*args, **kwargs)
        time.sleep(1)
        dist.distributed_c10d._get_default_store().add("joined", 1)  # asks rank 0, as joining does to its end

    def before(rank):
        if rank == 1:
            monkeypatch.setattr(dist, "init_process_group", late)

    settings = arguments(model, tmp_path / "run", batch_size=1)
    for status, _, said in [f.wait() for f in together(train_grpo.main, settings, before=before)]:
        assert status == 1
        assert "--batch-size 2" in said
        assert said.count("\n") == 1


def test_sharding_takes_several_processes(model, tmp_path):
    status, _, said = forked(train_grpo.main, arguments(model, tmp_path / "run", shard=True))
    assert status == 1
    assert "torchrun --nproc-per-node N train_grpo.py --shard" in said


def test_torchrun_stopped_by_sigterm_continues_to_the_same_result(model, alone, tmp_path):
    settings = {"num_iterations": 16, "eval_every": 16}
    whole = alone(**settings)
    settings["save_every"] = 1
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "train_grpo.py")]
    command += arguments(model, tmp_path / "run", **settings)
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=-1, stderr=-1, text=True) as run:
        wait_for(lambda: list((tmp_path / "run").glob("checkpoints/step-*[1-9]")))
        run.send_signal(signal.SIGTERM)
        out, _ = run.communicate(timeout=120)
    assert "The same command continues from here." in out
    stopped = newest_checkpoint(tmp_path / "run")[0].step
    assert 0 < stopped < 16
    train_in_two(model, tmp_path / "run", **settings)
    assert largest_difference(whole, tmp_path / "run") < SAME
    assert_same_run(whole, tmp_path / "run")


def test_in_one_process_every_method_returns_its_argument():
    tensor = torch.tensor([1.0, -2.0])
    assert (ONE.size, ONE.rank, ONE.is_main) == (1, 0, True)
    assert ONE.own_slice(6) == slice(0, 6)
    assert ONE.padded([1, 2, 3]) == [1, 2, 3]
    assert ONE.gather({"a": 1}) == [{"a": 1}]
    assert ONE.from_main("x") == ONE.on_main(lambda: "x") == "x"
    assert ONE.all_reduce(tensor, "min").tolist() == [1.0, -2.0]
    assert (ONE.any(True), ONE.any(False)) == (True, False)
    with ONE.main_first():
        ONE.barrier()
    ONE.check_alike("a value", 1)


def test_an_unsharded_model_is_whole_and_its_gradients_are_summed_already():
    layer = nn.Linear(2, 1, bias=False)
    layer(torch.ones(1, 2)).sum().backward()
    ONE.sum_gradients(layer.parameters())
    assert layer.weight.grad.tolist() == [[1.0, 1.0]]
    assert not is_sharded(layer)
    assert full_tensor(layer.weight) is local_tensor(layer.weight) is layer.weight
    assert distribute_like(tensor := torch.ones(1, 2), layer.weight) is tensor
    assert ONE.collect([("weight", layer.weight)])["weight"].tolist() == layer.weight.tolist()


def test_two_processes_leave_a_finished_run_unchanged(model, alone, tmp_path):
    folder = shutil.copytree(alone(), tmp_path / "run")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".json"}
    said = train_in_two(model, folder)
    assert "finished" in said[0]
    assert {p: p.read_bytes() for p in before} == before
