"""The CUDA ops on a GPU; without one, in a build on the emulator (-DTETRIS_CUDA=emulated), on that.

Everything else is skipped: no GPU and no emulator, no test.
"""

import pytest
import torch

import tetris
from support import EMULATED

FAMILIES = ["simt", "skinny", "mma", "hopper"]


def pytest_collection_modifyitems(items):
    """Mark what is here, and skip what cannot run."""
    if EMULATED:
        why = None
    elif not tetris._C.cuda_built():
        why = f"this build has no CUDA kernels: {tetris._C.cuda_why()}"
    else:
        why = None if torch.cuda.is_available() else "torch sees no GPU"
    for item in items:
        if "tests/gpu" not in item.path.as_posix():
            continue
        item.add_marker(pytest.mark.cuda)
        if why:
            item.add_marker(pytest.mark.skip(reason=why))
        elif EMULATED and item.get_closest_marker("hardware"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, not the emulator"))


@pytest.fixture(params=FAMILIES)
def family(request):
    """Each family of kernels, forced for one test."""
    tetris._C.cuda_force_kernel(request.param)
    yield request.param
    tetris._C.cuda_force_kernel("")


@pytest.fixture
def chosen():
    """The library's own choice of kernels."""
    tetris._C.cuda_force_kernel("")


@pytest.fixture(autouse=True)
def no_tf32():
    """Exact float32 unless a test asks for TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
