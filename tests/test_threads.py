"""Threads inside the ops, and the ops inside threads."""

import threading
import time

import pytest
import torch

import tetris
from cases import Case, assert_product, make_layer, reference, tokens

BITWISE = [
    Case(1, 2048, 2048, 4, 1, 0.3),
    Case(2, 1024, 1024, 8, 1, 0.3),
    Case(15, 1024, 512, 4, 1, 0.5),
    Case(33, 700, 900, 5, 3, 0.5),
    Case(257, 512, 512, 16, 16, 0.3),
    Case(1000, 129, 300, 1, 1, 0.3),
]


@pytest.mark.skipif(
    "OpenMP not found" in torch.__config__.parallel_info(), reason="this torch has no OpenMP"
)
def test_the_kernels_run_on_as_many_threads_as_torch_allows(threads):
    for n in (1, 2, 3):
        threads(n)
        assert tetris._C.threads_at_work() == n


@pytest.mark.parametrize("case", BITWISE, ids=str)
def test_bits_do_not_depend_on_the_thread_count(case, isa, threads):
    layer, x = make_layer(case), tokens(case)
    threads(1)
    want = layer.bsmm(x, "gelu")
    for n in (1, 2, 3, 4, 7):
        threads(n)
        for _ in range(3):
            assert torch.equal(layer.bsmm(x, "gelu"), want)


@pytest.mark.parametrize("case", BITWISE, ids=str)
def test_gradients_repeat_bit_for_bit(case, isa, threads):
    layer, x = make_layer(case), tokens(case)
    dy = tokens(case, seed=2, features=case.n)
    threads(4)

    def grads():
        return (
            torch.ops.tetris.bsmm_grad_input(dy, layer.values, *layer.index, case.k),
            torch.ops.tetris.bsmm_grad_values(x, dy, *layer.index, case.bo, case.bi),
        )

    dx, dvalues = grads()
    for _ in range(5):
        again = grads()
        assert torch.equal(again[0], dx)
        inside = torch.ones_like(dvalues, dtype=torch.bool)
        assert torch.equal(again[1][inside], dvalues[inside])


def test_python_threads_do_not_disturb_each_other(isa, threads):
    """Different layers, sizes and directions at once: per-thread working memory is not shared."""
    threads(2)
    cases = [
        Case(1, 300, 200, 4, 1, 0.3),
        Case(64, 256, 300, 8, 1, 0.3),
        Case(40, 90, 500, 16, 16, 0.5),
        Case(200, 200, 64, 1, 1, 0.2),
    ]
    work = []
    for seed, case in enumerate(cases):
        layer, x = make_layer(case, seed=seed, padding=0.0), tokens(case, seed=seed)
        dy = tokens(case, seed=seed + 50, features=case.n)
        dx = torch.ops.tetris.bsmm_grad_input(dy, layer.values, *layer.index, case.k)
        work.append((layer, x, dy, layer.bsmm(x, "silu"), dx))
    assert_product(work[0][0].bsmm(work[0][1]), *reference(*work[0][:2]), terms=200)
    errors = []
    start = threading.Barrier(8)

    def run(i):
        start.wait()
        for j in range(60):
            layer, x, dy, y, dx = work[(i + j) % len(work)]
            if not torch.equal(layer.bsmm(x, "silu"), y):
                errors.append(("y", i, j))
            got = torch.ops.tetris.bsmm_grad_input(dy, layer.values, *layer.index, layer.k)
            if not torch.equal(got, dx):
                errors.append(("dx", i, j))

    pool = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for t in pool:
        t.start()
    for t in pool:
        t.join()
    assert not errors


def test_the_gil_is_released():
    """While one thread is inside a long call, another Python thread runs."""
    case = Case(4000, 512, 512, 1, 1, 1.0)
    layer, x = make_layer(case), tokens(case)
    spans, ticks, stop = [], [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    other = threading.Thread(target=tick)
    other.start()
    try:
        for _ in range(20):
            begin = time.perf_counter()
            layer.bsmm(x)
            spans.append((begin, time.perf_counter()))
    finally:
        stop.set()
        other.join()
    # With the GIL held no tick could fall strictly inside a call.
    inside = sum(any(b < t < e for t in ticks) for b, e in spans)
    assert inside > len(spans) // 2


def test_autograd_engine_threads(threads):
    """Backward runs on another thread than forward, several graphs at once."""
    threads(2)
    case = Case(64, 200, 150, 4, 2, 0.3)
    layer, x = make_layer(case, padding=0.0), tokens(case)
    want = None
    results = [None] * 6

    def run(i):
        values = layer.values.clone().requires_grad_()
        y = torch.ops.tetris.bsmm(x, values, *layer.index, layer.bias, layer.n, "gelu")
        (y**2).sum().backward()
        results[i] = values.grad

    run(0)
    want = results[0]
    pool = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for t in pool:
        t.start()
    for t in pool:
        t.join()
    for got in results:
        assert torch.equal(got, want)
