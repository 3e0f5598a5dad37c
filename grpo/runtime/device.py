"""Choose the device, and set how it computes and how it handles memory."""

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
# Parts of the error messages of MPS, cuBLAS and the CPU when memory runs out.
OOM_MESSAGES = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
FEW_PARAMETERS = 2**25  # With more parameters, freed memory is returned to the system; with fewer, it is kept.


def choose_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is the best available one. Raises ValueError for a missing device."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    if name not in available:
        raise ValueError(f"--device is {name!r}; it must be auto, cuda, mps or cpu")
    if not available[name]:
        raise ValueError(f"--device {name} is not available on this machine; use --device auto")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU on CUDA, else the type of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def set_deterministic(enabled: bool) -> None:
    """If enabled, make CUDA compute the same bits each time, more slowly. Call this before the first use of CUDA."""
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    torch.use_deterministic_algorithms(enabled)


def use_large_pages() -> None:
    """Keep large tensors of the CPU in memory pages of 2 MiB, on Linux. Call this before torch's first tensor.

    With large pages, a step of smollm2 (16 prompts, 8 completions each, 2 cores) takes 18.0 s instead of 19.9 s.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once, at the first tensor


def begin_vector_math() -> None:
    """Compute one cosine, on one thread, before any pass through a model.

    If two threads call MKL's vector functions for the first time at the same moment, one of them may use a version
    of the function with an error of 1.5e-4 (1 of 24 launches on a busy machine, torch 2.13). Then the rotary
    embeddings of the first pass are inexact, and its log-probabilities wrong by 5e-3 nats, so that the model seems
    not to support shared prompts.
    """
    torch.zeros(1).cos()


def keep_freed_memory(parameters: int) -> None:
    """Keep freed memory of the CPU for the next tensors, if the model has at most FEW_PARAMETERS.

    By default, glibc returns freed memory to the system and must request it again page by page, which makes a step of
    the starter 5% slower. On other systems, and with other C libraries, nothing is changed.
    """
    if parameters <= FEW_PARAMETERS and (mallopt := _glibc_function("mallopt")):
        mallopt(M_MMAP_MAX, 0)  # do not map a separate block for a large tensor
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # never return freed memory


def return_freed_memory(parameters: int) -> None:
    """Return freed memory of the CPU to the system, if the model has more than FEW_PARAMETERS.

    The memory that glibc keeps after a step is fragmented and grows: smollm2, with 16 prompts and 8 completions each,
    held 6.6 GiB after 4 steps, and more after each further step. With this call it holds at most 5.7 GiB. The call
    takes 0.04 s. With 8 prompts, the next step takes 0.7 s longer (of 14 s), because it must request the memory
    again.
    """
    if parameters > FEW_PARAMETERS and (malloc_trim := _glibc_function("malloc_trim")):
        malloc_trim(0)


def _glibc_function(name: str) -> Callable[..., int] | None:
    """Return a function of the C library on Linux; None on other systems, or if there is no such function."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def environment(device: torch.device, precision: str, processes: int) -> dict[str, Any]:
    """Return what results depend on besides the settings: device, precision, threads, processes, versions."""
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
    """Return the largest number of bytes that this process has held (on CUDA, in GPU memory); None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # Windows has no such module
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` reports a lack of memory: by its class on CUDA, by its message on other devices."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OOM_MESSAGES)


def empty_cache() -> None:
    """Release the unused memory that torch holds on the accelerator."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
