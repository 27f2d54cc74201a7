"""Print what CMake needs to know of the installed torch and pybind11, as one CMake list."""

import ctypes
from pathlib import Path

import pybind11
import torch
from torch.utils import cpp_extension


def brings_gomp() -> bool:
    """Whether torch's own libraries resolve what GCC's -fopenmp calls."""
    try:
        library = ctypes.CDLL(str(Path(cpp_extension.TORCH_LIB_PATH) / "libtorch_cpu.so"))
    except OSError:  # another platform's name
        return False
    return hasattr(library, "GOMP_parallel")


print(
    ";".join(
        [
            torch.__version__,
            torch.version.cuda or "none",
            str(int(torch.compiled_with_cxx11_abi())),
            cpp_extension.TORCH_LIB_PATH,
            pybind11.get_include(),
            "gomp" if brings_gomp() else "other",
            *cpp_extension.include_paths(),
        ]
    )
)
