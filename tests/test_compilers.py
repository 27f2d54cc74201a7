"""Sparse models through torch.compile, torch.export, AOTInductor and ONNX (docs/compilers.md).

test_compile.py has the ops; these are whole models.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tetris

ROOT = Path(__file__).parents[1]


class Net(nn.Module):
    """Convolutions, and linear layers of which one is called twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.mix = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        x = x + nn.functional.gelu(self.mix(nn.functional.gelu(self.mix(x))))
        return self.head(x)


@pytest.fixture
def sparse():
    torch.compiler.reset()
    torch.manual_seed(0)
    return tetris.sparsify(Net().eval(), sparsity=0.5, block=(4, 4), sweeps=1)


def images(batch):
    return torch.randn(batch, 16, 6, 6, generator=torch.Generator().manual_seed(batch))


class Counting:
    """A backend that counts graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph


def test_any_batch_compiles_once(sparse):
    count = Counting()
    compiled = torch.compile(sparse, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for batch in (2, 3, 7, 64):
            torch.testing.assert_close(compiled(images(batch)), sparse(images(batch)))
    assert count.graphs == 1


def test_a_batch_that_is_marked_compiles_once(sparse):
    count = Counting()
    compiled = torch.compile(sparse, fullgraph=True, backend=count)
    with torch.no_grad():
        for batch in (2, 3, 7):
            x = images(batch)
            torch._dynamo.mark_dynamic(x, 0, min=2, max=1024)
            torch.testing.assert_close(compiled(x), sparse(x))
    assert count.graphs == 1


def test_other_weights_of_the_same_layout_do_not_compile_again(sparse):
    count = Counting()
    compiled = torch.compile(sparse, fullgraph=True, backend=count)
    with torch.no_grad():
        compiled(images(4))
        for parameter in sparse.parameters():
            parameter.mul_(0.5)
        torch.testing.assert_close(compiled(images(4)), sparse(images(4)))
        other = {n: t.clone() for n, t in sparse.state_dict().items()}
        sparse.load_state_dict(other)
        compiled(images(4))
    assert count.graphs == 1


def test_a_training_step_is_one_graph(sparse):
    count = Counting()
    sparse.train()
    compiled = torch.compile(sparse, fullgraph=True, dynamic=True, backend=count)
    for batch in (4, 5):
        want = torch.autograd.grad(sparse(images(batch)).square().sum(), sparse.conv.values)[0]
        got = torch.autograd.grad(compiled(images(batch)).square().sum(), sparse.conv.values)[0]
        torch.testing.assert_close(got, want)
    assert count.graphs == 1


def exported(model):
    batch = torch.export.Dim("batch", min=1, max=4096)
    return torch.export.export(model, (images(4),), dynamic_shapes=({0: batch},))


EXPORTED = """
import sys, torch, tetris
for file in sys.argv[2:]:
    program = torch.export.load(file).module()
    for x, want in torch.load(sys.argv[1]):
        torch.testing.assert_close(program(x), want)
print(tetris._C.last_kernel())
"""


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_an_exported_file_in_a_fresh_process(sparse, tmp_path):
    """Nothing of the model's code is there, and the batch is any; as it is, and fused."""
    files = [tmp_path / "net.pt2", tmp_path / "fused.pt2"]
    for model, file in zip((sparse, tetris.fuse(sparse)), files, strict=True):
        torch.export.save(exported(model), file)
    with torch.no_grad():
        torch.save([(images(n), sparse(images(n))) for n in (1, 2, 9)], tmp_path / "data")
    assert run(EXPORTED, tmp_path / "data", *files).startswith("bsmm_f32_")


PACKAGE = """
import sys, torch, tetris
model = torch._inductor.aoti_load_package(sys.argv[1])
for x, want in torch.load(sys.argv[2]):
    torch.testing.assert_close(model(x), want)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_package_of_a_model_in_a_fresh_process(sparse, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("AOTInductor needs g++")
    package = str(tmp_path / "net.pt2")
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(exported(sparse), package_path=package)
        torch.save([(images(n), sparse(images(n))) for n in (1, 2, 9)], tmp_path / "data")
    run(PACKAGE, package, tmp_path / "data")


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_the_sparse_model_says_what_to_do(sparse, tmp_path):
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module, reason=f"needs {module}, of tetris[test]")
    docs = " ".join((ROOT / "docs/compilers.md").read_text().split())
    path = tmp_path / "net.onnx"
    hint = "tetris::bs.*: ONNX has no block-sparse.*tetris.densify"
    with pytest.warns(UserWarning, match=hint) as caught:
        with pytest.raises(torch.onnx.OnnxExporterError) as error:
            torch.onnx.export(sparse, (images(4),), path, dynamo=True, verbose=False)
    assert {w.filename for w in caught if "block-sparse" in str(w.message)} == {__file__}
    assert "No ONNX function found for <OpOverload(op='tetris." in str(error.value)
    assert "No ONNX function found for <OpOverload(op='tetris." in docs
    with pytest.raises(RuntimeError, match="operator with unrecognized namespace tetris::"):
        torch.onnx.export(sparse, (images(4),), path, dynamo=False)
    assert "operator with unrecognized namespace tetris::" in docs


def test_nothing_is_said_of_onnx_elsewhere(sparse, recwarn):
    torch.export.export(sparse, (images(4),))
    assert not [w for w in recwarn if "ONNX" in str(w.message)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_of_the_masked_dense_model(sparse, tmp_path):
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module, reason=f"needs {module}, of tetris[test]")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, of tetris[test]")
    dense = tetris.densify(sparse)
    path = tmp_path / "net.onnx"
    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.onnx.export(
        dense, (images(4),), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for n in (1, 4, 9):
        got = torch.from_numpy(session.run(None, {name: images(n).numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(got, sparse(images(n)), rtol=1e-4, atol=1e-4)
