"""Processes that find each other, agree, and notice a process that no longer answers. In forks, without torchrun."""

import os
import signal
import threading
import time

import peft  # noqa: F401, once, not in every fork
import pytest
import torch.distributed as dist

import train_grpo
from grpo.launch import agreement, rendezvous
from grpo.launch.rendezvous import Meeting, _agree_on_round
from tests.helpers.runs import a_tiny_model, options, together, wait_for


def ends_of(forks):
    return [fork.wait() for fork in forks]


def refused(ends, *words):
    """Check that both processes ended with a single line that contains these words."""
    for status, out, said in ends:
        assert status == 1
        assert out == ""
        assert said.count("\n") == 1, said
        for word in words:
            assert word in said
    assert ends[1][2] == ends[0][2].replace("Error: ", "Error: process 1: ", 1)


def test_other_settings_are_named_and_refused_by_both(model, tmp_path):
    def arguments(rank):
        return options(model=model, output_dir=tmp_path / "run", seed=rank, learning_rate=[2e-3, 1e-3][rank])

    ends = ends_of(together(train_grpo.main, arguments))
    refused(ends, "--seed is 0 on process 0 (", "and 1 on process 1 (", "--learning-rate is 0.002 on", "0.001 on")
    assert not (tmp_path / "run").exists()


def test_a_reward_file_that_differs_is_named_and_refused_by_both(model, tmp_path):
    text = "def pay(prompts, completions, **columns):\n    return [{}.0] * len(completions)\n"

    def before(rank):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "mine.py").write_text(text.format(rank))
        os.chdir(tmp_path / str(rank))

    arguments = options(model=model, output_dir=tmp_path / "run", reward="mine.py:pay=1")
    refused(ends_of(together(train_grpo.main, arguments, before=before)), "mine.py is SHA-256 ")


def test_a_mistake_of_one_is_told_to_both(model, tmp_path):
    def arguments(rank):
        data = {"task": "jsonl", "data": tmp_path / "none.jsonl"} if rank else {}
        return options(model=model, output_dir=tmp_path / "run", **data)

    refused(ends_of(together(train_grpo.main, arguments)), "process 1 (", "none.jsonl")


def test_another_model_in_the_same_place_is_refused_by_both(model, tmp_path):
    def before(rank):
        (tmp_path / str(rank)).mkdir()
        os.chdir(tmp_path / str(rank))
        (tmp_path / str(rank) / "model").symlink_to(model if rank else other)

    other = a_tiny_model(tmp_path / "other", hidden_size=8)
    forks = together(train_grpo.main, options(model="model", output_dir=tmp_path / "run"), before=before)
    for status, _, said in ends_of(forks):
        assert status == 1
        assert "the model is one with the hash" in said


def test_a_folder_that_is_not_shared_is_refused_by_both(model, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "SIGHT_PATIENCE", 0.2)
    forks = together(train_grpo.main, lambda rank: options(model=model, output_dir=tmp_path / str(rank)))
    refused(ends_of(forks), "--output-dir", "process 1 (", "all machines share")
    assert [path.name for path in (tmp_path / "0").iterdir()] == [".grpo.lock"]
    assert not (tmp_path / "1").exists()


def test_a_folder_that_another_run_holds_is_refused_by_both(model, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "LOCK_PATIENCE", 0.1)
    arguments = options(model=model, output_dir=tmp_path, num_iterations=10_000, eval_every=10_000, save_every=1)
    running = together(train_grpo.main, arguments)
    wait_for(lambda: list(tmp_path.glob("checkpoints/step-*")))
    refused(ends_of(together(train_grpo.main, arguments)), "is in use by another run, process")
    os.kill(running[0].pid, signal.SIGTERM)
    assert [status for status, _, _ in ends_of(running)] == [143, 143]


def test_one_that_does_not_come_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "JOIN_TIMEOUT", 1.0)
    forks = together(
        train_grpo.main,
        options(model=model, output_dir=tmp_path),
        before=lambda rank: os._exit(3) if rank else None,
    )
    (status, _, said), (gone, _, _) = ends_of(forks)
    assert (status, gone) == (1, 3)
    assert "1 of 2 processes did not join within 1 s: rank 1." in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("stopped", "who"), [(1, "process 1 on "), (0, "torchrun at ")])
def test_one_that_is_stopped_ends_the_others(stopped, who, model, tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "BEAT", 0.1)
    monkeypatch.setattr(rendezvous, "SILENT_BEATS", 20)
    arguments = options(model=model, output_dir=tmp_path, num_iterations=10_000, eval_every=10_000, save_every=1)
    forks = together(train_grpo.main, arguments)
    wait_for(lambda: list(tmp_path.glob("checkpoints/step-*[1-9]")))
    os.kill(forks[stopped].pid, signal.SIGSTOP)
    status, _, said = forks[1 - stopped].wait()
    os.kill(forks[stopped].pid, signal.SIGKILL)
    os.kill(forks[stopped].pid, signal.SIGCONT)
    forks[stopped].wait()
    assert status == 1
    assert f"{who}" in said
    assert said.rstrip().endswith("The last checkpoint is intact: the same command continues from it")
    assert "has not answered for 2 s" in said


@pytest.mark.parametrize(
    ("beats", "who"),
    [
        ([(n, n) for n in range(1, 5)] + [(4, 5)] + [(4, 5)] * 20, "torchrun at "),  # the last look missed one beat
        ([(n, n) for n in range(1, 5)] + [(4, n) for n in range(5, 30)], "process 0 on there"),
    ],
)
def test_a_store_that_falls_silent_is_not_taken_for_the_process_that_beat_last(beats, who, monkeypatch):
    monkeypatch.setattr(rendezvous, "SILENT_BEATS", 20)
    monkeypatch.setattr(rendezvous, "_connect", lambda is_server: dist.HashStore())
    heart = rendezvous.Heartbeat(Meeting("round", 1, [{"host": "there"}, {"host": "here"}], dist.HashStore()), "")
    said, looks = [], iter(beats)

    class Ticks:
        def wait(self, _seconds):
            heart._seen = next(looks, None)
            return heart._seen is None or bool(said)

    heart._done = Ticks()
    monkeypatch.setattr(heart, "_end", said.append)
    heart._count()
    assert len(said) == 1
    assert said[0].startswith(who)


def test_processes_that_were_all_stopped_go_on_together(model, tmp_path, monkeypatch):
    monkeypatch.setattr(rendezvous, "BEAT", 0.05)
    monkeypatch.setattr(rendezvous, "SILENT_BEATS", 20)
    forks = together(train_grpo.main, options(model=model, output_dir=tmp_path, num_iterations=12, save_every=1))
    wait_for(lambda: list(tmp_path.glob("checkpoints/step-*[1-9]")))
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for fork in forks:
            os.kill(fork.pid, number)
        time.sleep(1.5 if number == signal.SIGSTOP else 0)
    assert [status for status, _, _ in ends_of(forks)] == [0, 0]


def agreeing(store, rank, own, found):
    thread = threading.Thread(target=lambda: found.append(_agree_on_round(store.clone(), rank, 2, own)))
    thread.start()
    return thread


def test_a_round_has_no_member_that_died(monkeypatch):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for key, value in {"come/0": "a", "come/1": "b", "proposal": '["a", "b"]'}.items():
        store.set(key, value)  # of processes that are dead
    found = []
    store.set("come/0", "c")
    first = agreeing(store, 0, "c", found)
    time.sleep(0.5)
    assert found == [], "b is not there"
    store.set("come/1", "d")
    second = agreeing(store, 1, "d", found)
    for thread in (first, second):
        thread.join(timeout=10)
    assert [members for _, members in found] == [["c", "d"]] * 2
    assert found[0] == found[1]


def test_a_restart_knows_how_long_the_launch_has_trained(monkeypatch):
    store = dist.HashStore()
    first, second = (Meeting(name, 0, [], store) for name in ("one", "two"))
    assert first.seconds_before() is None
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    first.begin()
    monkeypatch.setattr(time, "time", lambda: 1060.0)
    assert second.seconds_before() == 60.0
    second.begin()
    assert second.seconds_before() == 60.0, "the first begin counts"
