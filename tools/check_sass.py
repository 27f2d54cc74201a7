"""Show that each CUDA kernel became the instructions it was written for, and spills no register.

    python tools/check_sass.py $(find build -path '*cuda*' -name '*.cu.o')

Five rules, read off the machine code of each kernel, for each GPU it was compiled for:

1. A kernel of a file named in NEEDS has those instructions: matrix products on tensor cores, fed by
   asynchronous copies. A compiler that finds another way to the same result leaves a correct and
   slow kernel, which no test notices. Each pattern of NEEDS is some kernel's.
2. No kernel stores to local memory (STL) or loads from it (LDL): that is what spilled registers and
   arrays with a run-time index become.
3. Each file has code for a GPU, and at least one kernel.
4. wgmma follow each other without waiting: ptxas serializes those whose accumulators it thinks are
   touched in between, with a fence before each and a wait behind it.
5. Kernels whose warpgroups hand each other registers (USETMAXREG) start with as many as their
   counts add up to (START_REGISTERS): with fewer, those who ask for more wait for ever.

Needs cuobjdump, of the CUDA toolkit or of the packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm. Exit status 1: a rule is broken; 2: no cuobjdump.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# File name -> (kernels, by a pattern in their mangled names, what each must have).
NEEDS = {
    # Across k, TF32 has no ldmatrix: lanes read single elements.
    "mma_product": [("kernel(?!If)", {"HMMA", "LDGSTS", "LDSM"}), ("kernelIf", {"HMMA", "LDGSTS"})],
    "mma_sampled": [("kernel(?!If)", {"HMMA", "LDGSTS", "LDSM"}), ("kernelIf", {"HMMA", "LDGSTS"})],
    "hopper": [("hopper.*product", {"HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG"})],
}
LOCAL = {"STL", "LDL"}
START_REGISTERS = 168  # csrc/cuda/hopper.cuh: 56 of the producer + 2 * 224 of the consumers, thirds
ARCH = re.compile(r"^arch = (sm_\w+)$")
USAGE = re.compile(r"^\s*Function (\S+):\n\s*REG:(\d+)", re.MULTILINE)
FUNCTION = re.compile(r"^\s+Function : (\S+)$")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)")

Kernels = dict[tuple[str, str], collections.Counter]


def find_cuobjdump() -> str | None:
    """On PATH, in the toolkit, or in a Python package."""
    places = [
        shutil.which("cuobjdump"),
        "/usr/local/cuda/bin/cuobjdump",
        *map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump")),
    ]
    return next((p for p in places if p and Path(p).exists()), None)


def ask(cuobjdump: str, what: str, path: Path) -> str:
    """What cuobjdump prints of an object: ``-sass``, its machine code, or ``-res-usage``."""
    # cuobjdump finds nvdisasm on PATH; the packages have both in one folder.
    folder = str(Path(cuobjdump).resolve().parent)
    env = {**os.environ, "PATH": folder + os.pathsep + os.environ.get("PATH", "")}
    return subprocess.run(
        [cuobjdump, what, str(path)], capture_output=True, text=True, check=True, env=env
    ).stdout


def parse(listing: str) -> Kernels:
    """How often each kernel, by target and name, has each instruction."""
    kernels: Kernels = {}
    arch = name = ""
    for line in listing.splitlines():
        if match := INSTRUCTION.match(line):
            kernels[arch, name][match[1]] += 1
        elif match := FUNCTION.match(line):
            name = match[1]
            kernels[arch, name] = collections.Counter()
        elif match := ARCH.match(line):
            arch = match[1]
    return kernels


def parse_usage(usage: str) -> dict[str, int]:
    """With how many registers each kernel starts."""
    return {name: int(count) for name, count in USAGE.findall(usage)}


def check(stem: str, kernels: Kernels, registers: dict[str, int]) -> list[str]:
    """The broken rules of one file; ``registers`` with which each of its kernels starts."""
    if not kernels:
        return [f"{stem}: no kernel found"]
    errors = [
        f"{stem}: no kernel is named like '{pattern}'"
        for pattern, _ in NEEDS.get(stem, [])
        if not any(re.search(pattern, name) for _, name in kernels)
    ]
    for (arch, name), seen in kernels.items():
        local = {i: seen[i] for i in sorted(LOCAL) if seen[i]}
        if local:
            counts = ", ".join(f"{count} {i}" for i, count in local.items())
            errors.append(f"{stem} ({arch}): {name} uses local memory: {counts}")
        if seen["HGMMA"] and seen["HGMMA"] <= seen["WARPGROUP"]:
            errors.append(
                f"{stem} ({arch}): {name} serializes its wgmma: {seen['HGMMA']} among "
                f"{seen['WARPGROUP']} fences and waits"
            )
        if seen["USETMAXREG"] and registers.get(name) != START_REGISTERS:
            errors.append(
                f"{stem} ({arch}): {name} hands on registers and starts with "
                f"{registers.get(name)}, not {START_REGISTERS}"
            )
        for pattern, wanted in NEEDS.get(stem, []):
            missing = sorted(wanted - set(seen))
            if re.search(pattern, name) and missing:
                errors.append(f"{stem} ({arch}): {name} has no {' and no '.join(missing)}")
    return errors


def main() -> int:
    """Check the objects named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    files = parser.parse_args().files
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print("check_sass: no cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
        return 2
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        listings = list(pool.map(lambda path: ask(cuobjdump, "-sass", path), files))
        usages = list(pool.map(lambda path: ask(cuobjdump, "-res-usage", path), files))
    errors = []
    for path, listing, usage in zip(files, listings, usages, strict=True):
        stem, kernels = path.name.split(".")[0], parse(listing)
        found = check(stem, kernels, parse_usage(usage))
        errors += found
        matrix = sum(seen["HMMA"] + seen["HGMMA"] for seen in kernels.values())
        targets = ", ".join(sorted({arch for arch, _ in kernels}))
        print(
            f"{stem}: {len(kernels)} kernels for {targets or 'no GPU'}, {matrix} matrix "
            f"instructions, {len(found)} errors"
        )
    for error in errors[:50]:
        print(error)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
