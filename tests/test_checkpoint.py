"""tetris.save and tetris.load: what is written comes back, and nothing else is accepted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import tetris


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, bias=False),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, groups=2),
        nn.Flatten(),
        nn.Linear(16 * 12 * 12, 10),
    )


class Tied(nn.Module):
    """Two layers that share one weight, and one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(self.a(x))))


def sparse(model: nn.Module, **arguments) -> nn.Module:
    return tetris.sparsify(model, **{"sparsity": 0.7, "block": (4, 2), "sweeps": 1, **arguments})


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = sparse(convolutional(), overrides={"6": {"block": (3, 5), "sparsity": 0.9}}).eval()
    path = tmp_path / "model.safetensors"
    tetris.save(model, path)
    return model, path


def same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    for name, module in a.named_modules():
        assert type(module) is type(b.get_submodule(name))


def test_a_dense_architecture_becomes_the_saved_model(saved):
    model, path = saved
    fresh = convolutional()
    loaded = tetris.load(path, fresh)
    assert loaded is fresh
    same(model, loaded)
    x = torch.randn(2, 3, 14, 14)
    assert torch.equal(model(x), loaded.eval()(x))
    assert isinstance(loaded[3], tetris.SparseConv2d)
    assert loaded[3].layout == model[3].layout


def test_a_sparse_architecture_of_another_sparsity_takes_it_too(saved):
    model, path = saved
    other = sparse(convolutional(), sparsity=0.5, block=(8, 1))
    values = other[3].values
    same(model, tetris.load(path, other))
    assert other[3].values is values  # an optimizer that has not stepped goes on


def test_a_single_layer(tmp_path):
    layer = tetris.SparseLinear.from_dense(nn.Linear(20, 30), sparsity=0.5, activation="gelu")
    tetris.save(layer, tmp_path / "layer.safetensors")
    loaded = tetris.load(tmp_path / "layer.safetensors", nn.Linear(20, 30))
    assert isinstance(loaded, tetris.SparseLinear)
    assert loaded.activation == "gelu"
    same(layer, loaded)


def test_shared_weights_are_stored_once_and_stay_shared(tmp_path):
    model = sparse(Tied())
    path = tmp_path / "tied.safetensors"
    tetris.save(model, path)
    with safe_open(path, "pt") as file:
        assert "b.values" not in file.keys()  # noqa: SIM118
    loaded = tetris.load(path, Tied())
    assert loaded.a.values is loaded.b.values
    same(model, loaded)


def test_views_of_one_storage_that_differ_are_kept_apart(tmp_path):
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.arange(12.0)
            self.register_buffer("left", base[:8])
            self.register_buffer("right", base[4:])

    model, fresh = Views(), Views()
    fresh.left, fresh.right = torch.zeros(8), torch.zeros(8)
    tetris.save(model, tmp_path / "views.safetensors")
    same(model, tetris.load(tmp_path / "views.safetensors", fresh))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_are_kept(tmp_path, dtype):
    model = sparse(nn.Sequential(nn.Linear(16, 16)).to(dtype))
    tetris.save(model, tmp_path / "m.safetensors")
    loaded = tetris.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(16, 16)).to(dtype))
    assert loaded[0].values.dtype == dtype
    same(model, loaded)


def test_no_stored_block_and_a_frozen_weight(tmp_path):
    dense = nn.Sequential(nn.Linear(8, 8))
    model = sparse(dense, sparsity=1.0, allow_empty_rows=True)
    tetris.save(model, tmp_path / "m.safetensors")
    fresh = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    loaded = tetris.load(tmp_path / "m.safetensors", fresh)
    same(model, loaded)
    assert not loaded[0].values.requires_grad


def test_the_file_is_small_and_loads_without_pruning_code(tmp_path):
    model = tetris.sparsify(nn.Sequential(nn.Linear(512, 512)), sparsity=0.9, block=(16, 16))
    path = tmp_path / "m.safetensors"
    tetris.save(model, path)
    dense = 512 * 512 * 4
    assert path.stat().st_size < 0.13 * dense
    script = f"""
import torch, tetris
from torch import nn
model = tetris.load({str(path)!r}, nn.Sequential(nn.Linear(512, 512)))
print(model(torch.ones(1, 512)).double().sum().item())
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert float(out) == model(torch.ones(1, 512)).double().sum().item()


def test_an_interrupted_save_leaves_the_old_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        tetris.save(model, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def refused(path: Path, model: nn.Module, match: str, error=ValueError) -> None:
    """Loading raises and changes nothing."""
    types = [type(m) for m in model.modules()]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=match):
        tetris.load(path, model)
    assert types == [type(m) for m in model.modules()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_a_cut_file(saved, keep):
    _, path = saved
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, convolutional(), "not a whole safetensors file")


@pytest.mark.parametrize("where", [-1, -5000, -20000])
def test_an_altered_number(saved, where):
    _, path = saved
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    refused(path, convolutional(), "was altered")


def rewritten(path: Path, change) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    about = json.loads(metadata["tetris"])
    change(about, tensors)
    save_file(tensors, path, {"tetris": json.dumps(about)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda about, _: about.update(format=99), "format 99"),
        (lambda about, _: about["layers"]["3"].update(activation="relu"), "was altered"),
        (lambda about, _: about.pop("layers"), "was altered"),
        (lambda about, _: about.pop("digest"), "was altered"),
        (lambda _, tensors: tensors.pop("3.values"), "was altered"),
        (lambda _, tensors: tensors["3.col_idx"].add_(1), "was altered"),
    ],
)
def test_altered_contents(saved, change, match):
    _, path = saved
    rewritten(path, change)
    refused(path, convolutional(), match)


def test_other_files(tmp_path):
    path = tmp_path / "plain.safetensors"
    save_file({"0.weight": torch.zeros(4, 4)}, path)
    refused(path, convolutional(), "not written by tetris.save")
    refused(tmp_path / "absent", convolutional(), "there is no file", FileNotFoundError)
    torch.save({}, path)
    refused(path, convolutional(), "not a whole safetensors file: .* torch.load reads")


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(("wrap", "inner"), [(compiled, "_orig_mod"), (nn.DataParallel, "module")])
def test_wrappers_are_named(saved, tmp_path, wrap, inner):
    model, path = saved
    refused(path, wrap(convolutional()), f"Load into what .* wraps, model.{inner}")
    dense = tmp_path / "dense"
    for wrapped, target in ((wrap(model), path), (wrap(convolutional()), dense)):
        tetris.save(wrapped, target)
        refused(target, convolutional(), f"saved from a wrapper of .*: save model.{inner} instead")


def test_layers_that_are_sparse_in_the_model_alone(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    path = tmp_path / "m"
    tetris.save(sparse(model, exclude="1"), path)
    refused(path, sparse(model), "Dense in the file, sparse here: 1. Load into a dense")


def forged(path: Path, change) -> None:
    """Rewrite a file with a digest that fits, as a faulty or hostile writer may."""

    def and_sign(about, tensors):
        change(about, tensors)
        about.pop("digest")
        about["digest"] = tetris.checkpoint._digest(about, tensors)

    rewritten(path, and_sign)


@pytest.mark.parametrize("to", [convolutional, lambda: sparse(convolutional(), sparsity=0.5)])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda _, t: t.update({"3.more": torch.zeros(2)}), r"have 3\.more more"),
        (lambda _, t: t.pop("3.values"), r"lack 3\.values"),
        (lambda _, t: t.pop("3._extra_state"), r"lack 3\._extra_state"),
        (lambda _, t: t.update({"3._extra_state": torch.ones(2)}), "'3' does not fit"),
        (lambda _, t: t.update({"3.values": torch.zeros(3, 2)}), "'3' does not fit"),
        (lambda _, t: t.update({"3.values": t["3.values"].int()}), "values must be a floating"),
        (lambda _, t: t["3.col_idx"].add_(1000), "'3' does not fit.*col_idx"),
        (lambda _, t: t.update({"6.bias": torch.zeros(3)}), r"bias must be \[10\]"),
        (lambda about, _: about["layers"]["3"].update(activation="evil"), "fuses 'evil'"),
        (lambda about, _: about["layers"]["3"].update(sizes=[1, 2]), "'3' does not fit"),
        (lambda about, _: about["layers"]["3"].update(type="Module"), "is a Module"),
        (lambda about, _: about["aliases"].update(a="absent"), "was altered"),
        (lambda about, _: about.update(layers=[]), "was altered"),
        (lambda about, _: about.pop("version"), "was altered"),
        (lambda about, _: about.update(format="1"), "format '1'"),
    ],
)
def test_forged_contents(saved, change, match, to):
    _, path = saved
    forged(path, change)
    refused(path, to(), match)


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000, "{}"])
def test_metadata_that_is_none(tmp_path, text):
    save_file({"a": torch.zeros(1)}, tmp_path / "m", {"tetris": text})
    refused(tmp_path / "m", convolutional(), "was altered")


class Refuses(nn.Linear):
    """Has a state of its own, which it does not take."""

    def get_extra_state(self):
        return torch.ones(1)

    def set_extra_state(self, state):
        raise RuntimeError("not today")


def test_a_model_that_refuses_is_as_before(tmp_path):
    def build():
        return nn.Sequential(
            nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), Refuses(16, 2)
        )

    tetris.save(sparse(build(), include=["0", "2"]), tmp_path / "m")
    refused(tmp_path / "m", build(), "the model refuses what the file holds: not today")
    other = sparse(build(), include=["0", "2"], sparsity=0.3)
    other(torch.randn(4, 16)).sum().backward()
    values, gradient = other[0].values, other[0].values.grad
    refused(tmp_path / "m", other, "not today")
    assert other[0].values is values
    assert values.grad is gradient


def test_tensors_of_another_kind(tmp_path):
    class Counts(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.register_buffer("count", torch.tensor([1.5, 2.5]).to(dtype))

    path = tmp_path / "m"
    tetris.save(sparse(Counts(torch.float32)), path)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        refused(path, Counts(dtype), f"'count' must be {dtype} as in the model .got torch.float32")
    assert tetris.load(path, Counts(torch.bfloat16)).count.dtype == torch.bfloat16
    for kind in (torch.complex64, torch.float8_e4m3fn):
        model = sparse(Counts(kind))
        tetris.save(model, path)
        loaded = tetris.load(path, Counts(kind))
        assert torch.equal(loaded.count.to(torch.complex64), model.count.to(torch.complex64))


def test_weights_that_are_tied_here_but_not_there(tmp_path):
    model = Tied()
    model.b = nn.Linear(32, 32)
    tetris.save(sparse(model, include="c"), tmp_path / "m")
    refused(tmp_path / "m", Tied(), "'a.weight' and 'b.weight' are one tensor in the model")
    tetris.save(sparse(Tied(), include="c"), tmp_path / "m")
    assert torch.equal(tetris.load(tmp_path / "m", model).b.weight, model.a.weight)


def test_models_that_cannot_hold_it(saved, tmp_path):
    _, path = saved
    with pytest.raises(ValueError, match=r"'3': the weight must be float32.*got torch\.bfloat16"):
        tetris.load(path, convolutional().bfloat16())
    with pytest.raises(ValueError, match="'3': the weight is on the meta device"):
        tetris.load(path, convolutional().to("meta"))
    tetris.save(nn.Linear(4, 4), path)
    with pytest.raises(ValueError, match="'weight' is on the meta device in the model"):
        tetris.load(path, nn.Linear(4, 4, device="meta"))
    odd = nn.Linear(4, 4)
    odd.register_buffer("odd", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="'odd' must be a strided tensor"):
        tetris.save(odd, path)


def other_architectures():
    def changed(index: int, layer: nn.Module) -> nn.Module:
        model = convolutional()
        model[index] = layer
        return model

    yield changed(6, nn.Linear(16 * 12 * 12, 11)), "'6' does not fit"
    yield changed(6, nn.Linear(16 * 12 * 12, 10, bias=False)), "'6' has no bias"
    yield changed(3, nn.Conv2d(16, 32, 5, bias=False)), "'3' does not fit"
    yield changed(3, nn.Linear(16, 32, bias=False)), "'3' is a SparseConv2d"
    yield changed(4, nn.Conv2d(32, 16, 4, groups=2)), "'4' is a SparseConvTranspose2d"
    yield changed(1, nn.BatchNorm2d(8)), r"'1\.weight' must be \[8\]"
    yield changed(1, nn.Identity()), "has 1.bias, 1.num_batches_tracked"
    yield nn.Sequential(), "has a sparse layer '3'"
    yield nn.Sequential(*convolutional(), nn.Linear(10, 2)), "lacks 7.bias, 7.weight"


@pytest.mark.parametrize(("model", "match"), list(other_architectures()))
def test_another_architecture(saved, model, match):
    _, path = saved
    refused(path, model, match)


def test_a_fused_model_says_when_to_fuse(tmp_path):
    model = tetris.fuse(sparse(convolutional(), include="3").eval())
    model = model[0] if isinstance(model, tuple) else model
    path = tmp_path / "fused.safetensors"
    tetris.save(model, path)
    refused(path, convolutional(), "save before tetris.fuse")


def test_layers_with_hooks_are_not_replaced(saved):
    _, path = saved
    model = convolutional()
    model[3].register_forward_hook(lambda *_: None)
    refused(path, model, "forward_hooks")
    model = convolutional()
    model[3].register_load_state_dict_post_hook(lambda *_: None)
    model[3].weight.register_hook(lambda grad: grad)
    refused(path, model, "has load_state_dict_post_hooks, parameter_backward_hooks, which would")


def test_bad_arguments(saved, tmp_path):
    model, path = saved
    with pytest.raises(TypeError, match="path comes first"):
        tetris.load(model, path)
    with pytest.raises(TypeError, match="must be an nn.Module"):
        tetris.save(model.state_dict(), path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        tetris.save(model, tmp_path / "none" / "m.safetensors")
    pruner = tetris.prune.TetrisPruner(nn.Sequential(nn.Linear(32, 32)), sparsity=0.5, sweeps=1)
    with pytest.raises(ValueError, match=r"pruner.finalize\(\)"):
        tetris.save(pruner.model, path)
    with pytest.raises(ValueError, match="meta device"):
        tetris.save(nn.Linear(2, 2, device="meta"), path)


def test_torch_save_and_state_dict_keep_working(saved, tmp_path):
    model, _ = saved
    torch.save(model, tmp_path / "whole.pt")
    same(model, torch.load(tmp_path / "whole.pt", weights_only=False))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = sparse(convolutional(), sparsity=0.2)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    same(model, other)
