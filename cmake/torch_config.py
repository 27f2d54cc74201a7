"""Print what CMake needs to know of the installed torch and pybind11, as one CMake list."""

import pybind11
import torch
from torch.utils import cpp_extension

print(
    ";".join(
        [
            torch.__version__,
            torch.version.cuda or "none",
            str(int(torch.compiled_with_cxx11_abi())),
            cpp_extension.TORCH_LIB_PATH,
            pybind11.get_include(),
            *cpp_extension.include_paths(),
        ]
    )
)
