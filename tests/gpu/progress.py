"""A pytest plugin for kernels that may hang or take the process with them.

    python tests/gpu/run.py FOLDER -- tests/gpu -k mma

What becomes of each test is in a file at once, so that a run that is stopped has its results, and a
run that is started again goes on behind the test that stopped it. A test that takes longer than
TETRIS_TEST_SECONDS ends the process (a thread that waits for a GPU cannot be interrupted), and so
does a fault on the GPU, after which CUDA refuses every call of the process.
"""

import faulthandler
import os
import sys
from pathlib import Path

import pytest

FOLDER = Path(os.environ["TETRIS_TEST_PROGRESS"])
SECONDS = float(os.environ.get("TETRIS_TEST_SECONDS", "120"))
STARTED, OUTCOMES, FAILURES, HUNG = (
    FOLDER / name for name in ("started.txt", "outcomes.txt", "failures.txt", "hung.txt")
)
LOST = 70  # exit status: the GPU is lost to this process
_hung = HUNG.open("a")  # open for good: it is written to when nothing else works


def write(path: Path, text: str) -> None:
    """Append a line, complete when this returns."""
    with path.open("a") as file:
        file.write(text + "\n")


def lines(path: Path) -> list[str]:
    """Of a file that may not be there yet."""
    return path.read_text().splitlines() if path.exists() else []


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what an earlier process has begun."""
    begun = set(lines(STARTED))
    config.hook.pytest_deselected(items=[i for i in items if i.nodeid in begun])
    items[:] = [i for i in items if i.nodeid not in begun]


def pytest_runtest_logstart(nodeid):
    """The test begins, and with it its time."""
    write(STARTED, nodeid)
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=_hung)


def pytest_runtest_logreport(report):
    """What became of it; a failure in full."""
    if report.when == "call" or report.outcome != "passed":
        write(OUTCOMES, f"{report.outcome} {report.nodeid}")
    if report.failed:
        write(FAILURES, f"\n==== {report.nodeid} ({report.when})\n{report.longreprtext}")


def pytest_runtest_logfinish(nodeid):
    """A fault on the GPU is this test's, whoever would see it."""
    faulthandler.cancel_dump_traceback_later()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        write(OUTCOMES, f"lost {nodeid}")
        write(FAILURES, f"\n==== {nodeid} left the GPU in a state of error:\n{error}")
        pytest.exit(f"the GPU is lost after {nodeid}: {error}", returncode=LOST)
