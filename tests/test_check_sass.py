"""tools/check_sass.py on listings as cuobjdump writes them."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "check_sass", Path(__file__).parent.parent / "tools" / "check_sass.py"
)
assert spec is not None
assert spec.loader is not None
check_sass = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_sass)

HEAD = """
Fatbin elf code:
================
arch = {arch}
code version = [1,8]

\tcode for {arch}
\t\tFunction : {name}
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
"""
LINE = """        /*{at:04x}*/                   {text} ;             /* 0x00000a00ff017624 */
                                                                       /* 0x000fe400078e00ff */
"""


def listing(name, *instructions, arch="sm_80"):
    lines = [LINE.format(at=16 * i, text=text) for i, text in enumerate(instructions)]
    return HEAD.format(arch=arch, name=name) + "".join(lines)


GOOD = (
    "IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28]",
    "@P0 LDGSTS.E.BYPASS.128 [R2], [R4.64]",
    "LDSM.16.MT88.4 R8, [R2+0x400]",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "@!UP0 STG.E.128 [R2.64], R4",
)


def test_instructions_are_counted_by_kernel_and_target():
    text = listing("_Z6kernelA", *GOOD) + listing("_Z6kernelA", GOOD[3], GOOD[3], arch="sm_90a")
    kernels = check_sass.parse(text)
    assert set(kernels) == {("sm_80", "_Z6kernelA"), ("sm_90a", "_Z6kernelA")}
    assert kernels["sm_80", "_Z6kernelA"] == {
        name: 1 for name in ("IMAD", "LDGSTS", "LDSM", "HMMA", "STG")
    }
    assert kernels["sm_90a", "_Z6kernelA"] == {"HMMA": 2}


# TF32's kernels, which need no LDSM.
OF_FLOAT = listing("_Z6kernelIfE", GOOD[1], GOOD[3])
HOPPER = "_ZN6hopper7productE"
WGMMA = (
    "USETMAXREG.DEALLOC.CTAPOOL 0x38",
    "@!UP1 UTMALDG.4D [UR16], [UR8]",
    "WARPGROUP.ARRIVE",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16].tnspA, R24",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16].tnspA, R24",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16].tnspA, R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "UTMASTG.4D [UR8], [UR42]",
)


USAGE = """
Fatbin elf code:

Resource usage:
 Common:
  GLOBAL:0
 Function {name}:
  REG:{registers} STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:1280 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def check_hopper(text, name=HOPPER, registers=168):
    usage = check_sass.parse_usage(USAGE.format(name=name, registers=registers))
    return check_sass.check("hopper", check_sass.parse(text), usage)


def test_a_kernel_as_it_was_meant():
    text = listing("_Z6kernel", *GOOD) + OF_FLOAT
    assert check_sass.check("mma_product", check_sass.parse(text), {}) == []
    assert check_hopper(listing(HOPPER, *WGMMA)) == []


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_missing_instruction(missing):
    rest = [text for i, text in enumerate(GOOD) if i != missing]
    text = listing("_Z6kernel", *rest) + OF_FLOAT
    (error,) = check_sass.check("mma_sampled", check_sass.parse(text), {})
    name = ("LDGSTS", "LDSM", "HMMA")[missing - 1]
    assert error == f"mma_sampled (sm_80): _Z6kernel has no {name}"


def test_a_rule_for_nobody():
    """A pattern that no kernel's name has would pass for ever."""
    (error,) = check_hopper(listing("_Z5other", *WGMMA), name="_Z5other")
    assert error == "hopper: no kernel is named like 'hopper.*product'"


def test_serialized_wgmma():
    one = (WGMMA[2], WGMMA[5], WGMMA[6])
    text = listing(HOPPER, *WGMMA[:2], *one, *one, WGMMA[-1])
    (error,) = check_hopper(text)
    assert error == f"hopper (sm_80): {HOPPER} serializes its wgmma: 2 among 4 fences and waits"


def test_too_few_registers_to_hand_on():
    (error,) = check_hopper(listing(HOPPER, *WGMMA), registers=122)
    assert error == f"hopper (sm_80): {HOPPER} hands on registers and starts with 122, not 168"


def test_spills():
    text = listing("_Z3any", "STL [R1+0x4], R7", "@P3 LDL.LU R7, [R1+0x4]", "LDL R7, [R1]")
    (error,) = check_sass.check("permute", check_sass.parse(text), {})
    assert error == "permute (sm_80): _Z3any uses local memory: 2 LDL, 1 STL"


def test_a_file_without_kernels():
    assert check_sass.check("simt", check_sass.parse(""), {}) == ["simt: no kernel found"]
