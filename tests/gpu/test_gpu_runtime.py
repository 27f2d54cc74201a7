"""How the ops live with torch's CUDA: streams, graphs, memory, compilation, autocast, devices."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import tetris
from cases import Case, make_layer, reference, tokens
from conv_cases import ConvCase, make_conv, maps
from support import DEVICE, EMULATED, assert_near, on_device

hardware = pytest.mark.hardware
CASE = Case(64, 256, 256, 64, 16, 0.4)


def layer_and_x(case=CASE, dtype=torch.bfloat16):
    layer = make_layer(case, dtype, padding=0.0)
    return layer, on_device(layer), tokens(case, dtype).to(DEVICE)


def mlp(dtype=torch.bfloat16, block=(64, 16)):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 192))
    sparse = tetris.sparsify(dense, sparsity=0.5, block=block, sweeps=1)
    return sparse.to(DEVICE, dtype)


@hardware
def test_other_streams():
    layer, moved, x = layer_and_x()
    want = moved.bsmm(x)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    got = []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            delayed = x.clone()  # behind the sleep: a kernel on the wrong stream would be early
            got.append(moved.bsmm(delayed))
            x_grad = torch.ops.tetris.bsmm_grad_input(
                torch.ones_like(got[-1]), moved.values, *moved.index, CASE.k
            )
    torch.cuda.synchronize()
    assert all(torch.equal(y, want) for y in got)
    assert x_grad.isfinite().all()


@hardware
def test_no_synchronization_in_steady_state():
    _, moved, x = layer_and_x()
    model = mlp()
    y = moved.bsmm(x)
    model(torch.randn(8, 128, device=DEVICE, dtype=torch.bfloat16)).sum().backward()
    ops = torch.ops.tetris
    ops.bsmm_grad_input(y, moved.values, *moved.index, CASE.k)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved.bsmm(x)
        ops.bsmm_grad_input(y, moved.values, *moved.index, CASE.k)
        ops.bsmm_grad_values(x, y, *moved.index, 64, 16)
        model(torch.randn(8, 128, device=DEVICE, dtype=torch.bfloat16)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@hardware
@pytest.mark.parametrize("family", ["simt", "skinny", "mma", "hopper", ""])
def test_graph_capture_and_replay(family):
    case = Case(16, 256, 256, 64, 16, 0.4)
    layer, moved, x = layer_and_x(case)
    if family == "hopper" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("compute capability 9.0 only")
    tetris._C.cuda_force_kernel(family)
    try:
        moved.bsmm(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = moved.bsmm(x, "relu")
    finally:
        tetris._C.cuda_force_kernel("")
    for seed in range(3):
        new = tokens(case, torch.bfloat16, seed=seed)
        x.copy_(new)
        y.fill_(torch.nan)
        graph.replay()
        z, scale = reference(layer, new)
        assert_near(y, z.relu(), scale, terms=case.k)


@hardware
def test_a_training_step_in_a_graph():
    model = mlp()
    x = torch.randn(32, 128, device=DEVICE, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model(x).float().square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).float().square().sum().backward()
    graph.replay()
    first = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=False)
    graph.replay()
    for p, want in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=2e-2, atol=2e-2)


@hardware
def test_a_new_layout_is_refused_while_capturing():
    _, moved, x = layer_and_x()
    tetris._C.cuda_forget_layouts()
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="run the same layers once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        moved.bsmm(x)
    assert moved.bsmm(x).isfinite().all()  # and the device still works


@hardware
def test_a_new_layout_beside_another_threads_capture():
    """CUDA makes a capture invalid when any other thread copies, waits or allocates unprotected."""
    _, moved, x = layer_and_x()

    def first_calls():
        tetris._C.cuda_forget_layouts()
        y = moved.bsmm(x)
        return y, torch.ops.tetris.bsmm_grad_input(y, moved.values, *moved.index, CASE.k)

    graph, replayed = torch.cuda.CUDAGraph(), torch.zeros(1000, device=DEVICE)
    with ThreadPoolExecutor(1) as other:
        # What these results leave is memory for the second ones.
        want = [t.clone() for t in other.submit(first_calls).result()]
        gc.collect()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin(capture_error_mode="global")
            try:
                replayed.add_(1)
                got = other.submit(first_calls).result()
            finally:
                graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert replayed.eq(1).all()


@hardware
def test_a_graph_outlives_the_forgetting_of_layouts():
    """A captured layout is kept as long as its tensors live, whatever else is run."""
    _, moved, x = layer_and_x()
    want = moved.bsmm(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moved.bsmm(x)
    for seed in range(50):
        on_device(make_layer(Case(4, 64, 64, 16, 16), seed=seed)).bsmm(
            torch.ones(4, 64, device=DEVICE)
        )
    torch.full((1 << 20,), -1, dtype=torch.int32, device=DEVICE)
    y.zero_()
    graph.replay()
    assert torch.equal(y, want)


@hardware
def test_memory_does_not_grow():
    _, moved, x = layer_and_x()
    model = mlp()

    def step():
        moved.bsmm(x)
        model(torch.randn(64, 128, device=DEVICE, dtype=torch.bfloat16)).sum().backward()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    segments = torch.cuda.memory_stats()["num_alloc_retries"]
    for _ in range(50):
        step()
    torch.cuda.synchronize()
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.memory_stats()["num_alloc_retries"] == segments


@hardware
def test_layouts_that_are_gone_take_no_memory():
    tetris._C.cuda_forget_layouts()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for seed in range(20):
        layer = on_device(make_layer(Case(4, 512, 512, 4, 4), seed=seed))
        layer.bsmm(torch.ones(4, 512, device=DEVICE))
        torch.ops.tetris.bsmm_grad_input(
            torch.ones(4, 512, device=DEVICE), layer.values, *layer.index, 512
        )
    assert tetris._C.cuda_prepared_layouts() <= 2
    del layer
    tetris._C.cuda_forget_layouts()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@hardware
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_beyond_32_bits(dtype):
    """More than 2^31 elements of x and of y; the last tokens are right."""
    features, m = 1024, (1 << 31) // 1024 + 300
    need = 3 * m * features * torch.finfo(dtype).bits // 8
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need >> 30} GiB")
    case = Case(m, features, features, 64, 16, 0.05, perm="none")
    layer = make_layer(dataclasses_replace(case, m=1), dtype, padding=0.0)
    moved = on_device(layer)
    x = torch.randn(1000, features, device=DEVICE, dtype=dtype).repeat(m // 1000 + 1, 1)[:m]
    y = moved.bsmm(x)
    for part in (slice(0, 200), slice(m - 200, m)):
        assert_near(y[part], *reference(layer, x[part].cpu()), terms=features)


def dataclasses_replace(case, **changes):
    import dataclasses

    return dataclasses.replace(case, **changes)


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradcheck(dtype, activation):
    case = Case(3, 10, 9, 4, 2)
    layer = make_layer(case, dtype, padding=0.0)
    moved, x = on_device(layer), tokens(case, dtype).to(DEVICE).requires_grad_()
    values, bias = moved.values.requires_grad_(), moved.bias.requires_grad_()

    def call(x, values, bias):
        return torch.ops.tetris.bsmm(x, values, *moved.index, bias, case.n, activation)

    assert torch.autograd.gradcheck(call, (x, values, bias))
    assert torch.autograd.gradgradcheck(call, (x, values, bias))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_conv(transposed):
    case = ConvCase(4, 6, (4, 5), (3, 2), (2, 1), (1, 1), block=(2, 2), transposed=transposed)
    layer = make_conv(case, torch.float64, padding=0.0)
    moved, x = on_device(layer), maps(case, torch.float64).to(DEVICE).requires_grad_()
    values, bias = moved.values.requires_grad_(), moved.bias.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, v, b: moved.conv(x, values=v, bias=b), (x, values, bias)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_keep_their_types(dtype):
    _, moved, x = layer_and_x(dtype=dtype)
    x.requires_grad_()
    values, bias = moved.values.requires_grad_(), moved.bias.requires_grad_()
    torch.ops.tetris.bsmm(x, values, *moved.index, bias, CASE.n, "silu").sum().backward()
    assert x.grad.dtype == values.grad.dtype == bias.grad.dtype == dtype


@hardware
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    layer, moved, x = layer_and_x(dtype=torch.float32)
    x.requires_grad_()
    values, bias = moved.values.requires_grad_(), moved.bias.requires_grad_()
    with torch.autocast("cuda", dtype=dtype):
        y = torch.ops.tetris.bsmm(x, values, *moved.index, bias, CASE.n, "none")
    assert y.dtype == dtype
    low = torch.ops.tetris.bsmm(
        x.detach().to(dtype), values.detach().to(dtype), *moved.index, bias.detach().to(dtype),
        CASE.n, "none",
    )  # fmt: skip
    assert torch.equal(y, low)
    y.float().sum().backward()
    assert x.grad.dtype == values.grad.dtype == bias.grad.dtype == torch.float32
    conv = on_device(make_conv(ConvCase(16, 32, (6, 6), block=(16, 16)), padding=0.0))
    with torch.autocast("cuda", dtype=dtype):
        assert conv.conv(torch.ones(2, 16, 6, 6, device=DEVICE)).dtype == dtype


@hardware
def test_compile():
    torch._dynamo.reset()
    model = mlp()
    x = torch.randn(32, 128, device=DEVICE, dtype=torch.bfloat16)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).float().sum().backward()
    model(x).float().sum().backward()
    for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=2e-2, atol=2e-2, msg=name)


@hardware
def test_compile_with_graphs():
    torch._dynamo.reset()
    model = mlp().eval()
    compiled = torch.compile(copy.deepcopy(model), mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for seed in range(4):
            torch.manual_seed(seed)
            x = torch.randn(16, 128, device=DEVICE, dtype=torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x), model(x))


@hardware
def test_compile_with_graphs_trains():
    """What is made for new layouts is not left in the memory pool of the graphs."""
    torch._dynamo.reset()
    model = mlp()
    other = copy.deepcopy(model)
    compiled = torch.compile(other, mode="reduce-overhead", fullgraph=True)
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(16, 128, device=DEVICE, dtype=torch.bfloat16)
        torch.compiler.cudagraph_mark_step_begin()
        for call in (compiled, model):
            call(x).float().square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=2e-2, atol=2e-2, msg=name)
            p.grad = q.grad = None


@hardware
def test_layouts_first_seen_in_a_pool_of_memory():
    """A pool that lasts for one call keeps nothing of theirs."""
    _, moved, x = layer_and_x()
    tetris._C.cuda_forget_layouts()
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        y = moved.bsmm(x)
        dx = torch.ops.tetris.bsmm_grad_input(y, moved.values, *moved.index, CASE.k)
    torch.cuda.synchronize()
    live = sum(
        block["size"]
        for segment in pool.snapshot()
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    )
    assert live <= sum(-(-t.nbytes // 512) * 512 for t in (y, dx))


def test_opcheck():
    case = Case(5, 64, 48, 16, 8)
    _, moved, x = layer_and_x(case, torch.float32)
    args = (x.requires_grad_(), moved.values.requires_grad_(), *moved.index, moved.bias, case.n)
    torch.library.opcheck(torch.ops.tetris.bsmm.default, (*args, "relu"))
    if EMULATED:
        return
    torch.library.opcheck(
        torch.ops.tetris.bsmm_grad_input.default,
        (torch.ones(5, 64, device=DEVICE), moved.values.detach(), *moved.index, 48),
    )


@hardware
def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    layer = make_layer(CASE, torch.bfloat16)
    x = tokens(CASE, torch.bfloat16)
    y = copy_to(layer, "cuda:1").bsmm(x.to("cuda:1"))
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_near(y, *reference(layer, x), terms=CASE.k)


def copy_to(layer, device):
    import dataclasses

    fields = {n: getattr(layer, n) for n in ("values", "row_ptr", "col_idx", "row_perm", "col_perm",
                                             "bias")}  # fmt: skip
    return dataclasses.replace(layer, **{n: t.to(device) for n, t in fields.items()})


@hardware
def test_threads():
    _, moved, x = layer_and_x()
    want = moved.bsmm(x)
    torch.cuda.synchronize()
    tetris._C.cuda_forget_layouts()

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            x.record_stream(torch.cuda.current_stream())
            y = moved.bsmm(x)
            torch.cuda.current_stream().synchronize()
            return torch.equal(y, want)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))
