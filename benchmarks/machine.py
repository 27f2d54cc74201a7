"""What the numbers were measured on; it lies in the package, for ``tetris bench``."""

from tetris.bench.machine import describe, sentence
from tetris.machine import cache_bytes, cores, cpu_model

__all__ = ["cache_bytes", "cores", "cpu_model", "describe", "sentence"]
