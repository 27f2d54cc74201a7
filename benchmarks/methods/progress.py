"""A progress bar with a line on what is going on."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Use as a context manager; where there is no terminal, descriptions become lines of a log."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        text, share = TextColumn("{task.description}"), TextColumn("{task.percentage:.0f}%")
        columns = (text, BarColumn(), share, TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=self.console)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def plan(self, total: int) -> None:
        """How often :meth:`advance` will be called."""
        self._bar.update(self._task, total=total)

    def describe(self, text: str) -> None:
        """What is going on now."""
        self._bar.update(self._task, description=text)
        if not self.console.is_terminal:
            self.console.print(f"  {text}", highlight=False)

    def advance(self, count: int = 1) -> None:
        """Something planned is done."""
        self._bar.advance(self._task, count)
