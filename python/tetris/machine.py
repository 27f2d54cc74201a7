"""What this machine is: processor, cores, caches."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(where: str, count: int) -> int:
    """A number of threads to compute on; OpenMP ends the process where it is absurd."""
    most = os.cpu_count() or 1
    if not 1 <= count <= most:
        raise ValueError(f"{where} must be from 1 to this machine's {most} cores (got {count})")
    return count


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


def last_level_bytes() -> int:
    """Size of the largest cache; 32 MiB where it is not known."""
    return max(cache_bytes().values(), default=32 << 20)


def cpu_model() -> str:
    """The processor's name, with family and model where the name alone says little."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model|stepping)\s*: (.*)$", info, re.M))
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
