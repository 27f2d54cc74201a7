"""What the numbers were measured on: processor, caches, instruction set, library versions."""

import os
import platform
import re
from pathlib import Path

import numpy as np
import torch

import tetris


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_bytes() -> dict[str, int]:
    """Sizes of the caches one core sees, as {"L1d": ..., "L2": ..., "L3": ...}; {} if unknown."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind = (index / "type").read_text().strip()
            level = (index / "level").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if kind != "Instruction":
            name = f"L{level}" + ("d" if kind == "Data" else "")
            unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
            sizes[name] = int(size.rstrip("KM")) * unit
    return sizes


def cpu_model() -> str:
    """The processor's name, with family and model where the name alone says little."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model|stepping)\s*: (.*)$", info, re.M))
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def describe() -> dict:
    """Machine and versions, as it goes into every result file."""
    versions = {"tetris": tetris.__version__, "torch": torch.__version__, "numpy": np.__version__}
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
        "isas": tetris._C.isas_supported(),
        "versions": versions,
    }


def sentence(machine: dict) -> str:
    """The description on one line, for the head of a table."""
    caches = ", ".join(f"{k} {_size(v)}" for k, v in machine["caches"].items())
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    return f"{machine['cpu']}, {machine['cores']} cores, {caches}; {versions}"


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"
