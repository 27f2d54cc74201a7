"""Progress bars of what takes more than a few seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def steps(show: bool, name: str, total: int) -> Iterator[Callable[[], None]]:
    """A call that says that one step is done, of so many; it shows a bar if asked to."""
    if not show:
        yield lambda: None
        return
    # Here, not above: on a machine that only computes, the rest of the library does without.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        transient=True,
        console=Console(stderr=True),  # results go to standard output
    ) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.update(task, advance=1)
