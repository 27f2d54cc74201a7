"""Warnings that point at the user's line, however deep in the library their reason is found."""

from __future__ import annotations

import os
import sys
import warnings

import torch

# torch's decorators (``torch.no_grad``) and modules stand between the library's functions.
_LIBRARY = tuple(os.path.join(os.path.dirname(f), "") for f in (__file__, str(torch.__file__)))


def warn(message: str) -> None:
    """Warn (UserWarning) at the innermost line outside the library: what the user called.

    ``warnings.warn(skip_file_prefixes=...)`` of Python 3.12, for Python 3.10.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _inside(frame.f_code.co_filename):
        level += not _uncounted(frame.f_code.co_filename)
        frame = frame.f_back
    warnings.warn(message, stacklevel=level)


def _inside(file: str) -> bool:
    return file.startswith(_LIBRARY) or _uncounted(file)


def _uncounted(file: str) -> bool:
    """Frames of an import, which ``stacklevel`` does not count."""
    return "importlib" in file and "_bootstrap" in file
