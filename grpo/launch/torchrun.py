"""Start a run as one of several processes: `torchrun --nproc-per-node N train_grpo.py`.

torchrun tells each process its place in the environment. The processes meet, compare their settings, open their
connections, lock the folder that they share, and train; what all would print alike is printed by rank 0.
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
from grpo.runtime.ranks import Ranks

# The others wait while rank 0 writes or scores. For one that was stopped they wait less: see `Heartbeat`.
TIMEOUT = timedelta(minutes=30)


def train_together(
    settle: Callable[[], TrainConfig], train: Callable[..., int], fresh: bool, check: bool
) -> NoReturn:
    """Train as one of the processes that torchrun started, and end this process when all are done.

    `settle` returns the settings of this process. `train(config, task, ranks, earlier)` runs the training and returns
    the exit status; `earlier` are the seconds since the launch began, if torchrun has restarted it.
    """
    ranks = ranks_of_environment()
    try:
        with nullcontext() if ranks.is_main else _silenced():
            config, task, meeting = agree(settle, ranks)
            with failures_in_words(config.model), Heartbeat(meeting, RESUME_HINT):
                connect(meeting, ranks, ranks.own_device(choose_device(config.device)))
                earlier = meeting.seconds_before()  # None if this is no restart
                with (
                    nullcontext() if check else claim_shared_folder(config, meeting, ranks, fresh and earlier is None)
                ):
                    meeting.begin()
                    status = train(config, task, ranks, earlier or 0.0)
                ranks.barrier()  # torchrun could not restart one that dies now without one that has ended
    except (ValueError, OSError) as error:
        if ranks.is_main:
            raise
        raise ValueError(f"process {ranks.rank}: {error}") from None
    sys.stdout.flush()
    os._exit(status)


def ranks_of_environment() -> Ranks:
    """Return this process's place, as torchrun wrote it into the environment."""
    return Ranks(
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
        int(os.environ.get("LOCAL_RANK", "0")),
    )


def connect(meeting: Meeting, ranks: Ranks, device: torch.device) -> None:
    """Open the connections between the processes that have met; `device` is this one's own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, timeout=TIMEOUT, store=meeting.round_store, rank=ranks.rank, world_size=ranks.size
    )
    ranks.barrier()  # one that refuses a setting and ends while another still joins would cut it off


@contextmanager
def _silenced() -> Iterator[None]:
    """Suppress what all ranks would print alike: rank 0 prints it."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
