"""What a result was measured on, and with which kernels."""

import hashlib
import re
from pathlib import Path

from tetris.bench import machine

ROOT = Path(__file__).resolve().parents[1]
TIMED = ("csrc/core/*", "csrc/cpu/*", "csrc/ops/*", "cmake/isa.cmake")
CONVOLUTIONS = ("conv", "line_kernels")  # how names of files begin that other products do not run


def about(convolutions: bool = True) -> dict:
    """What goes into every result file about speed; whether it timed convolutions."""
    return {"machine": machine.describe(), "kernels": kernels(convolutions)}


def kernels(convolutions: bool = True, root: Path = ROOT) -> str:
    """A digest of what a call on the CPU runs through, comments and white space aside.

    Of the sources beside this file, whatever is built: build first, as ``make bench`` does.
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in TIMED for path in root.glob(pattern)):
        if "cuda" not in path.name and (convolutions or not path.name.startswith(CONVOLUTIONS)):
            code = re.sub(r"//.*|\s", "", path.read_text())
            digest.update(f"{path.name}\n{code}\n".encode())
    return digest.hexdigest()[:12]


def measured_on(result: dict, *settings: str) -> str:
    """Machine, command and what else the figures depend on; whether kernels have changed since."""
    also = "".join(f", {setting}" for setting in settings)
    today = kernels(), kernels(convolutions=False)
    since = "" if result.get("kernels") in today else " Kernels have changed since."
    on = machine.sentence(result["machine"])
    return f"Measured on: {on}. Command: `{result['command']}`{also}.{since}"
