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

M_TRIM_THRESHOLD = -1  # parameters of mallopt, from glibc's malloc.h
M_MMAP_MAX = -4
FEW_PARAMETERS = 2**25  # A model of at most so many keeps freed memory, a larger one returns it.


def choose_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is the best available. Raises ValueError if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    if name not in available:
        raise ValueError(f"--device is {name!r}; it must be auto, cuda, mps or cpu")
    if not available[name]:
        raise ValueError(f"--device {name} is not available on this machine; use --device auto")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the name of the card for CUDA, else the type of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def set_deterministic(enabled: bool) -> None:
    """Make CUDA compute the same bits each time, which is slower. Call this before the first use of CUDA."""
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    torch.use_deterministic_algorithms(enabled)


def use_large_pages() -> None:
    """Hold large tensors of the CPU in pages of 2 MiB, on Linux. Call this before torch's first tensor.

    A step of smollm2, 16 x 8 on 2 cores, takes 18.0 s instead of 19.9.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once, at the first tensor


def begin_vector_math() -> None:
    """Compute one cosine, on one thread, before any pass through a model.

    If two threads make the first call of MKL's vector functions at the same time, one of them may use a version with
    an error of 1.5e-4 (1 of 24 launches on a busy machine, torch 2.13). The rotary embeddings of the first pass are
    then wrong, and its log-probabilities by 5e-3 nats, so that the model seems unable to share prompts.
    """
    torch.zeros(1).cos()


def keep_freed_memory(parameters: int) -> None:
    """Keep freed memory of the CPU for the next tensors, if a model has at most FEW_PARAMETERS.

    By default glibc returns it to the system, which hands it out again page by page: a step of the starter takes 5%
    longer. Other systems and C libraries are left as they are.
    """
    if parameters <= FEW_PARAMETERS and (mallopt := _glibc_function("mallopt")):
        mallopt(M_MMAP_MAX, 0)  # no separate block for a large tensor
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # never return memory


def return_freed_memory(parameters: int) -> None:
    """Return freed memory of the CPU to the system, if a model has more than FEW_PARAMETERS.

    The memory that glibc keeps after a step is fragmented, and grows: smollm2, 16 x 8 without examples, held 6.6 GiB
    after 4 steps and more after each further step. With this call it holds at most 5.7 GiB. The call takes 0.04 s;
    at 8 x 8 the next step takes 0.7 of 14 s longer, because it has to get the memory again.
    """
    if parameters > FEW_PARAMETERS and (malloc_trim := _glibc_function("malloc_trim")):
        malloc_trim(0)


def _glibc_function(name: str) -> Callable[..., int] | None:
    """Return a function of the C library on Linux, or None if there is no such function."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def environment(device: torch.device, precision: str, processes: int) -> dict[str, Any]:
    """Return what a measurement depends on besides the settings: device, precision, threads, processes, versions."""
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
    """Return the most bytes that this process has held, on the card for CUDA; None where that is not measured."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # Windows has no such module
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def empty_cache() -> None:
    """Return unused memory of the accelerator's allocator to the accelerator."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
