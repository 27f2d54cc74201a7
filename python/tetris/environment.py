"""Environment variables that are of no use as they are set, with what they should be.

What is wrong with ``TETRIS_CPU_ISA`` is no such finding but an error, of the first op.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping

# As parse_config() of csrc/cuda/config.cpp reads it, which a build without CUDA does not have.
_SIZE = r"0*[1-9]\d*"
_UNIT = "(pixels|warps|ctas|slab|stages|splits|strip)"
_PART = rf"{_SIZE}x{_SIZE}|by\s+row|(?!0+\s+splits)\d{{1,9}}\s+{_UNIT}"
_KERNEL = re.compile(rf"\s*(simt|skinny|mma|hopper)(\s+({_PART}))*\s*", re.ASCII)


def _kernel(value: str) -> str:
    if not value or _KERNEL.fullmatch(value):
        return ""
    return "must be simt, skinny, mma or hopper, alone or with tiles as in 'mma 128x256 4 stages'"


def _one_of(*values: str) -> Callable[[str], str]:
    rule = f"must be {' or '.join(values)}"
    return lambda value: "" if value in ("", *values) else rule


def _cache(value: str) -> str:
    file = os.path.exists(value) and not os.path.isdir(value)
    return "must be a folder, or the name of one to be made" if file else ""


def _data(value: str) -> str:
    return "" if not value or os.path.isdir(value) else "must be a folder that exists"


_VARIABLES: Mapping[str, Callable[[str], str]] = {
    "TETRIS_CPU_ISA": lambda value: "",  # the kernels say it
    "TETRIS_CUDA": _one_of("0", "1", "AUTO"),
    "TETRIS_CUDA_KERNEL": _kernel,
    "TETRIS_PRINT_CONFIG": _one_of("0", "1"),
    "TETRIS_CACHE_DIR": _cache,
    "TETRIS_DATA": _data,
    "TETRIS_CMAKE_ARGS": lambda value: "",  # read by setup.py
}
_OF_TESTS = ("TETRIS_TEST_", "TETRIS_EMULATED_")


def problems(environment: Mapping[str, str]) -> tuple[str, ...]:
    """What is wrong with ``TETRIS_*`` variables, a sentence each; empty if nothing is.

    Example:
        >>> tetris.environment.problems({"TETRIS_PRINT_CONFIG": "yes"})
        ("TETRIS_PRINT_CONFIG must be 0 or 1 (got 'yes')",)
    """
    found = []
    for name, value in sorted(environment.items()):
        if not name.startswith("TETRIS_") or name.startswith(_OF_TESTS):
            continue
        check = _VARIABLES.get(name)
        if check is None:
            near = difflib.get_close_matches(name, _VARIABLES, 1, cutoff=0.8)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_VARIABLES)}"
            found.append(f"{name} is no variable that tetris reads; {hint}")
        elif rule := check(value):
            found.append(f"{name} {rule} (got {value!r})")
    return tuple(found)
