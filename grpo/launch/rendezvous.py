"""Find the other processes of a launch, also after a restart, and notice when one of them no longer answers.

torchrun gives each process its rank and the address of a store: keys with values, which all processes see, and which
live as long as torchrun does on the first machine. A restarted process finds there what its predecessors wrote, and
the number of restarts differs between machines. So every process draws a name, and a round is the list of names
that all of them have seen.
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
POLL = 0.1  # seconds between two looks at the store
BEAT = 5.0  # seconds between two signs of life
SILENT_BEATS = 36  # missed ones that end the run: 3 minutes. A process may be slow in one long call, and is not dead
BEGUN = "begun"


@dataclass(frozen=True)
class Meeting:
    """The processes of one round, which have all come."""

    name: str  # of the round
    rank: int
    statements: list[dict[str, Any]]  # by rank
    store: dist.Store  # of the launch; outlives the round

    @property
    def round_store(self) -> dist.Store:
        """Return the store of this round alone, without the keys of earlier ones."""
        return dist.PrefixStore(self.name, self.store)

    def seconds_before(self) -> float | None:
        """Return how long ago the launch first began to train; None if it has not, so if this is no restart."""
        began = _peek(self.store, BEGUN)
        return None if began is None else max(0.0, time.time() - float(began))

    def begin(self) -> None:
        """Note, for the rounds after a restart, that the launch has begun to train."""
        self.store.compare_set(BEGUN, "", str(time.time()))


def meet(statement: Mapping[str, Any], ranks: Ranks) -> Meeting:
    """Wait until all processes of the launch are here; every one learns what each states, a JSON object.

    Raises ValueError if they do not come in time.
    """
    rank, size = ranks.rank, ranks.size
    try:
        store = _connect(is_server=rank == 0 and not _has_agent_store())
        own = uuid4().hex
        store.set(f"statement/{own}", json.dumps(statement))
        store.set(f"come/{rank}", own)
        name, members = _agree_on_round(store, rank, size, own)
        statements = [json.loads(store.get(f"statement/{member}")) for member in members]
        _wait_for_all(dist.PrefixStore(name, store), rank, size)
    except dist.DistError as error:
        raise ValueError(
            f"no connection to {_address()}, where the processes of this run find each other "
            f"({str(error).splitlines()[0]})"
        ) from None
    return Meeting(name, rank, statements, store)


class Heartbeat:
    """Tell the others, every few seconds, that this process lives; end it when one of them no longer does.

    The death of a process breaks its connections, which ends the others. One that is stopped, or whose machine is
    off, breaks none: the others would wait for it for as long as they wait for slow work. Beats are counted, not
    seconds, so that processes that were all stopped together go on together.
    """

    def __init__(self, meeting: Meeting, hint: str) -> None:
        """`hint` says what to do after the run has ended."""
        self.rank, self.hosts, self.hint = meeting.rank, [s["host"] for s in meeting.statements], hint
        # a connection of its own: an operation that waits in the other one would hold it up
        self._store = dist.PrefixStore(meeting.name, _connect(is_server=False))
        self._seen = [b""] * len(self.hosts)
        self._done = threading.Event()
        # the store may answer nothing either, so that another thread counts
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
        keys, beats = [f"beat/{rank}" for rank in range(len(self.hosts))], 0
        while not self._done.wait(BEAT):
            beats += 1
            try:
                self._store.set(keys[self.rank], str(beats))
                self._seen = [_peek(self._store, key) or b"" for key in keys]
            except dist.DistError:
                pass  # it is counted as silence

    def _count(self) -> None:
        seen, silent = self._seen, [0] * len(self.hosts)
        while not self._done.wait(BEAT):
            silent = [n + 1 if old == new else 0 for old, new, n in zip(seen, self._seen, silent, strict=True)]
            seen = self._seen
            if max(silent) >= SILENT_BEATS:
                place = silent.index(max(silent))
                who = f"process {place} on {self.hosts[place]}"
                # the store shows not even the own beats; the last look at it may have missed one of another process
                self._end(f"torchrun at {_address()}" if silent[self.rank] > SILENT_BEATS // 2 else who)

    def _end(self, who: str) -> None:
        own = f"process {self.rank}: " if self.rank else ""
        said = f"Error: {own}{who} has not answered for {SILENT_BEATS * BEAT:.0f} s; it, or its machine, was stopped"
        # the main thread waits for the other process and cannot be reached; its standard error may be redirected
        print(f"{said}. {self.hint}", file=sys.__stderr__, flush=True)
        os._exit(1)


def _agree_on_round(store: dist.Store, rank: int, size: int, own: str) -> tuple[str, list[str]]:
    """Return the name of the round and the names of its members; rank 0 proposes, the others confirm."""
    end, proposed, name = time.monotonic() + JOIN_TIMEOUT, None, ""
    while time.monotonic() < end:
        if rank == 0:
            come = [_peek(store, f"come/{r}") for r in range(size)]
            if None not in come and come != proposed:
                proposed = come
                store.set("proposal", json.dumps([member.decode() for member in come]))
        members = json.loads(_peek(store, "proposal") or b"[]")
        if len(members) == size and members[rank] == own:
            name = f"round-{hashlib.sha256(''.join(members).encode()).hexdigest()[:16]}"
            store.set(f"{name}/here/{rank}", "")
            if store.check([f"{name}/here/{r}" for r in range(size)]):  # no predecessor confirms any more
                return name, members
        time.sleep(POLL)
    absent = [r for r in range(size) if not store.check([f"{name}/here/{r}" if name else f"come/{r}"])] or [0]
    raise ValueError(
        f"{len(absent)} of {size} processes did not join within {JOIN_TIMEOUT:.0f} s: number "
        f"{', '.join(map(str, absent))}. Look for their last message, and start torchrun on every machine"
    )


def _wait_for_all(store: dist.Store, rank: int, size: int) -> None:
    """Wait until every process is here; rank 0, which may be the store, until every one knows that."""
    for key in ("all", "gone"):
        if store.add(f"{key}/count", 1) == size:
            store.set(key, "")
        if key == "all" or rank == 0:
            store.wait([key], timedelta(seconds=JOIN_TIMEOUT))


def _peek(store: dist.Store, key: str) -> bytes | None:
    """Return a value of the store, or None where there is none: `get` would wait for it."""
    return store.get(key) if store.check([key]) else None


def _connect(is_server: bool) -> dist.Store:
    host, _, port = _address().rpartition(":")
    return dist.TCPStore(
        host,
        int(port),
        is_master=is_server,
        timeout=timedelta(seconds=JOIN_TIMEOUT),
        wait_for_workers=False,
    )


def _has_agent_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', '29500')}"
