"""What a sparse layer shows as its ``weight``, for models that ask for its type in forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ABSENT = (
    "a sparse layer has no dense weight; layer.to_dense().weight makes one, layer.values are the "
    "stored ones"
)

_ATTRIBUTES = ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_cpu", "is_meta")
_READS = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES]
    + [Tensor.dim, Tensor.size, Tensor.numel, Tensor.element_size]
    + [Tensor.is_floating_point, Tensor.is_complex]
    + [torch.numel, torch.is_floating_point, torch.is_complex]
)


class AbsentWeight(Tensor):
    """A tensor with a type, a device and a shape, and nothing else: no numbers, no gradient.

    Raises:
        RuntimeError: anything else is asked of it.
    """

    @staticmethod
    def like(values: Tensor, shape: tuple[int, ...]) -> AbsentWeight:
        """One of a shape, in the type and on the device of the values."""
        if torch.compiler.is_dynamo_compiling():  # which cannot make the other one
            empty = torch.empty((), dtype=values.dtype, device=values.device)
            return empty.expand(shape).as_subclass(AbsentWeight)
        return _Wrapper._make_wrapper_subclass(
            _Wrapper, shape, dtype=values.dtype, device=values.device
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer what is known."""
        if func in _READS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(ABSENT)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"AbsentWeight({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __format__(self, _: str) -> str:
        return repr(self)


class _Wrapper(AbsentWeight):
    """One without storage, which ``FakeTensorMode`` leaves alone too."""

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        """Whatever gets past ``__torch_function__``."""
        raise RuntimeError(ABSENT)
