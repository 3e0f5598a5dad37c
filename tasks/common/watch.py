"""Watch a user's function: name it while it does not return, and let a run interrupt it.

The watch is a timer of the operating system, whose signal Python handles in the main thread. A thread could
not do this: it does not run while a regular expression or another long operation holds Python's global lock.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

FIRST_LINE_SECONDS = 5.0  # A message names a function that takes longer than this.
CHECK_SECONDS = 1.0  # After that, `checks` are called at this interval.
LINE_FACTOR = 4  # After a message, the next one comes when the call has lasted this many times as long.

checks: list[Callable[[], None]] = []  # called while a function does not return; each may raise to end the call


@contextmanager
def watched(what: str) -> Iterator[None]:
    """Print a line with `what` and the seconds so far if the block takes long, and then call `checks` every second.

    This works in the main thread of a system that has interval timers, so not on Windows. If the block sets an alarm
    of its own, its alarm replaces the watch.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    start = time.monotonic()
    next_line = FIRST_LINE_SECONDS

    def tick(number: int, frame: FrameType | None) -> None:
        nonlocal next_line
        seconds = time.monotonic() - start
        if seconds >= next_line:
            next_line = LINE_FACTOR * seconds
            with suppress(OSError, RuntimeError):  # the function may be printing at this moment
                print(f"\nWaiting for {what}: it has not returned for {seconds:.0f} s", file=sys.stderr, flush=True)
        for check in checks:
            check()

    handler = signal.signal(signal.SIGALRM, tick)
    timer = signal.setitimer(signal.ITIMER_REAL, FIRST_LINE_SECONDS, CHECK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def limited(deadline: float | None) -> Iterator[None]:
    """Raise TimeoutError in a user's function that has not returned at `deadline`, a value of `time.monotonic()`."""

    def check() -> None:
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError("it had not returned when the time limit was reached")

    checks.append(check)
    try:
        yield
    finally:
        checks.remove(check)
