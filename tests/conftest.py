"""Fixtures: every instruction set in turn, and memory that starts as NaN."""

import os

import pytest
import torch

import tetris

# A run under TETRIS_CPU_ISA tests that instruction set alone, as a user would force it.
FORCED = os.environ.get("TETRIS_CPU_ISA")
ISAS = [FORCED] if FORCED else tetris._C.isas_built()


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.avx512] if name == "avx512" else []) for name in ISAS
    ]
)
def isa(request):
    """Each instruction set of this build, forced for one test."""
    if request.param not in tetris._C.isas_supported():
        pytest.skip(f"this CPU does not run {request.param}")
    if FORCED:
        assert tetris._C.isa_in_use() == FORCED
        yield request.param
        return
    tetris._C.force_isa(request.param)
    yield request.param
    tetris._C.force_isa("")


@pytest.fixture
def poison():
    """Uninitialized tensors start as NaN (integers as their maximum), so unwritten ones show."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Call it to set torch's thread count; the old one comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Tests neither read nor write what the user calibrated and tuned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TETRIS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
