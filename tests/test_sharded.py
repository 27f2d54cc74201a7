"""FSDP2 in two processes: sparse layers and masks end where one process does; what cannot, says so.

``torchrun`` starts two processes of tests/sharded_worker.py; one runs alone on the joined batch.
"""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parent))

from distributed_launch import python, torchrun

if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)
pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP2")
if not hasattr(distributed.fsdp, "fully_shard"):
    pytest.skip("this torch has no FSDP2", allow_module_level=True)

import sharded_worker
import tetris
from tetris.prune import TetrisPruner

WORKER = Path(sharded_worker.__file__)
RESUMED = [f"{case} from {start}" for case in sharded_worker.RESUMED for start in ("one", "two")]
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # sums of two processes are rounded in another order


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process on the joined batch, and each of two, ended with."""
    folder = tmp_path_factory.mktemp("sharded")
    python(WORKER, folder)  # first: the two go on from its checkpoint
    torchrun(WORKER, folder)
    names = ("0-of-1", "0-of-2", "1-of-2")
    return [torch.load(folder / f"{name}.pt", weights_only=False) for name in names]


@pytest.mark.parametrize("case", [*sharded_worker.CASES, *RESUMED])
def test_two_processes_end_where_one_does(results, case):
    """Also from a checkpoint of the other number of processes."""
    alone = results[0][case.split(" ")[0]]
    first, second = results[1][case], results[2][case]
    assert first["layouts"] == second["layouts"] == alone["layouts"]
    assert first["state"].keys() == alone["state"].keys()
    for name, tensor in alone["state"].items():
        torch.testing.assert_close(first["state"][name], tensor, **CLOSE)
        torch.testing.assert_close(second["state"][name], first["state"][name], **EXACT)


def test_the_cases_do_what_they_are_called(results):
    layouts = {case: results[1][case]["layouts"] for case in sharded_worker.CASES}
    assert layouts["sparse"] is None
    assert layouts["searched"]["2"].row_perm.tolist() != layouts["cubic"]["2"].row_perm.tolist()
    assert layouts["regrown"]["2"] != layouts["one-shot-sparse"]["2"]
    assert layouts["by-norm"]["2"] != layouts["cubic"]["2"]
    shares = [found["2"].sparsity for found in layouts.values() if found]
    assert all(0.6 < share <= 0.8 for share in shares)


def test_the_state_of_shards_ends_in_a_file_of_sparse_layers(results, tmp_path):
    """The recipe of docs/distributed.md: full state, a whole model, finalize, save."""
    found = results[1]["cubic"]
    model = sharded_worker.network()
    settings = {**sharded_worker.FAST, **sharded_worker.CASES["cubic"], "include": ["0", "2"]}
    pruner = TetrisPruner(model, **settings)
    pruner.load_state_dict(found["pruner"])
    model.load_state_dict(found["state"])
    sparse = pruner.finalize()
    tetris.save(sparse, tmp_path / "sparse.safetensors")
    again = tetris.load(tmp_path / "sparse.safetensors", sharded_worker.network())
    x, _ = sharded_worker.batch(100)
    torch.testing.assert_close(again(x), model(x))
    assert again[2].layout == found["layouts"]["2"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pruner", "TetrisPruner: .*let layers be masked or sparse first, then fully_shard"),
        ("sparsify", "tetris.sparsify: .*then fully_shard"),
        ("finalize", "TetrisPruner.finalize: .*load the full state dict"),
        ("remove", "TetrisPruner.remove: .*load the full state dict"),
        ("stored", "TetrisPruner: layer '0': .*use execution='masked'"),
        ("fsdp1", r"TetrisPruner: FullyShardedDataParallel \(FSDP1\) flattens"),
        ("synaptic", r"SynapticPruner.step: .*after prune\(\)"),
        ("vrpge", r"VRPGEPruner.backward: .*after prune\(\)"),
        ("relayout", "tetris.relayout: .*change blocks before fully_shard"),
        ("save", "tetris.save: .*load the full state dict"),
        ("densify", r".*SparseConv2d.to_dense: "),
        ("fisher", "tetris.prune.Fisher: .*rate by magnitude or ActivationNorm"),
        ("other layout", r".*values are \[108, 3, 4\] in the state, \[\d+, 3, 4\] here"),
    ],
)
def test_what_shards_do_not_go_with(results, what, message):
    for result in results[1:]:
        assert re.match(rf"(?s)\w+Error: {message}", result["errors"][what])
