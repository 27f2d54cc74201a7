"""What a result was measured on, and with which kernels."""

import hashlib
import re
from pathlib import Path

from tetris.bench import machine

SOURCES = Path(__file__).resolve().parents[1] / "csrc"


def about() -> dict:
    """What goes into every result file about speed."""
    return {"machine": machine.describe(), "kernels": kernels()}


def kernels(sources: Path = SOURCES) -> str:
    """A digest of the CPU kernels' sources beside this file, comments and white space aside.

    It says nothing about what is built: build first, as ``make bench`` does.
    """
    digest = hashlib.sha256()
    for folder in ("core", "cpu"):
        for path in sorted((sources / folder).iterdir()):
            code = re.sub(r"//.*|\s", "", path.read_text())
            digest.update(f"{path.name}\n{code}\n".encode())
    return digest.hexdigest()[:12]


def measured_on(result: dict, *settings: str) -> str:
    """Machine, command and what else the figures depend on; whether kernels have changed since."""
    also = "".join(f", {setting}" for setting in settings)
    since = "" if result.get("kernels") == kernels() else " Kernels have changed since."
    on = machine.sentence(result["machine"])
    return f"Measured on: {on}. Command: `{result['command']}`{also}.{since}"
