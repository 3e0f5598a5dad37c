"""Stop a run before its last step: signals (Ctrl-C, SIGTERM) and the time limit."""

import _thread
import os
import select
import signal
import socket
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
from tasks.common import watch

TIME_IS_UP = 1  # Lower than the signals' numbers, 2 and 15, so that a signal takes precedence.
TIME_LIMIT = "the time limit"
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
JOIN_SECONDS = 1.0  # At the end, the thread that reads signals gets this long to print its message.
REPEAT_SECONDS = 0.3  # While abandonable work continues after a signal, the signal is sent again at this interval.


class Interrupted(KeyboardInterrupt):
    """A signal or the time limit has stopped abandonable work. `except Exception` does not catch this exception."""


class InterruptHandler:
    """Catch SIGINT and SIGTERM, and watch the time limit; call `reason` after each step.

    The first signal interrupts `abandonable` work between two operations of Python. Other work is finished, and its
    results are saved. A second signal ends the process. A thread receives the signals, because Python runs no signal
    handler during a long operation of torch. The time limit interrupts abandonable work only while a user's function
    does not return (`tasks/common/watch.py`).
    """

    def __init__(self, time_limit: str, launched: float, ranks: Ranks = ONE) -> None:
        """Count the time limit from `launched`, a value of `time.monotonic()`."""
        self.ranks = ranks
        self.signal: signal.Signals | None = None
        self._deadline = launched + parse_duration(time_limit) if time_limit else None
        self._before: dict[signal.Signals, Any] = {}
        self._grace: float | None = None  # seconds that the work may continue after a signal; None: until it ends
        # A user's function that does not return is interrupted this many seconds before the deadline; None: never.
        self._reserved: float | None = None
        self._signal_at = 0.0  # when the first signal came
        self._is_announced = False  # whether a message has said that a signal came
        self._lock = threading.Lock()

    def __enter__(self) -> "InterruptHandler":
        self._read, self._write = socket.socketpair()  # not a pipe, because Windows cannot `select` on one
        self._write.setblocking(False)
        # From now on the system writes the number of each signal to the socket.
        self._wakeup_before = signal.set_wakeup_fd(self._write.fileno())
        for number in NAMES:
            self._before[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()
        watch.checks.append(self._raise_if_waiting_in_vain)
        return self

    def __exit__(self, *error: object) -> None:
        watch.checks.remove(self._raise_if_waiting_in_vain)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)  # a notebook's event loop may have set its own
        self._write.close()  # ends the thread
        self._thread.join(JOIN_SECONDS)

    @contextmanager
    def abandonable(self, grace: float = 0.0, reserved: float | None = None) -> Iterator[None]:
        """Let a signal raise Interrupted in the block, unless the block ends within `grace` seconds after the signal.

        In the block, a user's function that does not return is also interrupted at the time limit, or `reserved`
        seconds before it. With several processes only such a function is interrupted, and only if `reserved` is
        given: rank 0 alone must call it, through `Ranks.on_main`, so that all processes stop after the same step.
        """
        is_alone = self.ranks.size == 1
        self._grace = grace if is_alone else None
        self._reserved = 0.0 if is_alone and reserved is None else reserved
        try:
            self._raise_if_late()
            yield
        finally:
            self._grace = None
            self._reserved = None

    def reason(self, needed: float) -> str | None:
        """Return the reason to stop now, or None. `needed`: the seconds that one more step and the run's end take.

        All ranks must call this together, and get the same answer. The same holds for `interrupted`.
        """
        is_late = self._deadline is not None and time.monotonic() + needed > self._deadline
        code = self._agreed(TIME_IS_UP if is_late else 0)
        return NAMES.get(code, TIME_LIMIT) if code else None

    def interrupted(self) -> bool:
        """Return whether a signal has come, on any rank."""
        return self._agreed(0) in NAMES

    def stop_listening(self) -> None:
        """Let further signals end the process, even while a library holds Python's global lock."""
        with self._lock:
            self._grace = None
            for number in NAMES:
                signal.signal(number, signal.SIG_DFL)

    @property
    def name(self) -> str:
        """Return the name of the first signal, or TIME_LIMIT if no signal has come."""
        return NAMES.get(self.signal, TIME_LIMIT)

    @property
    def exit_status(self) -> int:
        """Return 0, or 130 after Ctrl-C, or 143 after SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal

    def _agreed(self, code: int) -> int:
        """Return the largest code over all ranks; the code of a rank that got a signal is the signal's number."""
        code = int(self.ranks.all_reduce(torch.tensor(self.signal or code), "max"))
        if code in NAMES:
            self.signal = signal.Signals(code)
        return code

    def _handle(self, number: int, frame: object) -> None:
        """Handle a signal in the main thread, between two operations of Python."""
        self._remember(number)
        self._raise_if_late()

    def _remember(self, number: int) -> None:
        if self.signal is None:
            self._signal_at = time.monotonic()
            self.signal = signal.Signals(number)

    def _raise_if_late(self) -> None:
        if self.signal is not None and self._grace is not None and time.monotonic() >= self._signal_at + self._grace:
            raise Interrupted

    def _raise_if_waiting_in_vain(self) -> None:
        """End a user's function that does not return, after a signal or when the run's time limit is near."""
        if self._reserved is None:
            return
        is_late = self._deadline is not None and time.monotonic() + self._reserved > self._deadline
        if is_late or self.signal is not None:
            raise Interrupted

    def _wait(self) -> None:
        """Read signals from the socket until it is closed: the first is announced, the second ends the process."""
        repeats = 0  # signals sent by `_signal_again` that have not arrived yet
        while True:
            if self.signal is not None and not select.select([self._read], [], [], REPEAT_SECONDS)[0]:
                repeats += self._signal_again()
                continue
            byte = self._read.recv(1)
            if not byte:
                break
            if byte[0] not in NAMES:
                continue
            if repeats:
                repeats -= 1
            elif self._is_announced:
                os._exit(128 + byte[0])
            else:
                self._is_announced = True
                self._remember(byte[0])
                message = for_terminal(f"\n{self.name}: stopping; a second signal quits at once")
                print(message, file=sys.stderr, flush=True)
        self._read.close()

    def _signal_again(self) -> bool:
        """Send the signal to the main thread again if abandonable work still runs; return whether it was sent."""
        with self._lock:
            if self._grace is not None:
                if hasattr(signal, "pthread_kill"):
                    signal.pthread_kill(threading.main_thread().ident, self.signal)
                else:  # Windows
                    _thread.interrupt_main(self.signal)
            return self._grace is not None
