"""tools/check_isa.py finds what it is for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "check_isa.py"
CASES = {
    # file, flags, code -> part of the complaint, or None
    "baseline": ("a.cpp", [], "void f(float* p) { p[0] += p[1]; }", None),
    "avx-outside": ("a.cpp", ["-mavx"], "void f(float* p) { p[0] += p[1]; }", "avx instruction in"),
    "avx512-outside": (
        "a.cpp",
        ["-mavx512f"],
        "#include <immintrin.h>\nvoid f(float* p) { _mm512_storeu_ps(p, _mm512_loadu_ps(p + 9)); }",
        "avx512 instruction in",
    ),
    "avx512-in-avx2": (
        "isa_avx2.cpp",
        ["-mavx512f"],
        "#include <immintrin.h>\nnamespace tetris::avx2 {\n"
        "void f(float* p) { _mm512_storeu_ps(p, _mm512_loadu_ps(p + 9)); } }",
        "avx512 instruction in",
    ),
    "avx512-at-home": (
        "isa_avx512.cpp",
        ["-mavx512f"],
        "#include <immintrin.h>\nnamespace tetris::avx512 {\n"
        "void f(float* p) { _mm512_storeu_ps(p, _mm512_loadu_ps(p + 9)); } }",
        None,
    ),
    "sse4-outside": (
        "a.cpp",
        ["-mpopcnt"],
        "int f(int a) { return __builtin_popcount(a); }",
        "sse4",
    ),
    "shared-inline-code": (
        "isa_avx2.cpp",
        ["-mavx2"],
        "template <class T> [[gnu::noinline]] T twice(T a) { return a + a; }\n"
        "namespace tetris::avx2 { float f(float a) { return twice(a); } }",
        "is visible to other files",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_check_isa(name, tmp_path):
    import platform

    if platform.machine() != "x86_64" or not (shutil.which("g++") and shutil.which("objdump")):
        pytest.skip("needs g++ and objdump on x86-64")
    file, flags, code, complaint = CASES[name]
    (tmp_path / file).write_text(code)
    built = tmp_path / f"{file}.o"
    subprocess.run(["g++", "-O2", "-c", *flags, tmp_path / file, "-o", built], check=True)
    done = subprocess.run([sys.executable, TOOL, built], capture_output=True, text=True)
    assert done.returncode == (complaint is not None), done.stdout
    assert (complaint or "0 errors") in done.stdout
