"""A few small products of every family, to run under compute-sanitizer: its tool as argument.

compute-sanitizer --tool memcheck python tests/gpu/sanitize.py memcheck
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402

import tetris  # noqa: E402
from cases import Case, make_layer, reference, tokens  # noqa: E402
from conv_cases import ConvCase, make_conv, maps, results  # noqa: E402
from support import DEVICE, assert_near, on_device  # noqa: E402

MATRICES = [
    ("simt", "float32", Case(37, 70, 53, 4, 1, 0.4)),
    ("simt", "float64", Case(5, 33, 40, 1, 1, 0.4)),
    ("simt", "bfloat16", Case(33, 130, 67, 33, 20, 0.5)),
    ("skinny", "bfloat16", Case(1, 130, 96, 8, 4, 0.5)),
    ("skinny", "float16", Case(13, 96, 130, 64, 16, 0.5)),
    ("mma", "bfloat16", Case(70, 200, 168, 64, 16, 0.5)),
    ("mma", "float16", Case(150, 256, 128, 128, 128, 0.6)),
    ("mma", "float16", Case(40, 72, 80, 16, 8, 0.6)),
    ("hopper", "bfloat16", Case(300, 256, 256, 128, 16, 0.5)),
    ("hopper", "float16", Case(70, 128, 192, 64, 64, 0.5)),
]
CHANNELS = {"padding": (1, 1), "channels_last": True}
MAPS = [
    ("simt", "float32", ConvCase(5, 9, (7, 6), (3, 3), (2, 1), (1, 1), block=(4, 2))),
    (
        "mma",
        "bfloat16",
        ConvCase(32, 64, (7, 6), block=(32, 16), **CHANNELS),
    ),
    ("hopper", "bfloat16", ConvCase(80, 128, (9, 6), (3, 3), (2, 1), block=(64, 16), **CHANNELS)),
    ("mma", "float16", ConvCase(32, 32, (5, 6), padding=(1, 1), block=(16, 16), transposed=True)),
]


def attempt(family: str, what: str, call, check) -> None:
    """Run one call under a forced family; refusals are no errors here."""
    tetris._C.cuda_force_kernel(family)
    try:
        check(call())
        print(f"{family:<7} {what}: {tetris._C.last_kernel()}", flush=True)
    except ValueError as error:
        print(f"{family:<7} {what}: {error}", flush=True)
    finally:
        tetris._C.cuda_force_kernel("")


def main() -> None:
    """All of them, each once."""
    torch.backends.cudnn.allow_tf32 = False
    tool = sys.argv[1] if len(sys.argv) > 1 else "memcheck"
    matrices = MATRICES if tool == "memcheck" else MATRICES[::2]  # the other tools are slow
    ops = torch.ops.tetris
    for family, name, case in matrices:
        dtype = getattr(torch, name)
        layer, x = make_layer(case, dtype), tokens(case, dtype)
        dy, moved = tokens(case, dtype, 2, case.n).to(DEVICE), on_device(layer)
        attempt(
            family,
            f"{case} {name}",
            lambda moved=moved, x=x: moved.bsmm(x.to(DEVICE), "none"),
            lambda y, layer=layer, x=x, case=case: assert_near(y, *reference(layer, x), case.k),
        )
        attempt(
            family,
            f"{case} {name} dx",
            lambda moved=moved, dy=dy, case=case: ops.bsmm_grad_input(
                dy, moved.values, *moved.index, case.k
            ),
            lambda y: None,
        )
        attempt(
            family,
            f"{case} {name} dvalues",
            lambda moved=moved, x=x, dy=dy, case=case: ops.bsmm_grad_values(
                x.to(DEVICE), dy, *moved.index, case.bo, case.bi
            ),
            lambda y: None,
        )
    for family, name, case in MAPS:
        dtype = getattr(torch, name)
        moved, x = on_device(make_conv(case, dtype)), maps(case, dtype).to(DEVICE)
        dy = results(case, dtype).to(DEVICE)
        attempt(family, f"{case} {name}", lambda m=moved, x=x: m.conv(x, "relu"), lambda y: None)
        attempt(family, f"{case} dx", lambda m=moved, dy=dy: m.grad_input(dy), lambda y: None)
        attempt(
            family, f"{case} dv", lambda m=moved, x=x, dy=dy: m.grad_values(x, dy), lambda y: None
        )
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
