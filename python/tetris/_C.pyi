from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

version: str

def isa_in_use() -> str: ...
def isas_built() -> list[str]: ...
def isas_supported() -> list[str]: ...
def force_isa(name: str) -> None: ...
def last_kernel() -> str: ...
def threads_at_work() -> int: ...
def assume_cache_bytes(l1: int, l2: int) -> None: ...
def fma_peak(seconds: float = 0.2) -> float: ...
def reorder_search(
    saliency: NDArray[np.float32],
    block_rows: int,
    block_cols: int,
    kept: int,
    balanced: bool,
    allow_empty_rows: bool,
    rows: NDArray[np.int32] | None,
    cols: NDArray[np.int32] | None,
    method: int,
    start: int,
    seed: int,
    seconds: float,
    repeats: int,
    sweeps: int,
    threads: int,
    progress: Callable[[float], None] | None,
) -> dict[str, Any]: ...
def reorder_select(
    saliency: NDArray[np.float32],
    block_rows: int,
    block_cols: int,
    kept: int,
    balanced: bool,
    allow_empty_rows: bool,
    rows: NDArray[np.int32],
    cols: NDArray[np.int32],
) -> NDArray[np.bool_]: ...
