"""The stopwatch: seconds by phase, with the work that a phase has queued on the device."""

from dataclasses import replace

import pytest
import torch

from grpo.algorithm.grpo import GRPO
from grpo.launch import outlook
from grpo.model.loading import load
from grpo.model_card import resolve
from grpo.runtime import stopwatch
from grpo.runtime.device import TRAITS
from grpo.runtime.stopwatch import Stopwatch
from grpo.step_probe import measured_step
from tasks.arithmetic import Arithmetic

CPU = torch.device("cpu")


class Queue:
    """A device that computes nothing before the host waits for it, and a clock that only this waiting moves on."""

    def __init__(self, monkeypatch):
        self.now, self.queued, self.waits = 0.0, 0.0, 0
        monkeypatch.setitem(TRAITS, "cpu", replace(TRAITS["cpu"], synchronize=self.synchronize))
        monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: self.now)

    def synchronize(self, device):
        assert device == CPU
        self.now, self.queued, self.waits = self.now + self.queued, 0.0, self.waits + 1

    def add(self, seconds):
        self.queued += seconds


@pytest.fixture(scope="module")
def grpo():
    config = resolve({"model": "starter", "batch_size": 2, "num_generations": 2, "max_new_tokens": 4})
    return GRPO(config, Arithmetic(), load("starter", CPU))


def test_the_stopwatch_adds_up_phases_and_counts_a_phase_that_raises(monkeypatch):
    ticks = iter([0.0, 2.0, 10.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(ticks))
    clock = Stopwatch(CPU)
    with clock("sample"):
        pass
    with clock("sample"):
        pass
    with pytest.raises(KeyError), clock("update"):
        raise KeyError
    assert clock.seconds == {"sample": 5.0, "update": 4.0}


def test_a_phase_takes_the_time_of_the_work_that_it_queues(monkeypatch):
    queue, clock = Queue(monkeypatch), Stopwatch(CPU)
    for phase, seconds in (("reference", 3.0), ("update", 5.0)):
        with clock(phase):
            queue.add(seconds)
    assert clock.seconds == {"reference": 3.0, "update": 5.0}


def test_the_outlook_measures_the_work_of_a_forward_pass_and_not_its_launch(grpo, monkeypatch):
    rollout, _ = grpo.sampler.sample(0, 2)
    queue = Queue(monkeypatch)
    monkeypatch.setattr(outlook, "logprobs_in_passes", lambda *_: queue.add(3.0))
    assert outlook._forward_seconds(grpo, grpo.config, rollout) == 3.0


def test_the_host_waits_once_a_phase_however_many_updates_a_step_has(grpo, monkeypatch):
    waits = []
    for updates in (1, 3):
        monkeypatch.setattr(grpo, "config", replace(grpo.config, num_inner_updates=updates))
        queue = Queue(monkeypatch)
        _, entry = measured_step(grpo, 1)
        waits.append(queue.waits)
    phases = [name for name in entry if name.startswith("time/")]
    assert waits == [len(phases), len(phases)]
