"""How commands read their arguments: parsers for argparse's ``type=``."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, TypeVar

from ..checks import MAX_BLOCK
from ..machine import check_threads

T = TypeVar("T")

STDOUT = Path("-")


def checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Makes a ValueError's message reach the user, which argparse drops."""

    def checked(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def count(text: str, least: int = 1) -> int:
    """Reads a whole number from ``least`` on, 0 or 1."""
    if not text.isdigit() or int(text) < least:
        raise ValueError(f"expected a number from {least} (got {text!r})")
    return int(text)


def sizes(form: str) -> Callable[[str], tuple[int, ...]]:
    """A parser of sizes with x between, as many as ``form`` has, which messages show: ``HxW``."""
    length = len(form.split("x"))

    def parse(text: str) -> tuple[int, ...]:
        parts = text.lower().split("x")
        if len(parts) != length or not all(p.isdigit() and int(p) >= 1 for p in parts):
            raise ValueError(f"expected {form}, numbers from 1 (got {text!r})")
        return tuple(map(int, parts))

    return parse


def block_shape(text: str) -> tuple[int, int]:
    """Reads ``16x1`` (height along outputs x width along inputs)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and 1 <= int(p) <= MAX_BLOCK for p in parts):
        raise ValueError(f"a block is HEIGHTxWIDTH, each from 1 to {MAX_BLOCK} (got {text!r})")
    return int(parts[0]), int(parts[1])


def number(text: str) -> float:
    """Reads a number from 0, infinity excluded."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"expected a number from 0 (got {text!r})")
    return value


def sparsity_share(text: str) -> float:
    """Reads a percentage, 0 or from 1, since 0.9 is more likely a share than a percentage."""
    percent = number(text)
    if not (percent == 0 or 1 <= percent < 100):
        raise ValueError(f"sparsity is a percentage, 0 or from 1 to below 100 (got {text})")
    return percent / 100


def threads(text: str) -> int:
    """Reads a number of threads, not more than there are cores."""
    return check_threads("threads", count(text))


def thread_counts(text: str) -> list[int]:
    """Reads ``1,2``."""
    parts = text.split(",")
    if not all(part.isdigit() and int(part) >= 1 for part in parts):
        raise ValueError(f"thread counts are numbers from 1, as in 1,2 (got {text!r})")
    return [check_threads("thread counts", int(part)) for part in parts]


def add_json(add: Callable[..., Any], what: str) -> None:
    """Adds ``--json FILE`` to a command, by its ``add_argument``; it means the same in all."""
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"write {what} to this file; -: to standard output, and all text to standard error",
    )


def check_output(option: str, path: Path | None) -> None:
    """Raises OSError unless a file can be written there: before the work, not after it."""
    if path is None or path == STDOUT:
        return
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{option}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{option}: {path} is a folder; name a file in it")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise PermissionError(f"{option}: {path} cannot be written")


def write_output(path: Path, text: str) -> None:
    """Writes to the file, which it names, or for ``-`` to standard output."""
    if path == STDOUT:
        print(text)
    else:
        path.write_text(text + "\n")
        print(f"written: {path}")


def text_stream(path: Path | None) -> TextIO:
    """Where text for people goes, beside an output that goes to ``path``."""
    return sys.stderr if path == STDOUT else sys.stdout
