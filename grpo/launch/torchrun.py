"""Start a run as one of several processes: `torchrun --nproc-per-node N train_grpo.py`.

The environment tells each process its rank. The processes meet, compare their settings, connect to each other, lock
the folder that they share, and train. Only rank 0 prints.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from grpo.config import TrainConfig
from grpo.launch.agreement import agree, claim_shared_folder
from grpo.launch.rendezvous import Heartbeat, Meeting
from grpo.runtime.device import choose_device
from grpo.runtime.failures import RESUME_HINT, failures_in_words
from grpo.runtime.ranks import ConnectedRanks, Ranks

# The other ranks wait at most this long while rank 0 writes or scores. If a process is suspended, `Heartbeat` ends
# the run sooner.
TIMEOUT = timedelta(minutes=30)


def train_together(
    settle: Callable[[], TrainConfig], train: Callable[..., int], fresh: bool, check: bool
) -> NoReturn:
    """Train as one of the processes that torchrun started, and end this process when all are done.

    `settle` returns the settings of this process. `train(config, task, ranks, earlier)` runs the training and returns
    the exit status. `earlier` is 0, or after a restart the seconds since the launch first began to train.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = (ConnectedRanks if size > 1 else Ranks)(
        rank=int(os.environ.get("RANK", "0")), size=size, local_rank=int(os.environ.get("LOCAL_RANK", "0"))
    )
    try:
        with nullcontext() if ranks.is_main else _silenced():
            config, task, meeting = agree(settle, ranks)
            with failures_in_words(config.model), Heartbeat(meeting, RESUME_HINT):
                connect(meeting, ranks, ranks.own_device(choose_device(config.device)))
                earlier = meeting.seconds_before()
                fresh = fresh and earlier is None  # a restart continues the run
                with nullcontext() if check else claim_shared_folder(config, meeting, ranks, fresh):
                    meeting.begin()
                    status = train(config, task, ranks, earlier or 0.0)
                ranks.barrier()  # torchrun cannot restart all processes if one fails after another has ended
    except (ValueError, OSError) as error:
        if ranks.is_main:
            raise
        raise ValueError(f"process {ranks.rank}: {error}") from None
    sys.stdout.flush()
    os._exit(status)


def connect(meeting: Meeting, ranks: Ranks, device: torch.device) -> None:
    """Connect the processes that have met; `device` is the device of this process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.PrefixStore(meeting.round_name, meeting.store)
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=ranks.rank, world_size=ranks.size)
    ranks.barrier()  # a process that fails later must not break the connection of one that still joins


@contextmanager
def _silenced() -> Iterator[None]:
    """Suppress everything that this process prints."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
