"""Runs pytest again and again until every test was begun: one that hangs or crashes costs itself.

    python tests/gpu/run.py FOLDER -- tests/gpu -k mma

FOLDER gets started.txt, outcomes.txt, failures.txt and hung.txt as tests end (progress.py). Exit
status 1 if a test failed, hung or took the process with it, or if there was none.
"""

import collections
import os
import subprocess
import sys
from pathlib import Path

MOST = 12  # processes: by then something is wrong with all of them
FINISHED = (0, 1, 5)  # pytest's own: passed, failed, nothing (left) to run


def read(path: Path) -> list[str]:
    """Lines of a file that may not be there."""
    return path.read_text().splitlines() if path.exists() else []


def run(folder: Path, arguments: list[str]) -> int:
    """Processes until one comes to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.txt"):
        path.unlink()
    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "TETRIS_TEST_PROGRESS": str(folder)}
    command = [sys.executable, "-m", "pytest", "-p", "progress", "-p", "no:cacheprovider"]
    ended = False
    for attempt in range(MOST):
        before = read(folder / "started.txt")
        code = subprocess.run([*command, *arguments], env=env).returncode
        started = read(folder / "started.txt")
        outcomes = read(folder / "outcomes.txt")
        known = {line.split(" ", 1)[1] for line in outcomes}
        # faulthandler ends a process with 1, too, but then the last test came to nothing.
        open_ = [test for test in started[len(before) :] if test not in known]
        if code in FINISHED and not open_:
            ended = True
            break
        why = f"process {attempt + 1} ended with status {code}"
        for test in open_:
            with (folder / "outcomes.txt").open("a") as file:
                file.write(f"stopped {test}\n")
            why += f" in {test}"
        print(f"-- {why}; going on behind it", flush=True)
        if started == before:
            break  # it does not even begin
    return report(folder, ended)


def report(folder: Path, ended: bool) -> int:
    """Counts, and what went wrong."""
    outcomes = [line.split(" ", 1) for line in read(folder / "outcomes.txt")]
    counts = collections.Counter(outcome for outcome, _ in outcomes)
    for outcome, test in outcomes:
        if outcome not in ("passed", "skipped"):
            print(f"{outcome.upper()} {test}")
    if not ended:
        print("not every test was begun")
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "no tests ran")
    bad = counts["failed"] + counts["lost"] + counts["stopped"]
    return 0 if ended and counts["passed"] + counts["skipped"] and not bad else 1


def main() -> int:
    """A folder, two dashes, what pytest takes."""
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        print(__doc__, file=sys.stderr)
        return 2
    return run(Path(sys.argv[1]).resolve(), sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
