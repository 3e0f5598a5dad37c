"""Why a run ends before its last step: signals and the time limit. What a run has reached is the trainer's matter."""

import os
import signal
import sys
import threading
import time
from typing import Any

import torch

from grpo import ranks
from grpo.config import parse_duration

TOO_LATE = 1  # among signals of at least 2
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stops:
    """Waits for SIGINT and SIGTERM, and watches the clock: ask `reason` after each step.

    The first signal is remembered, so that the step can be finished and saved; a second one ends the process at
    once. A thread waits for them, because Python calls no handler while a long operation of torch is running.
    """

    def __init__(self, time_limit: str, launched: float) -> None:
        self.signal: signal.Signals | None = None
        self._deadline = launched + parse_duration(time_limit) if time_limit else None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stops":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write)  # the system's handler writes the number of each signal here
        for number in NAMES:
            self._before[number] = signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._wait, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._write)  # ends the thread

    def reason(self, needed: float) -> str | None:
        """Why to stop now, or None; `needed` seconds are still to be spent on one more step and the end.

        All processes of a run ask together, here and of `interrupted`, and hear the same.
        """
        late = self._deadline is not None and time.monotonic() + needed > self._deadline
        code = self._agreed(TOO_LATE if late else 0)
        return NAMES.get(code, "the time limit") if code else None

    def interrupted(self) -> bool:
        """Whether there was a signal."""
        return self._agreed(0) in NAMES

    @property
    def exit_status(self) -> int:
        """0, or 130 after Ctrl-C, or 143 after SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal

    def _agreed(self, code: int) -> int:
        """The most urgent of what all processes say: a signal, or else their `code`."""
        code = int(ranks.largest(torch.tensor(self.signal or code)))
        if code in NAMES:
            self.signal = signal.Signals(code)
        return code

    def _wait(self) -> None:
        while byte := os.read(self._read, 1):
            if byte[0] not in NAMES:
                continue
            if self.signal is not None:
                os._exit(128 + byte[0])
            self.signal = signal.Signals(byte[0])
            name = NAMES[self.signal]
            print(f"\n{name}: finishing this step, then saving; once more quits at once", file=sys.stderr, flush=True)
        os.close(self._read)
