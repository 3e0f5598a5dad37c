"""A pretended device, for tests: its tensors say "lazy:0" and keep their numbers in the memory of the CPU.

An operation on it fails where the same operation fails on CUDA or MPS: if its operands are on two devices, if a
tensor was made on the wrong device, if a tensor is read without a transfer, and, as on MPS, if a tensor is float64.
`reads` counts how often the host waits for a value of the device, by file and line of the code in grpo/ that asks.

The numbers are the CPU's. So a test on this device shows nothing about kernels, rounding, memory, speed, streams,
graphs, or more than one device.

torch knows the device type "lazy" without a registration, and runs its backward passes in the thread that called
`backward`. For a type that is registered by a test, autograd starts a thread, after which no test could fork.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from grpo.config import TrainConfig
from grpo.runtime import device as devices

NAME = "lazy"  # the type of device that --device and TRAITS know in the block
ROOT = Path(__file__).parents[2]
PRODUCT = str(ROOT / "grpo")

aten = torch.ops.aten
# The host waits for the result of these operations, or for its size.
READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
}
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}  # a mask as an index is read


class OnDevice(Tensor):
    """A tensor of the pretended device, which holds a tensor of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        x = Tensor._make_wrapper_subclass(cls, held.size(), held.stride(), dtype=held.dtype, device=f"{NAME}:0")
        x.held = held
        return x

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PretendedDevice.current.run(function, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        self.held = value.detach().held
        Tensor.data.__set__(self, value)

    def tolist(self) -> list[Any]:
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage of the held tensor, which safetensors compares to find tied weights."""
        return self.held.untyped_storage()

    def storage(self) -> Any:
        return self.held.storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = OnDevice(self.held.detach().clone())
        is_parameter = isinstance(self, torch.nn.Parameter)
        memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Say that this is a wrapper: then Module.to swaps the weights, and tied weights stay tied."""
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> "OnDevice":
        return OnDevice(inner["held"])


class DeviceModule:
    """Functions of the device that torch looks up, as it looks up torch.cuda."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]


class PretendedDevice(TorchDispatchMode):
    """Run the operations of the device on the held tensors, check their operands, and count reads and operations."""

    current: "PretendedDevice"

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device(NAME)
        self.reads: Counter[str] = Counter()
        self.operations = 0
        self.before_operation: Callable[[int], None] = lambda number: None  # called with the number of operations

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(function, args, kwargs or {})

    def run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operation. Raises RuntimeError if its operands are on two devices."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if isinstance(x, OnDevice)]
        asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if not on_device and asked != NAME:
            return function(*args, **kwargs)
        self.operations += 1
        self.before_operation(self.operations)
        if on_device and function not in COPIES:
            _check_operands(function, args, tensors)
        to_cpu = function is aten._to_copy.default and asked == "cpu"
        to_cpu |= function is aten.copy_.default and not isinstance(args[0], OnDevice)
        has_mask = function in INDEXED and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1])
        if to_cpu or has_mask or function in READS:
            self.reads[_caller()] += 1
        if asked == NAME:
            kwargs = {**kwargs, "device": "cpu"}
        held_args, held_kwargs = tree_map_only(OnDevice, lambda x: x.held, (args, kwargs))
        result = function(*held_args, **held_kwargs)
        if to_cpu:
            return args[0] if function is aten.copy_.default else result
        known = {id(x.held): x for x in on_device}  # an operation in place returns its operand
        return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else _on_device(function, x), result)


def _check_operands(function: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise RuntimeError if an operation on the device has operands of the CPU that CUDA does not accept either."""
    if function is aten.fill_.Tensor:  # takes a scalar of any device
        return
    if function in INDEXED:  # indices may be on the CPU, and so may a single value
        others = [x for x in (args[0], *args[2:3]) if isinstance(x, Tensor) and x.dim()]
    else:  # a number held as a tensor of the CPU is accepted as an operand of pointwise operations
        others = [x for x in tensors if x.dim() or torch.Tag.pointwise not in function.tags]
        is_in_place = function._schema.name.endswith("_")  # a tensor of the CPU cannot hold a result of the device
        others += tensors[:1] if is_in_place else []
    if not all(isinstance(x, OnDevice) for x in others):
        raise RuntimeError(f"Expected all tensors of {function} to be on the same device, but found {NAME}:0 and cpu")


def _on_device(function: Any, held: Tensor) -> OnDevice:
    if held.dtype == torch.float64:
        raise TypeError(f"{function}: a tensor of the pretended device cannot be float64")
    return OnDevice(held)


def _caller() -> str:
    """Return the file and the line of the innermost code of grpo/ that is running."""
    frame = sys._getframe(2)
    while frame and not frame.f_code.co_filename.startswith(PRODUCT):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}" if frame else "?"


@contextmanager
def pretended_device(**traits: Any) -> Iterator[PretendedDevice]:
    """Make the device NAME usable in the block, with these changes to its row of TRAITS.

    Skip the test if this version of torch lacks what the device needs.
    """
    if not hasattr(torch._C, "_set_only_lift_cpu_tensors"):
        pytest.skip("this version of torch cannot make a tensor of data on a device that is defined in Python")
    row = replace(devices.TRAITS["cpu"], is_queued=True, has_float64=False, **traits)
    setting = next(field for field in fields(TrainConfig) if field.name == "device")
    metadata = {**setting.metadata, "choices": (*setting.metadata["choices"], NAME)}
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=...) goes through the mode
    try:
        with (
            mock.patch.dict(devices.TRAITS, {NAME: row}),
            mock.patch.object(setting, "metadata", metadata),
            mock.patch.object(torch, NAME, DeviceModule, create=True),
            PretendedDevice() as PretendedDevice.current,
        ):
            yield PretendedDevice.current
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
