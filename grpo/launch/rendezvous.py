"""Find the other processes of a launch, even after a restart, and notice when one of them no longer answers.

torchrun gives each process its rank and the address of a key-value store. All processes see the store, which
exists as long as torchrun runs on the first machine. After a restart the store still holds what the earlier processes
wrote, and the number of restarts differs between machines. So every process draws a random name. A round is a list of
such names, one for each rank, that all processes in the list have confirmed.
"""

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch.distributed as dist

from grpo.runtime.ranks import Ranks

JOIN_TIMEOUT = 120.0  # seconds; torchrun starts the processes of all machines together
POLL = 0.1  # seconds between two reads of the store
BEAT = 5.0  # seconds between two heartbeats
SILENT_BEATS = 36  # A run ends after this many missed heartbeats (3 minutes); one long call may cause a few.
BEGUN = "begun"  # key in the store for the time at which the launch first began to train


@dataclass(frozen=True)
class Meeting:
    """Hold what a process knows about its round, once all processes have joined."""

    round_name: str
    rank: int  # the rank of this process
    statements: list[dict[str, Any]]  # the statement of each process, by rank
    store: dist.Store  # shared by all rounds; a key that belongs to one round begins with `round_name`

    def seconds_before(self) -> float | None:
        """Return the seconds since the launch first began to train; None if this is not a restart."""
        began = _peek(self.store, BEGUN)
        return None if began is None else max(0.0, time.time() - float(began))

    def begin(self) -> None:
        """Store the time at which the launch first begins to train, for the rounds after a restart."""
        self.store.compare_set(BEGUN, "", str(time.time()))


def meet(statement: Mapping[str, Any], ranks: Ranks) -> Meeting:
    """Wait until all processes have joined, exchange their statements (JSON objects), and return the meeting.

    Raises ValueError if a process does not join in time.
    """
    rank, size = ranks.rank, ranks.size
    has_server = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself serves the store
    try:
        store = _connect(is_server=rank == 0 and not has_server)
        member = uuid4().hex
        store.set(f"statement/{member}", json.dumps(statement))
        store.set(f"come/{rank}", member)
        name, members = _agree_on_round(store, rank, size, member)
        statements = [json.loads(store.get(f"statement/{member}")) for member in members]
        _wait_for_all(dist.PrefixStore(name, store), rank, size)
    except dist.DistError as error:
        raise ValueError(f"no connection to torchrun at {_address()} ({str(error).splitlines()[0]})") from None
    return Meeting(name, rank, statements, store)


class Heartbeat:
    """Count a heartbeat every few seconds, and end this process when another process stops counting.

    If a process dies, its connections break, which ends the other processes. If a process is suspended, or its
    machine is off, no connection breaks: the other processes would wait for it until a long timeout. Heartbeats are
    counted, not seconds, so that processes that were all suspended together continue together.
    """

    def __init__(self, meeting: Meeting, hint: str) -> None:
        """Connect to the store; `hint` says what to do after the run has ended."""
        self.rank = meeting.rank
        self.hosts = [statement["host"] for statement in meeting.statements]
        self.hint = hint
        # This is a second connection, because an operation that waits in the first one would delay the heartbeats.
        self._store = dist.PrefixStore(meeting.round_name, _connect(is_server=False))
        self._seen = [b""] * len(self.hosts)
        self._done = threading.Event()
        # Two threads, because the one that exchanges heartbeats is blocked while the store does not answer.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._count)]

    def __enter__(self) -> "Heartbeat":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(timeout=BEAT)

    def _exchange(self) -> None:
        """Write the heartbeats of this process to the store, and read the heartbeats of all."""
        keys = [f"beat/{rank}" for rank in range(len(self.hosts))]
        beats = 0
        while not self._done.wait(BEAT):
            beats += 1
            try:
                self._store.set(keys[self.rank], str(beats))
                self._seen = [_peek(self._store, key) or b"" for key in keys]
            except dist.DistError:
                pass  # `_count` sees that nothing changes

    def _count(self) -> None:
        """End this process when the count of any process has not changed for `SILENT_BEATS` beats."""
        seen = self._seen
        silent = [0] * len(self.hosts)  # heartbeats missed in a row, by rank
        while not self._done.wait(BEAT):
            silent = [n + 1 if old == new else 0 for old, new, n in zip(seen, self._seen, silent, strict=True)]
            seen = self._seen
            if max(silent) >= SILENT_BEATS:
                rank = silent.index(max(silent))
                # If this process does not see its own heartbeats either, the store does not answer. Its own last
                # heartbeat may have come a little later than the other's, so half of SILENT_BEATS is enough.
                store_is_silent = silent[self.rank] > SILENT_BEATS // 2
                self._end(f"torchrun at {_address()}" if store_is_silent else f"process {rank} on {self.hosts[rank]}")

    def _end(self, silent: str) -> None:
        """Print which process is silent, and end this process."""
        prefix = f"process {self.rank}: " if self.rank else ""
        fault = f"{silent} has not answered for {SILENT_BEATS * BEAT:.0f} s; it or its machine was stopped"
        # The main thread cannot print this, because it waits for the silent process. `sys.stderr` may be redirected.
        print(f"Error: {prefix}{fault}. {self.hint}", file=sys.__stderr__, flush=True)
        os._exit(1)


def _agree_on_round(store: dist.Store, rank: int, size: int, member: str) -> tuple[str, list[str]]:
    """Return the name of the round and the names of its members by rank. Raises ValueError after `JOIN_TIMEOUT`.

    Rank 0 proposes the members; each process confirms a list that holds its own name, `member`.
    """
    end = time.monotonic() + JOIN_TIMEOUT
    proposed = None
    name = ""
    while time.monotonic() < end:
        if rank == 0:
            come = [_peek(store, f"come/{r}") for r in range(size)]
            if None not in come and come != proposed:
                proposed = come
                store.set("proposal", json.dumps([value.decode() for value in come]))
        members = json.loads(_peek(store, "proposal") or b"[]")
        if len(members) == size and members[rank] == member:
            name = f"round-{hashlib.sha256(''.join(members).encode()).hexdigest()[:16]}"
            store.set(f"{name}/here/{rank}", "")
            if store.check([f"{name}/here/{r}" for r in range(size)]):  # processes of an earlier start never confirm
                return name, members
        time.sleep(POLL)
    absent = [r for r in range(size) if not store.check([f"{name}/here/{r}" if name else f"come/{r}"])] or [0]
    raise ValueError(
        f"{len(absent)} of {size} processes did not join within {JOIN_TIMEOUT:.0f} s: rank "
        f"{', '.join(map(str, absent))}. Read their last messages, and start torchrun on every machine"
    )


def _wait_for_all(store: dist.Store, rank: int, size: int) -> None:
    """Wait until every process is here. Rank 0, which may serve the store, also waits until all others know this."""
    for key in ("all", "gone"):
        if store.add(f"{key}/count", 1) == size:
            store.set(key, "")
        if key == "all" or rank == 0:
            store.wait([key], timedelta(seconds=JOIN_TIMEOUT))


def _peek(store: dist.Store, key: str) -> bytes | None:
    """Return a value of the store, or None if the key is missing; `get` would wait for a missing key."""
    return store.get(key) if store.check([key]) else None


def _connect(is_server: bool) -> dist.Store:
    host, _, port = _address().rpartition(":")
    timeout = timedelta(seconds=JOIN_TIMEOUT)
    return dist.TCPStore(host, int(port), is_master=is_server, timeout=timeout, wait_for_workers=False)


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', '29500')}"
