"""Which torch the extension was built with: beside another one it does not load."""

from __future__ import annotations

from pathlib import Path

import torch


def check(error: ImportError) -> None:
    """Say why the extension did not load, if that is another torch.

    Args:
        error: What importing it raised. The version is in a file beside it, written by setup.py,
            since nothing can be asked of an extension that does not load.

    Raises:
        ImportError: it was built with another torch.
    """
    note = Path(error.path or __file__).with_suffix(".torch")
    built = note.read_text().strip() if note.is_file() else torch.__version__
    if built != torch.__version__:
        raise ImportError(
            f"tetris was built with torch {built} and does not load beside torch "
            f"{torch.__version__}. Build it again, in its sources: make clean build, or pip "
            "install --no-build-isolation --force-reinstall --no-deps . (-e . if it was editable)",
            name=error.name,
            path=error.path,
        ) from error
