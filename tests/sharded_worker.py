"""One process of tests/test_sharded.py: FSDP2 over sparse layers and masks.

    torchrun --nproc_per_node=2 tests/sharded_worker.py FOLDER

Run without torchrun it is the one process on the joined batch; it goes on from the checkpoint of
the two, where there is one, and they from its.
"""

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import tetris
from tetris.prune import (
    ActivationNorm,
    Cubic,
    Fisher,
    Regrow,
    SynapticPruner,
    TetrisPruner,
    VRPGEPruner,
)

BATCH, STEPS, HALF = 12, 8, 4
CUBIC = Cubic(begin=1, end=6, every=2)
FAST = {"sparsity": 0.7, "block": (4, 3), "sweeps": 2, "exclude": "5"}
CASES = {
    "sparse": None,  # sparse layers from the start
    "cubic": {"schedule": CUBIC},
    "global": {"schedule": CUBIC, "scope": "global", "max_sparsity": 0.8},
    "searched": {"schedule": CUBIC, "search_at": {4}},
    "regrown": {"regrow": Regrow(share=0.4, every=2)},
    "one-shot-sparse": {"execution": "sparse"},
    "by-norm": {"schedule": CUBIC, "importance": "norm"},
}
RESUMED = ("sparse", "searched", "regrown")
CPU = torch.device("cpu")
FULL = StateDictOptions(full_state_dict=True)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 14, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(14 * 16, 5),
    ).double()  # fmt: skip


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (BATCH,), generator=generator)


class Run:
    """Model, pruner and optimizer; sharded where there are several processes."""

    def __init__(self, case, rank, world):
        self.rank, self.world = rank, world
        self.model, self.pruner = network(), None
        if CASES[case] is None:
            self.model = tetris.sparsify(self.model, include=["0", "2"], **FAST)
        else:
            settings = dict(CASES[case])
            if settings.get("importance") == "norm":
                settings["importance"] = ActivationNorm([batch(100)[0]])
            self.pruner = TetrisPruner(self.model, include=["0", "2"], **FAST, **settings)
        if world > 1:
            shard(self.model, world)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        if self.pruner is not None:
            self.pruner.attach(self.optimizer)

    def train(self, first, last):
        for step in range(first, last):
            x, y = batch(step)
            self.optimizer.zero_grad()
            out = self.model(x[self.rank :: self.world])
            F.cross_entropy(out, y[self.rank :: self.world]).backward()
            self.optimizer.step()
            if self.pruner is not None:
                self.pruner.step()
        return self

    def result(self):
        state = get_model_state_dict(self.model, options=FULL)
        found = {"state": {k: v.clone() for k, v in state.items()}, "layouts": None}
        if self.pruner is not None:
            found |= {"layouts": self.pruner.layouts(), "pruner": self.pruner.state_dict()}
        return found

    def save(self, folder):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        if self.rank == 0:
            torch.save(self.pruner and self.pruner.state_dict(), folder / "pruner.pt")

    def load(self, folder):
        if self.pruner is not None:
            self.pruner.load_state_dict(torch.load(folder / "pruner.pt"))
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )
        return self


def shard(model, world):
    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def errors(folder, rank, world):
    """What FSDP2 does not go with, in messages."""
    late = network()
    shard(late, world)
    sparse = Run("sparse", rank, world)
    masked = Run("cubic", rank, world)
    stored = network()
    pruner = TetrisPruner(stored, execution="sparse", include=["0", "2"], schedule=CUBIC, **FAST)
    shard(stored, world)
    layer = sparse.model[2]
    other = tetris.sparsify(network(), include=["0", "2"], **{**FAST, "sparsity": 0.5})
    methods = [network(), network()]
    own = {"include": ["0", "2"], **FAST}
    synaptic = SynapticPruner(methods[0], penalty=1e-3, batches=[batch(0)[0]], **own)
    vrpge = VRPGEPruner(methods[1], **own)
    for model in methods:
        shard(model, world)
    tries = {
        "fsdp1": lambda: TetrisPruner(FullyShardedDataParallel(network(), device_id=CPU), **FAST),
        "synaptic": lambda: synaptic.step(0.1),
        "vrpge": lambda: vrpge.backward(lambda: methods[1](batch(0)[0]).sum()),
        "pruner": lambda: TetrisPruner(late, **FAST),
        "sparsify": lambda: tetris.sparsify(late, **FAST),
        "finalize": lambda: masked.pruner.finalize(),
        "remove": lambda: masked.pruner.remove(),
        "stored": lambda: [pruner.step() for _ in range(4)],
        "relayout": lambda: tetris.relayout(layer, layer.layout),
        "save": lambda: tetris.save(sparse.model, folder / "never.safetensors"),
        "densify": lambda: layer.to_dense(),
        "fisher": lambda: Fisher([batch(0)], F.cross_entropy).prepare(late, {"0": late[0]}),
        "other layout": lambda: set_model_state_dict(
            sparse.model, other.state_dict(), options=FULL
        ),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
            found[name] = "nothing was raised"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main():
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    results = {}
    for case in CASES:
        results[case] = Run(case, rank, world).train(0, STEPS).result()
    for case in RESUMED:
        Run(case, rank, world).train(0, HALF).save(folder / f"{case}-{world}")
        earlier = folder / f"{case}-1"
        if world > 1:  # on from the checkpoint of one process, and from our own
            for name, start in (("one", earlier), ("two", folder / f"{case}-2")):
                dist.barrier()
                run = Run(case, rank, world).load(start).train(HALF, STEPS)
                results[f"{case} from {name}"] = run.result()
    if world > 1:
        results["errors"] = errors(folder, rank, world)
        dist.destroy_process_group()
    torch.save(results, folder / f"{rank}-of-{world}.pt")


if __name__ == "__main__":
    main()
