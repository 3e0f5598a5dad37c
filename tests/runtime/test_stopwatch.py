"""The stopwatch: seconds by phase."""

import pytest

from grpo.runtime import stopwatch
from grpo.runtime.stopwatch import Stopwatch


def test_the_stopwatch_adds_up_phases_and_counts_a_phase_that_raises(monkeypatch):
    ticks = iter([0.0, 2.0, 10.0, 13.0, 20.0, 24.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(ticks))
    clock = Stopwatch()
    with clock("sample"):
        pass
    with clock("sample"):
        pass
    with pytest.raises(KeyError), clock("update"):
        raise KeyError
    assert clock.seconds == {"sample": 5.0, "update": 4.0}
