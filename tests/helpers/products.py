"""Record the matrix products that code computes."""

from torch.utils._python_dispatch import TorchDispatchMode


class Products(TorchDispatchMode):
    """Records the sizes of both factors of each product of the operation `operation`."""

    def __init__(self, operation):
        super().__init__()
        self.operation, self.shapes = operation, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is self.operation:
            self.shapes.add((tuple(args[0].shape), tuple(args[1].shape)))
        return func(*args, **(kwargs or {}))
