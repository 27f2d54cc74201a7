"""What the numbers were measured on: the machine and the versions of libraries."""

import platform
import re

import numpy as np
import torch

from .. import _C
from ..machine import cache_bytes, cores, cpu_model


def describe() -> dict:
    """Machine and versions, as it goes into every result file."""
    versions = {"tetris": _C.version, "torch": torch.__version__, "numpy": np.__version__}
    versions["python"] = platform.python_version()
    build = torch.__config__.show()
    for name, pattern in {
        "MKL": r"Math Kernel Library Version (\S+)",
        "oneDNN": r"MKL-DNN v(\S+)",
    }.items():
        if found := re.search(pattern, build):
            versions[name] = found.group(1)
    try:
        import scipy

        versions["scipy"] = scipy.__version__
    except ImportError:
        pass
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "caches": cache_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "isas": _C.isas_supported(),
        "versions": versions,
    }


def sentence(machine: dict) -> str:
    """The description on one line, for the head of a table."""
    caches = ", ".join(f"{k} {_size(v)}" for k, v in machine["caches"].items())
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    return f"{machine['cpu']}, {machine['cores']} cores, {caches}; {versions}"


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"
