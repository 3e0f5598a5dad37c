"""Tensors of the CPU that count as held by a card, to measure how many bytes a card would hold."""

from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn


class OnCard(Tensor):
    """A tensor that counts as held by a card. Results of operations on it count too, until `cpu()` copies them."""

    made: ClassVar[WeakValueDictionary[int, Tensor]] = WeakValueDictionary()  # tensors by id
    peak: ClassVar[int] = 0  # the most bytes that were held at a time

    @classmethod
    def hold(cls, tensor: Tensor) -> Tensor:
        """Return `tensor` as one that counts as held, and measure how many bytes are held now."""
        held = tensor.as_subclass(cls)
        cls.made[id(held)] = held
        with torch._C.DisableTorchFunctionSubclass():
            storages = [tensor.untyped_storage() for tensor in cls.made.values()]
        # Tensors that share their memory count once.
        cls.peak = max(cls.peak, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
        return held

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the CPU, and measure."""
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):
            return result
        return result.as_subclass(Tensor) if function is Tensor.cpu else cls.hold(result)


def put_on_card(model: nn.Module) -> None:
    """Make the parameters and buffers of a model, but not 4-bit weights, count as all that the card holds."""
    OnCard.made.clear()
    OnCard.peak = 0
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not hasattr(tensor, "quant_state"):
                    tensors[name] = OnCard.hold(tensor.detach())
