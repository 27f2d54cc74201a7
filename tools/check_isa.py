"""Show that a build runs on CPUs older than the one it was made on.

    python tools/check_isa.py python/tetris/_C*.so $(find build -name '*.o')

Two rules, read off the machine code itself:

1. An instruction that needs AVX-512 (EVEX prefix or mask registers) sits in a function of the
   avx512 namespace, and one that needs AVX (VEX prefix) in a function of avx2 or avx512. Those are
   entered only through the run-time table. A compiler's own clones of one function for several
   CPUs (target_clones) count as well: their names end in .avx2 and the like; the loader chooses.
2. An object compiled with ISA flags (isa_avx*.o) exports nothing whose name lacks its namespace. An
   inline function of a shared header, say std::min, would be a weak symbol there, and the linker
   may keep that copy for everybody.
"""

import argparse
import collections
import re
import subprocess
import sys
from pathlib import Path

# Mangled names carry a namespace as its length and its spelling.
NAMESPACES = {"avx2": "4avx2", "avx512": "6avx512"}
CLONE = re.compile(r"\.(?:(avx512\w*|arch_x86_64_v4)|(avx2|avx|arch_x86_64_v3))(?:\.|$)")
# What a function may use, by the namespace in its name.
ALLOWED = {"": set(), "avx2": {"avx"}, "avx512": {"avx", "avx512"}}
FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
INSTRUCTION = re.compile(r"^ +[0-9a-f]+:\t((?:[0-9a-f]{2} )+) *\t(.*)$")
# Segment, operand-size, address-size and lock/rep prefixes may stand before an opcode.
PREFIXES = {"26", "2e", "36", "3e", "64", "65", "66", "67", "f0", "f2", "f3"}
# Beyond the x86-64 baseline without a VEX or EVEX prefix.
BEYOND_SSE2 = re.compile(
    r"^(popcnt|lzcnt|crc32|movbe|pshufb|palignr|pabs[bwd]|ph(add|sub)|pmulhrsw|pmaddubsw|h(add|sub)p|"
    r"addsubp|movs[lh]dup|movddup|lddqu|blend|pblend|round[ps]|ptest|pm(in|ax)(sb|uw|sd|ud)|pmulld|"
    r"pmuldq|pmov[sz]x|pinsr[bdq]|pextr[bdq]|insertps|extractps|dpp[sd]|pcmpeqq|pcmpgtq|packusdw|"
    r"aes|pclmul|sha1|sha256)"
)


def namespace(symbol: str) -> str:
    """The ISA namespace in a mangled name, or what its clone is for, or the empty string."""
    if clone := CLONE.search(symbol):
        return "avx512" if clone[1] else "avx2"
    return next((isa for isa, mangled in NAMESPACES.items() if mangled in symbol), "")


def needs(code: str, text: str) -> str:
    """What an instruction needs beyond the x86-64 baseline: avx512, avx, sse4 or nothing."""
    first = next((byte for byte in code.split() if byte not in PREFIXES), "")
    if first == "62" or re.search(r"%k[0-7]\b", text):
        return "avx512"
    if first in ("c4", "c5"):
        return "avx"
    return "sse4" if BEYOND_SSE2.match(text) else ""


def check_code(path: Path) -> tuple[list[str], collections.Counter]:
    """Rule 1 for one file: its errors, and how many instructions of each kind it has."""
    listing = subprocess.run(
        ["objdump", "-d", "-w", "--insn-width=16", path], capture_output=True, text=True, check=True
    ).stdout
    errors: list[str] = []
    seen: collections.Counter = collections.Counter()
    symbol = "?"
    for line in listing.splitlines():
        if match := FUNCTION.match(line):
            symbol = match[1]
        elif match := INSTRUCTION.match(line):
            kind = needs(match[1], match[2])
            seen[kind or "baseline"] += 1
            if kind and kind not in ALLOWED[namespace(symbol)]:
                errors.append(f"{path}: {kind} instruction in {symbol}: {match[2].strip()}")
    if not seen:
        errors.append(f"{path}: no instructions found")
    return errors, seen


def check_symbols(path: Path, isa: str) -> list[str]:
    """Rule 2 for one object."""
    listing = subprocess.run(
        ["nm", "--defined-only", "--extern-only", path], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in listing.splitlines() if line.strip()]
    if not names:
        return [f"{path}: no symbols found"]
    return [
        f"{path}: {name} is visible to other files and not in namespace {isa}"
        for name in names
        if NAMESPACES[isa] not in name
    ]


def main() -> int:
    """Check the files named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    files = parser.parse_args().files
    errors: list[str] = []
    total: collections.Counter = collections.Counter()
    objects = 0
    for path in files:
        found, seen = check_code(path)
        errors += found
        total += seen
        if match := re.search(r"isa_(avx\w+?)\.", path.name):
            objects += 1
            errors += check_symbols(path, match[1])
    for error in errors[:50]:
        print(error)
    counts = ", ".join(f"{count} {kind}" for kind, count in total.most_common())
    print(f"{len(files)} files, {objects} of them ISA objects: {counts}; {len(errors)} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
