"""Pruners under torchrun: two processes keep the same blocks, and end where one would."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from distributed_launch import python, torchrun
from distributed_worker import CASES, half_and_half

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one process on the joined batch, and each of two, ended with."""
    folder = tmp_path_factory.mktemp("distributed")
    worker = ROOT / "tests" / "distributed_worker.py"
    python(worker, folder)
    torchrun(worker, folder)
    names = ("0-of-1", "0-of-2", "1-of-2")
    return [torch.load(folder / f"{name}.pt", weights_only=False) for name in names]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_where_one_does(results, case):
    alone, first, second = (result[case] for result in results)
    assert first["layouts"] == second["layouts"] == alone["layouts"]
    kept = (layout.sparsity for layout in alone["layouts"].values())
    assert all(0.7 < share < 0.8 for share in kept) or CASES[case].get("scope") == "global"
    for name, tensor in alone["state"].items():
        torch.testing.assert_close(first["state"][name], tensor, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(second["state"][name], first["state"][name], rtol=0, atol=0)
    torch.testing.assert_close(first["output"], alone["output"], rtol=1e-9, atol=1e-11)


def test_states_go_from_one_number_of_processes_to_another(results):
    alone, first, second = (result["straight"] for result in results)
    up, down = results[1]["from one"], half_and_half(0, 1, first["half"])
    for found in (first, second, up, down):
        assert found["layouts"] == alone["layouts"]
        for name, tensor in alone["state"].items():
            torch.testing.assert_close(found["state"][name], tensor, rtol=1e-9, atol=1e-11)


def test_masked_and_sparse_execution_agree(results):
    masked, sparse = results[1]["masked-cubic"], results[1]["sparse-cubic"]
    assert masked["layouts"] == sparse["layouts"]
    torch.testing.assert_close(masked["output"], sparse["output"], rtol=1e-9, atol=1e-11)


def test_two_processes_draw_the_same_masks_and_learn_as_one(results):
    alone, first, second = (result["sampled"] for result in results)
    assert len(alone["gates"].unique()) > 100  # they have learnt
    # Rounding grows where losses are subtracted: 2e-9 with AVX2, below 1e-9 with AVX-512.
    torch.testing.assert_close(first["gates"], alone["gates"], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(first["output"], alone["output"], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(second["gates"], first["gates"], rtol=0, atol=0)
    for name, tensor in first["state"].items():
        torch.testing.assert_close(second["state"][name], tensor, rtol=0, atol=0)


def test_a_search_for_a_time_ends_alike(results):
    _, first, second = results
    assert first["timed"] == second["timed"]


def test_a_latency_target_chooses_alike(results):
    _, first, second = results
    assert first["latency"] == second["latency"]
    assert first["latency layouts"] == second["latency layouts"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("other weights", "ValueError: TetrisPruner: layer '0' has other weights in other"),
        ("first fails", "ZeroDivisionError"),
        ("wrapper", "TypeError: TetrisPruner: a pruner takes the model inside"),
        ("not wrapped anew", "RuntimeError: Expected to have finished reduction"),
    ],
)
def test_errors_come_in_every_process(results, what, message):
    for result in results[1:]:
        assert result[what].startswith(message)


@pytest.mark.parametrize(
    "words", [["--execution", "masked"], ["--execution", "sparse"], ["--fsdp"]]
)
def test_example(words):
    said = torchrun(ROOT / "examples" / "distributed.py", "--tiny", *words)
    assert "2 processes: 89.8% removed" in said
    assert "Warning" not in said
