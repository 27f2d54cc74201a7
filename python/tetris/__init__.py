"""Reordered block-sparse GEMM for torch: pruned networks that are actually faster."""

import torch  # noqa: F401  (its libraries must be loaded before _C)

from . import _C
from . import ops as ops

__version__: str = _C.version
