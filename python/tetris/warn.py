"""Warnings that point at the user's line, however deep in the library their reason is found."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


def warn(message: str) -> None:
    """Warn (UserWarning) at the innermost line outside the library: what the user called.

    ``warnings.warn(skip_file_prefixes=...)`` of Python 3.12, for Python 3.10.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and (_importing(frame) or _inside(frame)):
        level += not _importing(frame)
        frame = frame.f_back
    warnings.warn(message, stacklevel=level)


def _inside(frame: FrameType) -> bool:
    """In the library, or in torch: its decorators and modules stand between, and code it makes."""
    name = frame.f_globals.get("__name__")
    return name is None or name.partition(".")[0] in ("tetris", "torch")


def _importing(frame: FrameType) -> bool:
    """In the machinery of an import, which ``stacklevel`` does not count."""
    file = frame.f_code.co_filename
    return "importlib" in file and "_bootstrap" in file
