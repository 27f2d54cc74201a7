"""Everything that needs a GPU, in one go: build, tests, sanitizers, benchmarks, a report.

    make gpu-check PYTHON=python3                 all of it, under ten minutes on 16 cores
    make gpu-check ARGS="--parts tests"           one part, with the build that is there
    make gpu-check ARGS="--seconds 300 --out d"   less time, logs and results to another folder
    make gpu-check ARGS="--archive all.tar.gz"    everything that came out, in one file as well

Nothing is installed and nothing fetched: the interpreter that runs this script has torch with CUDA,
numpy, pybind11, cmake, ninja and pytest (matplotlib for a figure), and nvcc is on PATH. Each part
is a process of its own with a time limit and an exit status of its own, so that one that fails or
hangs leaves the others' results; results are written as they come. Tests run in several processes
at once, one family of kernels each, and go on behind a test that hangs, crashes or loses the GPU
(tests/gpu/run.py). Exit status 1 if a part failed.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck")
# A family's tests are those with its name in theirs, and without one of those before it.
FAMILIES = ("hopper", "mma", "skinny", "simt")
FILES = {
    "conv": ["tests/gpu/test_gpu_conv.py"],
    "rest": ["tests/gpu", "--ignore=tests/gpu/test_gpu_conv.py"],
}
# Seconds of each, most important first; together with build and tests below ten minutes.
BENCHMARKS = {"matmul": 75, "decode": 20, "training": 30, "conv": 30, "bsr": 45, "tuned": 45}


@dataclass
class Part:
    """One process: what it runs, how long it may take, what became of it."""

    name: str
    command: list[str]
    limit: float
    env: dict[str, str] = field(default_factory=dict)
    status: str = "not run"
    seconds: float = 0.0

    def start(self, out: Path) -> None:
        """Start it, with its output in a log."""
        self.log = out / f"{self.name}.log"
        self.began = time.monotonic()
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env={**os.environ, "PATH": programs(), **self.env},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        print(f"-- {self.name}: at most {self.limit:.0f} s, log in {self.log}", flush=True)

    def wait(self, tail: int = 15) -> bool:
        """Wait for its end or its limit, say how it went; whether well."""
        try:
            code = self.process.wait(max(1.0, self.limit - (time.monotonic() - self.began)))
            self.status = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)  # its children, too: a session of its own
            self.process.wait()
            self.status = f"stopped after {self.limit:.0f} s"
        self.seconds = time.monotonic() - self.began
        lines = self.log.read_text(errors="replace").splitlines()
        print(f"-- {self.name}: {self.status}, {self.seconds:.0f} s", flush=True)
        print("\n".join("   " + line for line in lines[-tail:]), flush=True)
        return self.status == "passed"


def programs() -> str:
    """PATH, with what is installed beside the interpreter (cmake, ninja) first."""
    here = str(Path(sys.executable).parent)
    return os.pathsep.join(filter(None, [here, os.environ.get("PATH")]))


def environment() -> dict[str, str]:
    """Where this tree's package is found, and no file that an earlier tuning left."""
    path = os.pathsep.join(filter(None, [str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
    cache = ROOT / "build" / "gpu-check" / "cache"
    return {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TETRIS_CACHE_DIR": str(cache)}


def target() -> str:
    """The GPU's compute capability as a number, 90."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu-check: torch sees no GPU")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def build_commands(out: Path, jobs: int) -> list[Part]:
    """Configure and build for this GPU alone, into the source tree's package."""
    build = ROOT / "build" / "gpu-check"
    configure = [
        "cmake",
        "-G",
        "Ninja",
        "-S",
        str(ROOT),
        "-B",
        str(build),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'python' / 'tetris'}",
        f"-DTETRIS_VERSION={version()}",
        "-DTETRIS_CUDA=1",
        f"-DTETRIS_CUDA_TARGETS={target()}",
        f"-DCMAKE_CUDA_FLAGS=-split-compile={max(1, jobs // 4)}",
    ]
    # Some more than there are cores: the longest, of kernels, shall not begin behind the others.
    compile_ = ["cmake", "--build", str(build), "--target", "_C", "-j", str(jobs + 8)]
    return [Part("configure", configure, 120), Part("build", compile_, 300)]


def version() -> str:
    """The version in pyproject.toml, whose parser Python has from 3.11 on only."""
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        if line.startswith("version = "):
            return line.split('"')[1]
    sys.exit("gpu-check: pyproject.toml names no version")


def test_parts(out: Path, seconds: float) -> list[Part]:
    """The tests by families and files, and beside them a few cases under each sanitizer."""
    parts = []
    families = " or ".join(FAMILIES)

    def add(name: str, which: str, files: list[str], each: int, **more: str) -> None:
        command = [sys.executable, "tests/gpu/run.py", str(out / f"tests-{name}"), "--", *files]
        command += ["-k", which, "-q", "--tb=short", "--durations=5"]
        # The references run on the CPU, in as many processes.
        env = {**environment(), "OMP_NUM_THREADS": "1", "TETRIS_TEST_SECONDS": str(each), **more}
        # None of pytest's plugins is asked for, and some take seconds to load.
        env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        parts.append(Part(f"tests-{name}", command, seconds, env))

    for i, family in enumerate(FAMILIES):
        which = " and not ".join([family, *FAMILIES[:i]])
        for name, files in FILES.items():
            add(f"{family}-{name}", which, files, 30)
    add("other", f"not ({families} or compile)", ["tests/gpu"], 60)
    # Takes long: nothing else shall wait for it, nor it for a pool of processes to start.
    one = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    add("compile", f"compile and not ({families})", ["tests/gpu"], 90, **one)
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        print("-- sanitizers: skipped, there is no compute-sanitizer", flush=True)
        return parts
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "20"]
        command += [sys.executable, "tests/gpu/sanitize.py", name]
        env = {**environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        parts.append(Part(name, command, min(seconds, 120), env))  # benchmarks wait for them
    return parts


def bench_parts(out: Path, seconds: float) -> list[Part]:
    """One process for each kind of measurement."""
    scale = seconds / sum(BENCHMARKS.values())
    parts = []
    for name, share in BENCHMARKS.items():
        limit = share * scale
        (out / f"{name}.json").unlink(missing_ok=True)  # of another run
        command = [sys.executable, "-m", "benchmarks.gpu", "--section", name]
        command += ["--seconds", f"{limit:.0f}", "--out", str(out / f"{name}.json")]
        # The section ends by itself; what hangs is stopped.
        parts.append(Part(f"bench-{name}", command, limit + 25, environment()))
    return parts


def main() -> int:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["build", "tests", "bench"],
        default=["build", "tests", "bench"],
    )
    parser.add_argument("--seconds", type=float, default=560.0, help="for everything")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "build" / "gpu-check" / "out",
        help="logs and raw results",
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="where reports go"
    )
    parser.add_argument("--archive", type=Path, help="one file of all of it, after each part")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.out, args.results = args.out.resolve(), args.results.resolve()
    began, since, done = time.monotonic(), time.time(), []

    def left() -> float:
        return args.seconds - (time.monotonic() - began)

    def finish(part: Part, tail: int = 15) -> bool:
        done.append(part)
        passed = part.wait(tail)
        until_stopped(args.out, part)
        write_summary(args.out, done)
        if args.archive:
            archive(args.archive, args.out, args.results, since)
        return passed

    if "build" in args.parts:
        for part in build_commands(args.out, args.jobs):
            part.start(args.out)
            if not finish(part):
                summary(args.out, done)
                return 1
    check = Part(
        "info", [sys.executable, "-c", "import tetris; print(tetris.info())"], 60, environment()
    )
    check.start(args.out)
    if not finish(check):
        summary(args.out, done)
        return 1
    if "tests" in args.parts:
        share = left() * (0.42 if "bench" in args.parts else 0.95)
        parts = test_parts(args.out, share)
        for part in parts:
            part.start(args.out)
        for part in parts:
            finish(part)
    if "bench" in args.parts:
        # Each part may start late by what the one before overran; the report takes a few seconds.
        for part in bench_parts(args.out, max(30.0, left() - 45)):
            if left() < 25:
                part.status = "no time left"
                done.append(part)
                continue
            part.limit = min(part.limit, left() - 15)
            part.start(args.out)
            if not finish(part) and left() > 60 and not measured(args.out, part):
                # sm_90a's own kernels are the first that these run: without them, then.
                again = Part(part.name + "-mma", part.command, min(part.limit, left() - 15))
                again.env = {**part.env, "TETRIS_CUDA_KERNEL": "mma"}
                again.start(args.out)
                finish(again)
        report = Part(
            "report",
            [sys.executable, "-m", "benchmarks.gpu_report", str(args.out), str(args.results)],
            max(15.0, min(60.0, left())),
            environment(),
        )
        report.start(args.out)
        finish(report, 60)
    summary(args.out, done)
    return 0 if all(part.status == "passed" for part in done) else 1


def archive(path: Path, out: Path, results: Path, since: float) -> None:
    """Logs, raw results and this run's reports in one file, which is whole at every moment."""
    fresh = path.with_name(path.name + ".part")

    def new(file: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return file if file.isdir() or file.mtime >= since - 1 else None

    try:
        with tarfile.open(fresh, "w:gz") as file:
            own = (path.name, fresh.name)
            file.add(out, "out", filter=lambda f: None if f.name.endswith(own) else f)
            if results.exists():
                file.add(results, "results", filter=new)
        fresh.replace(path)
    except OSError as error:  # parts that still run write files, and may remove one
        print(f"-- {path} stays as it was: {error}", flush=True)


def until_stopped(out: Path, part: Part) -> None:
    """What tests had come to that were stopped before they could say so."""
    path = out / part.name / "outcomes.txt"
    if not part.status.startswith("stopped") or not path.exists():
        return
    outcomes = path.read_text().splitlines()
    counts = collections.Counter(line.split(" ", 1)[0] for line in outcomes)
    print("   until then", ", ".join(f"{n} {outcome}" for outcome, n in counts.items()), flush=True)
    bad = [line for line in outcomes if not line.startswith(("passed ", "skipped "))]
    print("\n".join("   " + line for line in bad[:20]), flush=True)


def measured(out: Path, part: Part) -> bool:
    """Whether a benchmark left anything."""
    path = out / f"{part.name.removeprefix('bench-')}.json"
    try:
        return bool(json.loads(path.read_text())["rows"])
    except (OSError, ValueError, KeyError):
        return False


def summary(out: Path, parts: list[Part]) -> None:
    """A table last, and the same as JSON."""
    print("\n== gpu-check ==")
    for part in parts:
        print(f"{part.name:<20} {part.status:<22} {part.seconds:6.0f} s")
    write_summary(out, parts)


def write_summary(out: Path, parts: list[Part]) -> None:
    """What is known so far."""
    table = [{"part": p.name, "status": p.status, "seconds": round(p.seconds, 1)} for p in parts]
    (out / "summary.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
