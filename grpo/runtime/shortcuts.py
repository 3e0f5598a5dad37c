"""Whether a model supports a shortcut: it gives the same log-probabilities as plain passes, or is not supported."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from grpo.runtime.device import is_out_of_memory

# Errors that libraries raise if a model's attention or cache does not support a shortcut.
UNSUPPORTED = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError)
# Parts of messages about tensors on different devices, of CUDA and the CPU, and of MPS.
WRONG_DEVICE_MESSAGES = ("device", "Placeholder storage has not been allocated")


class UnsupportedError(ValueError):
    """A model does not support a shortcut of this project."""


@dataclass(frozen=True)
class Tolerance:
    """How far the log-probabilities of a shortcut may be from those of plain passes, in nats."""

    largest: float = float("inf")  # of the absolute differences
    root_mean_square: float = float("inf")  # of the differences


# In float32, shortcuts that are supported agree within 1e-6 nats.
FLOAT32 = Tolerance(largest=1e-3)
# In less precision, the root mean square tells right shortcuts from wrong ones better than the largest difference.
# Measured with the starter, SmolLM2, Qwen2.5-Coder-0.5B and tiny random models, on prompts with a common beginning
# of 4 to 167 tokens. Wrong means that attention sees a token too many or too few, or that positions are wrong by one.
#                                        root mean square if right     if wrong     largest if right     if wrong
#   all layers compute in bfloat16                  at most 0.137    from 0.143         at most 0.62    from 0.45
#   4-bit layers compute in bfloat16                at most 0.058    from 0.084         at most 0.26    from 0.43
# One wrong case of a tiny random model, which rounds by 0.016, is below the tolerance; the next is at 0.156. The
# tolerances are strict: a model that rounds more than these loses a shortcut, so its run is slower and says why.
SIXTEEN_BITS = Tolerance(root_mean_square=0.15)
FOUR_BITS = Tolerance(root_mean_square=0.075)


def why_refused(shortcut: Callable[[], Tensor], expected: Tensor, tolerance: Tolerance) -> str:
    """Return why a shortcut cannot be used: which error it raises, or how far it is from `expected`; "" if it can."""
    try:
        logprobs = shortcut()
    except Exception as error:
        if not is_unsupported(error):
            raise
        return reason_of(error)
    difference = logprobs.float() - expected.float()
    largest = difference.abs().max().item()
    root_mean_square = difference.square().mean().sqrt().item()
    if not largest < tolerance.largest:  # `not <`, because NaN must be refused too
        return f"log-probabilities differ by {largest:.3g} nats (allowed: {tolerance.largest:g})"
    if not root_mean_square < tolerance.root_mean_square:
        allowed = f"{tolerance.root_mean_square:g}"
        return f"log-probabilities differ by {root_mean_square:.3g} nats, root mean square (allowed: {allowed})"
    return ""


def reason_of(error: Exception) -> str:
    """Return the first line of an error's message, and the error's type if a library raised it."""
    kind = "" if isinstance(error, UnsupportedError) else f"{type(error).__name__}: "
    return f"{kind}{error}".split("\n")[0]


def is_unsupported(error: Exception) -> bool:
    """Return whether `error` means that a model or a device does not support a shortcut.

    It does if the error says so, or if the code of the model raised it, because a library may raise many kinds of
    errors for a shortcut that it does not know. It does not if memory ran out, if tensors are on different devices,
    or if code of this project failed, because then the shortcut has a fault.
    """
    if isinstance(error, (UnsupportedError, NotImplementedError)):
        return True
    if not isinstance(error, UNSUPPORTED) or is_out_of_memory(error):
        return False
    return not is_on_wrong_device(error) and not _is_raised_here(error)


def is_on_wrong_device(error: Exception) -> bool:
    """Return whether `error` says that tensors are on different devices."""
    return any(text in str(error) for text in WRONG_DEVICE_MESSAGES)


def _is_raised_here(error: Exception) -> bool:
    """Return whether code of this project raised `error`, itself or in a call of torch, outside of a model's code."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [name.partition(".")[0] for name in modules if name.startswith(("grpo.", "transformers."))]
    return packages[-1:] == ["grpo"]
