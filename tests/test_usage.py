"""Mistakes that newcomers make: the message names the function, the rule and the value seen."""

import dataclasses
import inspect
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import tetris
from tetris import BlockLayout, SparseConv2d, SparseLinear, reorder, sparsify
from tetris.prune import BlockPruner, LayerOptions, TetrisPruner

FAST = {"reorder": False}
WEIGHT = torch.arange(512, dtype=torch.float32).view(32, 16)
LAYOUT = BlockLayout.from_dense(WEIGHT, (4, 1), 0.5, reorder=False)


def mlp(**factory):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32, **factory), nn.ReLU(), nn.Linear(32, 8, **factory))


def linear(**factory):
    return nn.Linear(16, 32, **factory)


# Each takes settings by keyword and a model or weight of its own.
ENTRIES = {
    "tetris.sparsify": lambda **k: sparsify(mlp(), **{**FAST, **k}),
    "TetrisPruner": lambda **k: TetrisPruner(mlp(), **{**FAST, **k}),
    "SparseLinear.from_dense": lambda **k: SparseLinear.from_dense(
        linear(), **{"sparsity": 0.5, **FAST, **k}
    ),
    "SparseConv2d.from_dense": lambda **k: SparseConv2d.from_dense(
        nn.Conv2d(16, 32, 3), **{"sparsity": 0.5, **FAST, **k}
    ),
    "BlockLayout.from_dense": lambda **k: BlockLayout.from_dense(
        WEIGHT, **{"block": (4, 1), "sparsity": 0.5, **FAST, **k}
    ),
    "tetris.reorder.search": lambda **k: reorder.search(
        WEIGHT, **{"block": (4, 1), "sparsity": 0.5, "method": "identity", **k}
    ),
}
MODELS = ("tetris.sparsify", "TetrisPruner")
COMMON = [
    ({"block": 4}, r"block must be two ints such as \(4, 1\), height along out.*128 \(got 4\)"),
    ({"block": "4x1"}, r"block must be .*\(got '4x1'\)"),
    ({"block": (4,)}, r"block must be .*\(got \(4,\)\)"),
    ({"block": (4.0, 1)}, r"block must be .*two ints.*\(got \(4.0, 1\)\)"),
    ({"block": (True, 1)}, r"block must be .*\(got \(True, 1\)\)"),
    ({"sparsity": 90}, r"sparsity, the share .* in \[0, 1\] \(got 90\); for 90 % pass 0.9"),
    ({"sparsity": 1000}, r"sparsity, the share .* in \[0, 1\] \(got 1000\)"),
    ({"sparsity": "0.9"}, r"sparsity, .*\(got '0.9'\)"),
    ({"sparsity": True}, r"sparsity, .*\(got True\)"),
    ({"sparsity": torch.tensor(0.9)}, r"sparsity, .*\(got tensor"),
    ({"seed": 1.5}, r"seed must be an int \(got 1.5\)"),
    ({"balanced": "yes"}, r"balanced must be True or False \(got 'yes'\)"),
    ({"allow_empty_rows": None}, r"allow_empty_rows must be True or False \(got None\)"),
    ({"tie_kernel": 1}, r"tie_kernel must be True or False \(got 1\)"),
    ({"budget": "2"}, r"budget must be a number of seconds >= 0 \(got '2'\)"),
    ({"sweeps": 2.5}, r"sweeps must be at least 1, an int \(got 2.5\)"),
]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("wrong", "message"), COMMON, ids=lambda p: str(p) if p else "")
def test_wrong_settings(entry, wrong, message):
    with pytest.raises(ValueError, match=message) as info:
        ENTRIES[entry](**wrong)
    assert str(info.value).startswith(entry + ": ")


@pytest.mark.parametrize("entry", ENTRIES)
def test_no_block(entry):
    """Layers have a default for it, which None stands for."""
    if entry.startswith("Sparse"):
        assert ENTRIES[entry](block=None).block == (4, 1)
        return
    with pytest.raises(ValueError, match=rf"{entry}: block must be .*\(got None\)"):
        ENTRIES[entry](block=None)


@pytest.mark.parametrize("entry", ENTRIES)
def test_integers_and_floats_of_numpy_are_numbers(entry):
    ENTRIES[entry](block=(np.int64(4), np.int32(1)), sparsity=np.float32(0.5), seed=np.int64(1))
    ENTRIES[entry](block=np.array([4, 1]), sparsity=0, seed=np.array(1))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("seed", [np.bool_(True), np.float64(1), np.array([1])], ids=repr)
def test_a_seed_is_one_integer(entry, seed):
    with pytest.raises(
        ValueError, match=rf"{entry}: seed must be an int \(got {re.escape(repr(seed))}\)"
    ):
        ENTRIES[entry](seed=seed)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e != "tetris.reorder.search"])
def test_unknown_settings(entry):
    with pytest.raises(TypeError, match=f"{entry}: got an unexpected argument 'sparcity'"):
        ENTRIES[entry](sparcity=0.9)


@pytest.mark.parametrize("entry", MODELS)
@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("value", [4, [4], ("0", 4)], ids=str)
def test_layers_named_by_a_number(entry, argument, value):
    message = f"{entry}: {argument} takes names, .*got 4; names are strings: '4'"
    with pytest.raises(TypeError, match=message):
        ENTRIES[entry](**{argument: value})


@pytest.mark.parametrize("entry", MODELS)
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_names_that_match_nothing(entry, argument):
    message = (
        f"{entry}: {argument} entry 'head' matches no module .linear layers and convolutions: 0, 2"
    )
    with pytest.raises(ValueError, match=message):
        ENTRIES[entry](**{argument: "head"})


@pytest.mark.parametrize("entry", MODELS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"types": nn.Linear}, r"types must be a tuple of classes.*got the class Linear"),
        ({"overrides": {"0": 0.5}}, r"overrides\['0'\]: a dict of settings .*got 0.5"),
        ({"overrides": ["0"]}, r"overrides must be a dict .*got \['0'\]"),
        (
            {"importance": np.ones((32, 16))},
            "importance must give a tensor .got ndarray; torch.from_numpy",
        ),
    ],
)
def test_wrong_kinds(entry, wrong, message):
    with pytest.raises(TypeError, match=f"{entry}.*{message}"):
        ENTRIES[entry](**wrong)


@pytest.mark.parametrize("call", [sparsify, TetrisPruner, tetris.densify])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mlp().state_dict(), "got an OrderedDict, it seems a state_dict; make the model"),
        (WEIGHT, "got a Tensor"),
        ("model.pt", "got 'model.pt'; load the model first"),
        (nn.Linear, "got the class Linear; make an instance of it"),
        ([nn.Linear(4, 4)], "got a list"),
        (None, "got a NoneType"),
    ],
    ids=str,
)
def test_what_is_no_model(call, model, message):
    with pytest.raises(TypeError, match=f"{call.__name__}: model must be an nn.Module .{message}"):
        call(model)


@pytest.mark.parametrize("call", [sparsify, TetrisPruner])
def test_a_model_without_layers_to_prune(call):
    message = "no layer to prune in Sequential .it has no nn.Linear, .* or transformers.*Conv1D"
    with pytest.raises(ValueError, match=message):
        call(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))


EXAMPLE = torch.zeros(2, 16)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("tetris.sparsify", sparsify),
        ("tetris.analyze", tetris.analyze),
        ("TetrisPruner", TetrisPruner),
        ("tetris.fuse", tetris.fuse),
        ("tetris.fold", lambda model: tetris.fold(model, EXAMPLE, sparsity=0.9)),
        ("tetris.shared_orders", lambda model: tetris.shared_orders(model, EXAMPLE)),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_a_scripted_model(name, call):
    model = torch.jit.trace(mlp().eval(), EXAMPLE)
    with pytest.raises(TypeError, match=f"{name}: model must be the module that was scripted or"):
        call(model)


def test_an_exported_model_has_no_layers():
    model = torch.export.export(mlp(), (EXAMPLE,)).module()
    with pytest.raises(ValueError, match="no layer to prune.*take the model it was made of"):
        sparsify(model, **FAST)


def test_a_lazy_layer():
    model = nn.Sequential(nn.LazyLinear(32))
    with pytest.raises(ValueError, match="0: its size is not known yet: call the model once"):
        sparsify(model, **FAST)
    model(EXAMPLE)
    assert isinstance(sparsify(model, **FAST)[0], SparseLinear)


@pytest.mark.parametrize("kept", ["attribute", "buffer"])
def test_a_model_that_cannot_be_copied(kept, monkeypatch):
    """A tensor that a module keeps of its last call is the ordinary case."""
    model = mlp()
    if kept == "buffer":
        model.register_buffer("seen", None)
    model.seen = model(EXAMPLE)
    message = "tetris.sparsify: Sequential cannot be copied.*inplace"
    with monkeypatch.context() as patched:
        patched.setattr("tetris.model._search", None)  # nobody waits for a search first
        with pytest.raises(ValueError, match=message):
            sparsify(model, **FAST)
    assert type(model[0]) is nn.Linear
    sparsify(model, inplace=True, **FAST)


@pytest.mark.parametrize("call", [sparsify, TetrisPruner])
def test_a_model_without_numbers(call):
    model = mlp()
    model[2].to("meta")
    with pytest.raises(ValueError, match="layer '2' is on the meta device.*to_empty.*exclude it"):
        call(model, **FAST)
    call(model, exclude="2", **FAST)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_at_once(dtype):
    message = rf"must be float32 .*got {dtype}\); convert with .float\(\).*autocast"
    with pytest.raises(ValueError, match=f"tetris.sparsify: layer '0': .*{message}"):
        sparsify(mlp(dtype=dtype), **FAST)
    for arguments in ({"sparsity": 0.5, **FAST}, {"layout": LAYOUT}):
        with pytest.raises(ValueError, match=f"SparseLinear.from_dense: .*{message}"):
            SparseLinear.from_dense(linear(dtype=dtype), **arguments)
    with pytest.raises(ValueError, match=f"SparseLinear: dtype must be float32.*got {dtype}"):
        SparseLinear(16, 32, layout=LAYOUT, dtype=dtype)


def test_masks_train_in_half_precision_and_become_sparse_in_float32():
    pruner = TetrisPruner(mlp(dtype=torch.bfloat16), sparsity=0.5, **FAST)
    with pytest.raises(ValueError, match="TetrisPruner.finalize: layer '0': .*got torch.bfloat16"):
        pruner.finalize()
    pruner.model.float()
    x = torch.randn(3, 16)
    torch.testing.assert_close(pruner.finalize()(x), pruner.model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(tetris._C.cuda_built(), reason="this build has CUDA kernels")
def test_what_is_not_on_the_cpu_is_refused():
    layer = linear()
    weight = FakeTensor(FakeTensorMode(), layer.weight.to("meta"), torch.device("cuda:0"))
    layer._parameters["weight"] = nn.Parameter(weight)  # no GPU needed
    with pytest.raises(ValueError, match="from_dense: .*on the CPU.*got cuda:0.*with .cpu"):
        SparseLinear.from_dense(layer, layout=LAYOUT)
    with pytest.raises(ValueError, match="sparsify: layer '': .*on the CPU.*got cuda:0.*with .cpu"):
        sparsify(layer)


def test_layers_without_numbers():
    for arguments in ({"sparsity": 0.5}, {"layout": LAYOUT}):
        with pytest.raises(ValueError, match="SparseLinear.from_dense: .*meta device.*to_empty"):
            SparseLinear.from_dense(linear(device="meta"), **arguments)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (WEIGHT, "got Tensor"),
        (linear().state_dict(), "got OrderedDict"),
        (mlp(), "got Sequential; tetris.sparsify converts"),
    ],
    ids=lambda p: type(p).__name__,
)
def test_what_is_no_layer(module, message):
    with pytest.raises(TypeError, match=f"SparseLinear.from_dense: module must be .*{message}"):
        SparseLinear.from_dense(module, sparsity=0.5)


def test_a_mask_is_no_layout():
    mask = LAYOUT.mask()
    message = "layout must be a BlockLayout .got a Tensor; BlockLayout.from_mask makes one"
    with pytest.raises(TypeError, match=f"SparseLinear.from_dense: {message}"):
        SparseLinear.from_dense(linear(), layout=mask)
    with pytest.raises(TypeError, match=f"SparseLinear: {message}"):
        SparseLinear(16, 32, layout=mask)


# Method -> what it is called with, given a tensor of the right shape.
TENSORS = {
    "from_dense": (WEIGHT, lambda t: BlockLayout.from_dense(t, (4, 1), 0.5)),
    "from_mask": (WEIGHT > 0, lambda t: BlockLayout.from_mask(t, (4, 1))),
    "from_block_mask": (
        LAYOUT.block_mask(),
        lambda t: BlockLayout.from_block_mask(t, (4, 1), 32, 16),
    ),
    "pack": (WEIGHT, lambda t: LAYOUT.pack(t)),
    "unpack": (LAYOUT.pack(WEIGHT), lambda t: LAYOUT.unpack(t)),
    "to_sparse_bsr": (LAYOUT.pack(WEIGHT), lambda t: LAYOUT.to_sparse_bsr(t)),
    "plot": (WEIGHT, lambda t: LAYOUT.plot("unused.png", t)),
}


@pytest.mark.parametrize("method", TENSORS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda t: t.numpy(),
            TypeError,
            "be a torch.Tensor .got an ndarray; torch.from_numpy conv",
        ),
        (lambda t: linear(), TypeError, "be a torch.Tensor .got a Linear; pass its weight"),
        (lambda t: t.to("meta"), ValueError, "hold numbers .got a tensor on the meta device"),
        (lambda t: t.to_sparse(), ValueError, "be a dense tensor .got torch.sparse_coo; .to_dense"),
    ],
    ids=["numpy", "module", "meta", "sparse"],
)
def test_what_is_no_tensor_for_a_layout(method, change, error, message):
    tensor, call = TENSORS[method]
    with pytest.raises(error, match=f"BlockLayout.{method}: .* must {message}"):
        call(change(tensor))


@pytest.mark.parametrize("block", [4, "4x1", (4,)], ids=str)
def test_wrong_blocks_in_masks(block):
    with pytest.raises(ValueError, match="BlockLayout.from_mask: block must be"):
        BlockLayout.from_mask(WEIGHT > 0, block)
    with pytest.raises(ValueError, match="BlockLayout.from_block_mask: block must be"):
        BlockLayout.from_block_mask(LAYOUT.block_mask(), block, 32, 16)


def test_layouts_live_where_numbers_are():
    with pytest.raises(ValueError, match="BlockLayout: row_ptr must hold numbers"):
        LAYOUT.to("meta")
    with pytest.raises(ValueError, match="out_features must be an int .*got '32'"):
        BlockLayout.from_block_mask(LAYOUT.block_mask(), (4, 1), "32", 16)


@pytest.mark.parametrize(
    ("saliency", "error", "message"),
    [
        (linear(), TypeError, "a tensor or an array .got a Linear"),
        (linear().state_dict(), TypeError, "a tensor or an array .got an OrderedDict"),
        (WEIGHT.to("meta"), ValueError, "hold numbers"),
        (WEIGHT.to_sparse(), ValueError, "dense tensor"),
        (WEIGHT.int(), ValueError, "floating point .got int32"),
    ],
    ids=["module", "state_dict", "meta", "sparse", "int"],
)
def test_what_is_no_saliency(saliency, error, message):
    with pytest.raises(error, match=f"tetris.reorder.search: saliency must .*{message}"):
        reorder.search(saliency, (4, 1), 0.5)


def test_everything_removed_warns():
    with pytest.warns(UserWarning, match="sparsity=1.0 asks to remove every block; each block row"):
        sparse = sparsify(mlp(), sparsity=1.0, **FAST)
    assert sparse[0].layout.nnz_blocks == 8


def test_pruners_take_settings_or_options_but_not_both():
    class Method(BlockPruner):
        def saliency(self, name, layer):
            return layer.weight.detach().abs()

    same = [
        Method(mlp(), LayerOptions(sparsity=0.5, reorder=False)),
        Method(mlp(), sparsity=0.5, reorder=False),
    ]
    assert same[0].options == same[1].options
    assert same[0].layouts() == same[1].layouts()
    with pytest.raises(TypeError, match="Method: settings go by keyword.* and block"):
        Method(mlp(), LayerOptions(), block=(8, 1))
    with pytest.raises(TypeError, match="TetrisPruner: settings go by keyword.*got 0.9"):
        TetrisPruner(mlp(), 0.9)
    with pytest.raises(ValueError, match="tetris.prune.LayerOptions: block must be"):
        LayerOptions(block=4)


@pytest.mark.parametrize("function", [tetris.sparsify, tetris.prune.TetrisPruner])
def test_help_shows_every_setting_and_its_default(function):
    shown = inspect.signature(function).parameters
    assert shown["sparsity"].default == 0.9
    assert shown["block"].default == (4, 1)
    assert all(p.kind is not p.VAR_KEYWORD for p in shown.values())


def test_help_shows_the_defaults_that_dsm_has_of_its_own():
    network = tetris.bayes.BayesianMLP((8, 8, 2), tetris.bayes.DirichletHorseshoe(), 50)
    theta = network.start(torch.Generator().manual_seed(0), 1, 3)
    made = tetris.prune.DSMPruner(
        tetris.bayes.Posterior(network, theta, tetris.bayes.Convergence("test"))
    )
    shown = inspect.signature(tetris.prune.DSMPruner).parameters
    for field in dataclasses.fields(made.options):
        assert shown[field.name].default == getattr(made.options, field.name), field.name
    assert (shown["reorder"].default, shown["allow_empty_rows"].default) == ("identity", True)


@pytest.mark.parametrize("x", [np.ones((2, 16), np.float32), [[1.0] * 16], torch.tensor(1.0)])
def test_a_layer_says_what_it_wants(x):
    layer = SparseLinear.from_dense(nn.Linear(16, 8), sparsity=0.5, reorder=False)
    with pytest.raises(
        TypeError, match=r"SparseLinear: input must be a tensor \[\.\.\., in_features\]"
    ):
        layer(x)


@pytest.mark.parametrize("flag", ["inplace", "progress", "return_report"])
def test_a_flag_that_is_none_changes_nothing(flag):
    model = mlp()
    with pytest.raises(
        ValueError, match=rf"tetris.sparsify: {flag} must be True or False \(got 'x'"
    ):
        sparsify(model, sparsity=0.5, **FAST, **{flag: "x"})
    assert isinstance(model[0], nn.Linear)


def test_a_flag_of_numpy_is_one():
    found = reorder.block_mask(WEIGHT, (4, 1), 0.5, balanced=np.True_)
    assert found.sum(1).unique().numel() == 1
    with pytest.raises(
        ValueError, match=r"block_mask: balanced must be True or False \(got None\)"
    ):
        reorder.block_mask(WEIGHT, (4, 1), 0.5, balanced=None)


def test_a_signed_weight_is_told_what_to_pass():
    with pytest.raises(
        ValueError, match=r"non-negative \(got -1.0 at \[0, 0\]\); pass absolute=True"
    ):
        reorder.search(WEIGHT - 1, (4, 1), 0.5)
    with pytest.raises(ValueError, match=r"non-negative \(got nan at \[0, 0\]\)$"):
        reorder.search(torch.full((4, 4), torch.nan), (4, 1), 0.5)


def test_scipy_takes_no_half_precision():
    with pytest.raises(ValueError, match=r"float32 or float64.*got torch.bfloat16.*\.float\(\)"):
        LAYOUT.to_scipy_bsr(LAYOUT.pack(WEIGHT).bfloat16())


def test_a_plot_goes_to_a_path():
    with pytest.raises(TypeError, match=r"BlockLayout.plot: path must name the file .*\(got 5\)"):
        LAYOUT.plot(5)


def test_lazy_layers_have_no_size_yet():
    with pytest.raises(ValueError, match=r"from_dense: the weight's size is not known yet: call"):
        SparseConv2d.from_dense(nn.LazyConv2d(32, 3), sparsity=0.5)


@pytest.mark.parametrize(
    ("argument", "got"),
    [
        ({"stride": 1.5}, r"stride must be an int or 2 ints of at least 1 \(got \(1.5, 1.5\)\)"),
        ({"stride": 0}, r"stride must be .* at least 1 \(got \(0, 0\)\)"),
        ({"dilation": 0}, r"dilation must be .* at least 1"),
        ({"padding": -1}, r"padding must be an int or 2 ints of at least 0 \(got \(-1, -1\)\)"),
        ({"padding": (1, 2, 3)}, r"padding must be an int or 2 ints .*\(got \(1, 2, 3\)\)"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size must be an int or 2 ints .*\(got \(3, 3, 3\)\)"),
    ],
    ids=str,
)
def test_sizes_of_a_convolution(argument, got):
    """Which nn.Conv2d would take, and fail on in its first call."""
    layout = BlockLayout.from_dense(torch.randn(32, 16, 3, 3), (4, 1), 0.5, reorder=False)
    with pytest.raises(ValueError, match=f"SparseConv2d: {got}"):
        SparseConv2d(16, 32, **{"kernel_size": 3, **argument}, layout=layout)


def test_a_tuple_of_one_size_counts_for_both_axes():
    dense = nn.Conv2d(16, 32, 3, stride=(2,), padding=(1,))
    sparse = SparseConv2d.from_dense(dense, sparsity=0.0, **FAST)
    assert (sparse.stride, sparse.padding) == ((2, 2), (1, 1))
    x = torch.randn(2, 16, 7, 6)
    torch.testing.assert_close(sparse(x), dense(x))
    assert torch.equal(sparse.to_dense()(x), dense(x))


@pytest.mark.parametrize("flag", ["inplace", "progress", "return_report"])
def test_fold_names_itself_where_a_flag_is_none(flag):
    with pytest.raises(ValueError, match=rf"tetris.fold: {flag} must be True or False \(got 'x'"):
        tetris.fold(mlp(), EXAMPLE, sparsity=0.5, **FAST, **{flag: "x"})


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("tetris.densify: inplace", lambda: tetris.densify(mlp(), inplace="x")),
        ("tetris.analyze: progress", lambda: tetris.analyze(mlp(), EXAMPLE, progress="x", **FAST)),
        (
            "tetris.analyze: measure",
            lambda: tetris.analyze(mlp(), EXAMPLE, measure="x", **FAST),
        ),
        (
            "tetris.shared_orders: progress",
            lambda: tetris.shared_orders(mlp(), EXAMPLE, progress="x"),
        ),
        (
            "TetrisPruner.finalize: inplace",
            lambda: TetrisPruner(mlp(), **FAST).finalize(inplace="x"),
        ),
        (
            "BlockLayout.to_sparse_bsr: packed",
            lambda: LAYOUT.to_sparse_bsr(LAYOUT.pack(WEIGHT), packed="x"),
        ),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_other_flags(name, call):
    with pytest.raises(ValueError, match=rf"{name} must be True or False \(got 'x'\)"):
        call()


def test_scipy_takes_whole_numbers():
    scipy = pytest.importorskip("scipy.sparse")
    matrix = scipy.bsr_matrix(np.arange(16).reshape(4, 4), blocksize=(2, 2))
    layout, values = BlockLayout.from_scipy_bsr(matrix)
    assert (layout.to_scipy_bsr(values) != matrix).nnz == 0


LAYERS = {
    "SparseLinear": (linear, (2, 16)),
    "SparseConv1d": (lambda: nn.Conv1d(16, 32, 3), (2, 16, 5)),
    "SparseConv2d": (lambda: nn.Conv2d(16, 32, 3), (2, 16, 5, 5)),
    "SparseConvTranspose2d": (lambda: nn.ConvTranspose2d(16, 32, 3), (2, 16, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_of_another_layout_or_type(name):
    dense, shape = LAYERS[name]
    layer = getattr(tetris, name).from_dense(dense(), sparsity=0.5, **FAST)
    x = torch.randn(shape)
    with pytest.raises(
        ValueError, match=rf"{name}: input must be .*dense.*torch.sparse_coo; .*\.to_dense\(\)"
    ):
        layer(x.to_sparse())
    message = (
        rf"{name}: input must be of the type of the layer's values .*got torch.float64 and "
        r"torch.float32.*input.to\(torch.float32\)"
    )
    with pytest.raises(TypeError, match=message):
        layer(x.double())
    with pytest.raises(TypeError, match=r"float32 and torch.float64.*input.to\(torch.float64\)"):
        layer.double()(x)
    with torch.autocast("cpu", torch.bfloat16):  # which casts what it knows
        assert layer.float()(x.bfloat16()).dtype == torch.float32
