"""Measure the seconds of each phase of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grpo.runtime.device import TRAITS


class Stopwatch:
    """Adds up seconds by phase: `with clock("sample"): ...` adds to `clock.seconds["sample"]`."""

    def __init__(self, device: torch.device) -> None:
        """Measure work on `device`. At the end of a phase, wait for the operations that are queued there."""
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the seconds of the block to `phase`."""
        start = time.perf_counter()
        try:
            yield
            TRAITS[self.device.type].synchronize(self.device)
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
