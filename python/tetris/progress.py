"""Progress bars of what takes more than a few seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

_shown = False  # one of steps() is on the screen


class Advance(Protocol):
    """How a bar learns of the work."""

    def __call__(self, steps: int = 1, *, now: str | None = None) -> None:
        """Say that so many steps are done, and perhaps what comes now."""


def silent(steps: int = 1, *, now: str | None = None) -> None:
    """An :class:`Advance` without a bar."""


def make_bar(*columns: ProgressColumn) -> Progress:
    """A bar that goes away, on standard error: results go to standard output.

    Args:
        columns: What it shows; rich's default if there are none.

    Raises:
        ImportError: there is no rich.
    """
    # Here, not above: on a machine that only computes, the rest of the library does without.
    from rich.console import Console
    from rich.progress import Progress

    # The stream as it is now: torch's words may be kept away from it while the bar is shown.
    return Progress(*columns, transient=True, console=Console(stderr=True, file=sys.stderr))


@contextmanager
def steps(show: bool, name: str, total: int | None) -> Iterator[Advance]:
    """A call that says that one step is done, of so many; it shows a bar if asked to.

    Inside another call of it, or beside one in another thread, there is no second bar, and no other
    bar may be shown meanwhile: rich refuses two, or they spoil each other.

    Args:
        show: Whether there is a bar.
        name: What is written beside it.
        total: How many steps there are; None if nobody knows.
    """
    global _shown
    if not show or _shown:
        yield silent
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with make_bar(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(name, total=total)
        _shown = True
        try:
            yield lambda steps=1, *, now=None: bar.update(task, advance=steps, description=now)
        finally:
            _shown = False


@contextmanager
def counted(
    show: bool, name: str, total: int, advance: Callable[[], object]
) -> Iterator[Callable[[], None]]:
    """The same for who has a function to call after each step besides: ``advance``."""
    with steps(show, name, total) as done:

        def both() -> None:
            done()
            advance()

        yield both
