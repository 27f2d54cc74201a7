"""Which CUDA kernel is fastest for a problem, as ``tetris tune`` measured it on this machine.

One file for each kind of GPU, in ``TETRIS_CACHE_DIR``, ``XDG_CACHE_HOME/tetris`` or
``~/.cache/tetris``; for a user without a home in a temporary folder. It holds the version of this
library: kernels change, and with them what is fastest, so the measurements of another version are
ignored, as is a file that cannot be read; both with a warning. Where nothing was measured, the
library's own guess is used.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from . import _C
from .warn import warn

FORMAT = 1

loaded: dict[str, dict[str, Measurement]] = {}
"""What is in force: device name -> problem -> measurement."""


@dataclass(frozen=True)
class Measurement:
    """The fastest kernel for a problem.

    Attributes:
        config: The kernel and its tiles, as ``TETRIS_CUDA_KERNEL`` takes them.
        seconds: What it took.
        guess: What the library would have chosen.
        guess_seconds: What that took.
    """

    config: str
    seconds: float
    guess: str
    guess_seconds: float


def folder() -> Path:
    """Where the files are.

    Warns:
        UserWarning: there is no home directory, once: a temporary folder takes its place.
    """
    if own := os.environ.get("TETRIS_CACHE_DIR"):
        return Path(own)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "tetris"
    try:
        return Path.home() / ".cache" / "tetris"
    except RuntimeError:  # as in a container whose user has no name
        return _homeless()


@functools.cache
def _homeless() -> Path:
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    own = Path(tempfile.gettempdir()) / f"tetris{user}"
    warn(
        f"tetris: this user has no home directory (HOME is not set), so measurements are kept in "
        f"{own}, which may not last; TETRIS_CACHE_DIR names another folder"
    )
    return own


def path_of(device: str) -> Path:
    """The file of a device, by the name that the driver gives it."""
    return folder() / f"cuda-{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-').lower()}.json"


def save(device: str, measured: dict[str, Measurement]) -> Path:
    """Write the measurements of a device, whole or not at all."""
    path = path_of(device)
    text = json.dumps(
        {
            "format": FORMAT,
            "version": _C.version,
            "device": device,
            "measured": {key: asdict(m) for key, m in sorted(measured.items())},
        },
        indent=1,
    )
    return write_whole(path, text)


def write_whole(path: Path, text: str) -> Path:
    """Write a file, whole or not at all; its folder is made.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
    ) as file:
        try:
            file.write(text + "\n")
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path


def make_folder() -> None:
    """Make the folder of the files, before what is to be written there takes minutes.

    Raises:
        OSError: it cannot be made, or not be written.
    """
    own = folder()
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"tetris: the folder {own} cannot be made ({error.strerror}); TETRIS_CACHE_DIR names "
            "another"
        ) from error
    if not os.access(own, os.W_OK):
        raise PermissionError(f"tetris: {own} cannot be written; TETRIS_CACHE_DIR names another")


def read(path: Path) -> tuple[str, dict[str, Measurement]] | None:
    """Device and measurements of a file; None, with a warning, if it is of no use."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        device, version, form = content["device"], content["version"], content["format"]
        if form != FORMAT or version != _C.version:
            warn(
                f"tetris: ignoring {path}, measured by tetris {version} in format {form} "
                f"(this is {_C.version}, format {FORMAT}); run `tetris tune` again"
            )
            return None
        measured = {str(key): Measurement(**m) for key, m in content["measured"].items()}
        if not isinstance(device, str):
            raise TypeError(f"device is {device!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warn(
            f"tetris: ignoring {path}, which is not a file of `tetris tune` "
            f"({type(error).__name__}: {error}); delete it or run `tetris tune` again"
        )
        return None
    return device, measured


def apply(device: str, measured: dict[str, Measurement]) -> None:
    """Put measurements into force in this process."""
    _C.cuda_set_measured(device, {key: m.config for key, m in measured.items()})
    loaded[device] = measured


def load() -> None:
    """Put what was measured on this machine into force; on import, in a build with CUDA kernels."""
    for path in sorted(folder().glob("cuda-*.json")):
        found = read(path)
        if found is None:
            continue
        try:
            apply(*found)
        except ValueError as error:  # a kernel that this build does not know
            warn(f"tetris: ignoring {path}: {error}")
