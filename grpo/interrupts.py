"""What ends a run before its last step from outside: signals and the time limit."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from grpo.runtime.console import for_terminal
from grpo.runtime.ranks import ONE, Ranks
from grpo.setting import parse_duration

TOO_LATE = 1  # among signals of at least 2
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
SAY_WITHIN = 1.0  # seconds that the end of the process leaves to say that a signal came
ASK_AGAIN = 0.3  # seconds until work that swallowed an `Interrupted` gets another
_exit = os._exit  # a user's code runs with another one (tasks/common/user_file.py)


class Interrupted(KeyboardInterrupt):
    """A signal came in the middle of work that is thrown away. Nothing that catches mistakes catches this."""


class InterruptHandler:
    """Catches SIGINT and SIGTERM, and watches the clock: call `reason` after each step.

    The first signal ends work that is `abandonable`, between two operations of Python; else it is remembered, so that
    the work can be finished and saved. A second one ends the process. A thread waits for them, because Python runs no
    handler during a long operation of torch.
    """

    def __init__(self, time_limit: str, launched: float, ranks: Ranks = ONE) -> None:
        """`launched` is the `time.monotonic()` that the time limit counts from."""
        self.ranks = ranks
        self.signal: signal.Signals | None = None
        self._deadline = launched + parse_duration(time_limit) if time_limit else None
        self._before: dict[signal.Signals, Any] = {}
        self._grace: float | None = None  # seconds that abandonable work has after a signal; None for other work
        self._came = 0.0  # when the signal did
        self._said = False  # that it did
        self._lock = threading.Lock()

    def __enter__(self) -> "InterruptHandler":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write)  # the system writes the number of each signal here
        for number in NAMES:
            self._before[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._write)  # ends the thread
        self._thread.join(SAY_WITHIN)

    @contextmanager
    def abandonable(self, grace: float = 0.0) -> Iterator[None]:
        """Let a signal raise Interrupted in the block, unless it ends within `grace` seconds.

        Not so with several processes, which must stop in the same place.
        """
        if self.ranks.size > 1:
            yield
            return
        self._grace = grace
        try:
            self._raise_if_late()
            yield
        finally:
            self._grace = None

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

    def stop_listening(self) -> None:
        """Leave further signals to the system, which ends the process even while a library holds Python's lock."""
        with self._lock:
            self._grace = None
            for number in NAMES:
                signal.signal(number, signal.SIG_DFL)

    @property
    def name(self) -> str:
        """Return the name of the signal that came."""
        return NAMES[self.signal]

    @property
    def exit_status(self) -> int:
        """Return 0, or 130 after Ctrl-C, or 143 after SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal

    def _agreed(self, code: int) -> int:
        """Return the most urgent of the codes of all ranks: a signal, or else `code`."""
        code = int(self.ranks.max(torch.tensor(self.signal or code)))
        if code in NAMES:
            self.signal = signal.Signals(code)
        return code

    def _handle(self, number: int, frame: object) -> None:
        """Run in the main thread, soon after a signal."""
        self._remember(number)
        self._raise_if_late()

    def _remember(self, number: int) -> None:
        if self.signal is None:
            self._came, self.signal = time.monotonic(), signal.Signals(number)

    def _raise_if_late(self) -> None:
        if self.signal is not None and self._grace is not None and time.monotonic() >= self._came + self._grace:
            raise Interrupted

    def _wait(self) -> None:
        own = 0  # signals of `_ask_again` that are on their way
        while True:
            if self.signal is not None and not select.select([self._read], [], [], ASK_AGAIN)[0]:
                own += self._ask_again()
                continue
            byte = os.read(self._read, 1)
            if not byte:
                break
            if byte[0] not in NAMES:
                continue
            if own:
                own -= 1
            elif self._said:
                _exit(128 + byte[0])
            else:
                self._said = True
                self._remember(byte[0])
                said = for_terminal(f"\n{self.name}: stopping; once more quits at once")
                print(said, file=sys.stderr, flush=True)
        os.close(self._read)

    def _ask_again(self) -> bool:
        """Signal the main thread again if it is in abandonable work: there was grace, or an `except` of a user's."""
        with self._lock:
            if self._grace is not None:
                signal.pthread_kill(threading.main_thread().ident, self.signal)
            return self._grace is not None
