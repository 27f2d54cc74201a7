"""The problems and their dense rivals; they lie in the package, for ``tetris bench``."""

from tetris.bench.layers import (
    Shape,
    SparseLayer,
    dense_candidates,
    dense_steps,
    frozen,
    parse_block,
    sparse_candidate,
)

__all__ = [
    "Shape",
    "SparseLayer",
    "dense_candidates",
    "dense_steps",
    "frozen",
    "parse_block",
    "sparse_candidate",
]
