"""What ends a run before its last step from outside: signals and the time limit."""

import os
import signal
import sys
import threading
import time
from typing import Any

import torch

from grpo.config import parse_duration
from grpo.runtime import distributed
from grpo.runtime.console import for_terminal

TOO_LATE = 1  # among signals of at least 2
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class InterruptHandler:
    """Catches SIGINT and SIGTERM, and watches the clock: call `reason` after each step.

    The first signal is remembered, so that the step can be finished and saved; a second one ends the process at
    once. A thread waits for them, because Python runs no handler during a long operation of torch.
    """

    def __init__(self, time_limit: str, launched: float) -> None:
        """`launched` is the `time.monotonic()` that the time limit counts from."""
        self.signal: signal.Signals | None = None
        self._deadline = launched + parse_duration(time_limit) if time_limit else None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "InterruptHandler":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write)  # the system writes the number of each signal here
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
        """Return why to stop now, or None; one more step and the end of the run need `needed` seconds.

        All ranks must call this, and `interrupted`, together; they get the same answer.
        """
        late = self._deadline is not None and time.monotonic() + needed > self._deadline
        code = self._agreed(TOO_LATE if late else 0)
        return NAMES.get(code, "the time limit") if code else None

    def interrupted(self) -> bool:
        """Return whether there was a signal."""
        return self._agreed(0) in NAMES

    @property
    def exit_status(self) -> int:
        """Return 0, or 130 after Ctrl-C, or 143 after SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal

    def _agreed(self, code: int) -> int:
        """Return the most urgent of the codes of all ranks: a signal, or else `code`."""
        code = int(distributed.all_reduce_max(torch.tensor(self.signal or code)))
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
            said = for_terminal(f"\n{name}: finishing this step, then saving; once more quits at once")
            print(said, file=sys.stderr, flush=True)
        os.close(self._read)
