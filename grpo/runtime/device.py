"""Choose the device, and set how it computes and how it handles memory."""

import ctypes
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any

import numpy
import torch
import transformers

from grpo.runtime.console import say, suppress_warnings

M_TRIM_THRESHOLD = -1  # parameters of mallopt, from glibc's malloc.h
M_MMAP_MAX = -4
# Parts of the error messages of MPS, cuBLAS and the CPU when memory runs out.
OOM_MESSAGES = ("out of memory", "Invalid buffer size", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
ARCHITECTURE = re.compile("(sm|compute)_([0-9]+)([0-9])([af]?)")  # in torch's list; its names for ROCm differ
FEW_PARAMETERS = 2**25  # With more parameters, freed memory is returned to the system; with fewer, it is kept.
# On a GPU, sharing the common beginning of prompts while decoding adds 12 operations to each layer, which take about
# 60 µs to launch. In this time a GPU reads about 60 MB: keys and values, at 1 KiB for each token of a small model's
# layer, of this many tokens. This is a calculation; it has not been measured on a GPU.
MANY_COPIED_TOKENS = 2**16


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What a type of device can do, and torch's functions for it."""

    is_available: Callable[[], bool]
    is_reference: bool  # taken to be right: a run compares the results of other devices with its results
    is_queued: bool  # operations run later, in order, so reading a value makes the host wait for all of them
    has_float64: bool  # tensors may be float64
    has_graphs: bool  # torch can record the operations of a pass as a CUDA graph, and replay them
    has_fused_norm: bool  # torch.nn.functional.rms_norm is a single operation
    copied_tokens: int  # while decoding, share the common beginning of prompts if its copies had this many tokens
    count: Callable[[], int] = lambda: 1  # how many devices processes can use, one each
    refusal: Callable[[torch.device], str] = lambda device: ""  # why torch cannot use the device; "" if it can
    multiplies_bfloat16: Callable[[torch.device], bool]  # in hardware, so that passes in bfloat16 are faster
    name: Callable[[torch.device], str]
    synchronize: Callable[[torch.device], None]  # wait until all queued operations have run
    empty_cache: Callable[[], None]  # release the unused memory that torch holds on the device
    peak_memory: Callable[[torch.device], int | None]  # most bytes held by this process so far; None: not known
    # Called after each step with the model's number of parameters: release memory that would grow from step to step.
    end_step: Callable[[int], None] = lambda parameters: None
    has_bfloat16: bool = True  # passes in bfloat16 give right results
    max_inner: int | None = None  # a matrix product that sums over more numbers than this may be wrong
    least_torch: tuple[int, int] | None = None  # the oldest version of torch that computes right on the device


def _peak_memory_of_process(device: torch.device) -> int | None:
    try:
        import resource  # Windows has no such module
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def cpu_multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions that multiply bfloat16: AMX or AVX512-BF16."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def runs_code(entry: str, capability: tuple[int, int]) -> bool:
    """Return whether a card of a CUDA capability runs the code of an architecture, such as "sm_86" or "compute_90".

    Binary code (sm) runs on the same major version, from its minor version on. PTX (compute) is compiled on the card,
    and runs from its version on. With the suffix "a", both run on their own version only; with "f", both run like
    binary code. Source: CUDA C++ Programming Guide, "Binary Compatibility" and "Feature Set Compiler Targets".
    """
    kind, major, minor, suffix = ARCHITECTURE.fullmatch(entry).groups()
    built_for = (int(major), int(minor))
    if suffix == "a":
        return capability == built_for
    is_same_family = capability[0] == built_for[0] or (kind == "compute" and not suffix)
    return is_same_family and capability >= built_for


def missing_code(device: torch.device) -> str:
    """Return a sentence that says that torch has no code for a CUDA card, and what to do; "" if torch has code."""
    entries = [entry for entry in torch.cuda.get_arch_list() if ARCHITECTURE.fullmatch(entry)]
    with suppress_warnings():  # torch warns of such a card in several lines
        capability = torch.cuda.get_device_capability(device)
        if not entries or any(runs_code(entry, capability) for entry in entries):
            return ""
        name = torch.cuda.get_device_name(device)
    return (
        f"{name} has CUDA capability {capability[0]}.{capability[1]}, but this build of torch has code for "
        f"{', '.join(entries)} only; install a build for this card (https://pytorch.org/get-started/locally)"
    )


def usable_cards() -> int:
    """Return how many CUDA cards, counted from the first, torch has code for. Process i of a machine uses card i."""
    cards = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return len(list(takewhile(lambda card: not missing_code(card), cards)))


# By the type of the device, in the order in which "auto" tries them.
TRAITS = {
    "cuda": Traits(
        is_available=torch.cuda.is_available,
        is_reference=False,
        is_queued=True,
        has_float64=True,
        has_graphs=True,
        has_fused_norm=True,
        copied_tokens=MANY_COPIED_TOKENS,
        count=usable_cards,
        refusal=missing_code,
        # torch.cuda.is_bf16_supported() is also true where bfloat16 is only emulated
        multiplies_bfloat16=lambda device: torch.cuda.get_device_capability(device)[0] >= 8,
        name=torch.cuda.get_device_name,
        synchronize=torch.cuda.synchronize,
        empty_cache=torch.cuda.empty_cache,
        peak_memory=torch.cuda.max_memory_allocated,
    ),
    "mps": Traits(
        is_available=torch.backends.mps.is_available,
        is_reference=False,
        is_queued=True,
        has_float64=False,
        has_graphs=False,
        has_fused_norm=True,
        copied_tokens=MANY_COPIED_TOKENS,
        multiplies_bfloat16=lambda device: False,
        name=lambda device: device.type,
        synchronize=lambda device: torch.mps.synchronize(),
        empty_cache=torch.mps.empty_cache,
        peak_memory=_peak_memory_of_process,
        # Up to torch 2.13, a Metal graph is kept for each new shape (pytorch's issue #181213).
        end_step=lambda parameters: torch.mps.empty_cache(),
        has_bfloat16=False,  # pytorch's issue #195910: in 16 bits, causal attention sees up to 3 later tokens
        max_inner=32_766,  # see grpo/scoring/products.py
        least_torch=(2, 14),
    ),
    "cpu": Traits(
        is_available=lambda: True,
        is_reference=True,
        is_queued=False,
        has_float64=True,
        has_graphs=False,
        has_fused_norm=False,
        copied_tokens=0,
        multiplies_bfloat16=lambda device: cpu_multiplies_bfloat16(),
        name=lambda device: device.type,
        synchronize=torch.cpu.synchronize,  # which does nothing
        empty_cache=lambda: None,
        peak_memory=_peak_memory_of_process,
        end_step=lambda parameters: return_freed_memory(parameters),  # defined below
    ),
}


def choose_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is the best available one that torch can use.

    Raises ValueError for a missing device, and for one that torch cannot use.
    """
    if name in ("auto", "cuda") and TRAITS["cuda"].is_available():
        use_expandable_segments()
    if name == "auto":
        available = [kind for kind, traits in TRAITS.items() if traits.is_available()]
        refusals = [TRAITS[kind].refusal(torch.device(kind)) for kind in available]
        name = available[refusals.index("")]
        for refusal in refusals[: refusals.index("")]:
            say_once(f"{refusal}. Until then, this command runs on {name} instead.")
    if name not in TRAITS:
        raise ValueError(f"--device is {name!r}; it must be auto, {', '.join(TRAITS)}")
    if not TRAITS[name].is_available():
        raise ValueError(f"--device {name} is not available on this machine; use --device auto")
    check_usable(torch.device(name))
    return torch.device(name)


def use_expandable_segments() -> None:
    """Let torch extend its blocks of GPU memory, on Linux. Call this before the first use of CUDA.

    The tensors of a step have other sizes in each step. Without this, memory is divided into blocks of past sizes,
    and can run out although enough of it is free. A value that the user has set is kept. On Windows torch does not
    support it, and in WSL the first allocation may fail (pytorch #192330).
    """
    is_wsl = "microsoft" in platform.release().lower()
    if sys.platform == "linux" and not is_wsl and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # torch reads it once, with CUDA


def check_usable(device: torch.device) -> None:
    """Raise ValueError if torch cannot use an available device."""
    if refusal := TRAITS[device.type].refusal(device):
        raise ValueError(f"{refusal}, or give --device cpu")


@cache
def say_once(text: str) -> None:
    """Print a text on standard error, unless this process has already printed it."""
    say(text, sys.stderr)


def processes_for(device: torch.device, prompts: int) -> int:
    """Return how many processes, with a device each, can share `prompts` prompts a step evenly on this machine."""
    return max(n for n in range(1, max(1, TRAITS[device.type].count()) + 1) if prompts % n == 0)


def has_old_torch(device: torch.device) -> bool:
    """Return whether this version of torch is known to compute some results wrongly on `device`."""
    least = TRAITS[device.type].least_torch
    return least is not None and torch.__version__ < least


def least_torch(device: torch.device) -> str:
    """Return the oldest version of torch that computes right on `device`, such as "2.14"."""
    return ".".join(map(str, TRAITS[device.type].least_torch or ()))


def device_notes(device: torch.device) -> list[str]:
    """Return what a user should know before computing on `device`, one line each."""
    notes = []
    if has_old_torch(device):
        notes.append(
            f"Please install torch {least_torch(device)} or newer: torch {torch.__version__} computes some large "
            f"matrix products wrongly on {device.type}, without an error."
        )
    return notes


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
        "device": TRAITS[device.type].name(device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "processes": processes,
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` reports a lack of memory: by its class on CUDA, by its message on other devices."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OOM_MESSAGES)


def empty_caches() -> None:
    """Release the unused memory that torch holds on devices."""
    for traits in TRAITS.values():
        if traits.is_available():
            traits.empty_cache()
