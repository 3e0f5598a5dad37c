"""The device, how it computes, and its memory."""

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import numpy
import torch
import transformers

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
FEW_PARAMETERS = 2**25


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the best available. Raises ValueError if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    if name not in available:
        raise ValueError(f"--device is {name!r}; it must be auto, cuda, mps or cpu")
    if not available[name]:
        raise ValueError(f"--device {name} is not available on this machine; use --device auto")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the name of the card on CUDA, else the type of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def set_deterministic(enabled: bool) -> None:
    """Make CUDA compute the same bits each time, which is slower. Call this before CUDA is first used."""
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    torch.use_deterministic_algorithms(enabled)


def use_large_pages() -> None:
    """Hold large tensors of the CPU in pages of 2 MiB, which Linux has. Call this before torch's first tensor.

    A step of smollm2, 16 x 8 on 2 cores, takes 18.0 s instead of 19.9.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read once, at the first tensor


def begin_vector_math() -> None:
    """Compute one cosine, on one thread, before any pass through a model.

    Where two threads make the first call of MKL's vector functions at the same time, one of them may take a version
    that is off by 1.5e-4: in 1 of 24 launches on a busy machine, torch 2.13. The rotary embeddings of the first pass
    are then off, its log-probabilities by 5e-3 nats, and a model seemed to be unable to share its prompts.
    """
    torch.zeros(1).cos()


def keep_freed_memory(parameters: int) -> None:
    """Keep freed memory of the CPU for the next tensors, where a model has few `parameters`.

    By default glibc returns it to the system, which hands it out again page by page: a step of the starter takes 5%
    longer. For a larger model what is kept lies in pieces and grows (smollm2, 8 x 8: 6.7 GiB after 20 steps, instead
    of 5.8 after 10), and `return_freed_memory` returns it. Other systems and C libraries are left as they are.
    """
    if parameters > FEW_PARAMETERS:
        return
    if mallopt := _of_glibc("mallopt"):
        mallopt(M_MMAP_MAX, 0)  # no block of its own for a large tensor
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # never trim


def return_freed_memory(parameters: int) -> None:
    """Return freed memory of the CPU to the system, where a model has more `parameters` than that.

    What glibc keeps between two steps lies in pieces that fit nothing, and grows: smollm2, 16 x 8 without examples,
    held 6.6 GiB after 4 steps and more with each, and holds 5.7 at most with this, which takes 0.04 s a step. To get
    it again takes the next step longer, by 0.7 of 14 s at 8 x 8.
    """
    if parameters > FEW_PARAMETERS and (malloc_trim := _of_glibc("malloc_trim")):
        malloc_trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """Return a function of the C library, if it has it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def environment(device: torch.device, precision: str, processes: int) -> dict[str, Any]:
    """Return what a figure must be compared on: device, precision, threads, processes, versions, platform."""
    return {
        "device": device_name(device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "processes": processes,
    }


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes this process has held, on the card for CUDA; None if the system does not count."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def empty_cache() -> None:
    """Return memory that the accelerator's allocator holds but does not use."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
