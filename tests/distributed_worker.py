"""One process of tests/test_distributed.py: trains every case and saves what it ended with.

    torchrun --nproc_per_node=2 tests/distributed_worker.py FOLDER

Run without torchrun it is the one process on the joined batch; it comes first.
"""

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tetris.prune import Cubic, Latency, Regrow, TetrisPruner, VRPGEPruner, ranks

BATCH, STEPS = 12, 10
CUBIC = Cubic(begin=1, end=7, every=2)


def gradient(name, layer):
    """Worth that depends on the data: |W * gradient| of the batch before."""
    weight = layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else None
    weight = layer.weight if weight is None else weight
    return (weight.detach() * weight.grad).abs()


CASES = {
    "masked": {},
    "masked-cubic": {"schedule": CUBIC},
    "masked-global": {"schedule": CUBIC, "scope": "global"},
    "masked-refreshed": {"schedule": CUBIC, "search_every_update": True},
    "masked-by-gradient": {"schedule": CUBIC, "importance": gradient},
    "sparse": {"execution": "sparse"},
    "sparse-cubic": {"execution": "sparse", "schedule": CUBIC},
    "sparse-regrown": {"execution": "sparse", "regrow": Regrow(share=0.4, every=3)},
    "sparse-random": {"execution": "sparse", "regrow": Regrow(share=0.4, every=3, by="random")},
    "convolution": {"schedule": CUBIC},
    "sparse-convolution": {"execution": "sparse", "schedule": CUBIC},
    "masked-searched": {"search_at": (4, 7), "schedule": CUBIC},
    "masked-regrown": {"regrow": Regrow(share=0.4, every=3)},
    "sparse-searched": {"execution": "sparse", "search_at": (4, 7), "schedule": CUBIC},
}


def network(case):
    torch.manual_seed(0)
    if "convolution" in case:
        body = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
        return nn.Sequential(*body, nn.Flatten(), nn.Linear(16 * 16, 5)).double()
    body = [nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *body, nn.Linear(32, 5)).double()


def batches(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(BATCH, 1, 8, 8, generator=generator, dtype=torch.float64)
        yield x, torch.randint(5, (BATCH,), generator=generator)


def train(case, settings, rank, world):
    model = network(case)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    wrap = DistributedDataParallel if world > 1 else lambda m: m
    wrapped = wrap(model)

    def step(x, y, after=lambda: None):
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x[rank::world]), y[rank::world]).backward()
        optimizer.step()
        after()

    (first, *others) = batches(STEPS)
    step(*first)  # momentum and gradients are there when blocks go
    classifier = str(len(model) - 1)
    pruner = TetrisPruner(
        model,
        **{"block": (4, 2), "sparsity": 0.75, "sweeps": 2, "exclude": classifier} | settings,
        optimizers=optimizer,
    )
    wrapped = wrap(model)
    for x, y in others:
        before = pruner.layouts()
        step(x, y, pruner.step)
        if pruner.execution == "sparse" and pruner.layouts() != before:
            wrapped = wrap(model)
    layouts = pruner.layouts()
    sparse = pruner.finalize()
    probe = next(batches(1))[0]
    return {"layouts": layouts, "state": sparse.state_dict(), "output": sparse(probe).detach()}


def half_and_half(rank, world, start=None):
    """Ten steps on momentum, masks and regrowth; from a state after five, if there is one."""
    model = network("")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = TetrisPruner(
        model, block=(4, 2), sparsity=0.75, sweeps=2, exclude="5", optimizers=optimizer,
        schedule=Cubic(0, 8), regrow=Regrow(share=0.4, every=3),
    )  # fmt: skip
    wrapped = DistributedDataParallel(model) if world > 1 else model
    parts = pruner, model, optimizer
    if start is not None:
        for part, state in zip(parts, start, strict=True):
            part.load_state_dict(state)
    for step, (x, y) in enumerate(batches(STEPS)):
        if step == STEPS // 2 and start is None:
            half = copy.deepcopy([part.state_dict() for part in parts])
        if step >= STEPS // 2 or start is None:
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x[rank::world]), y[rank::world]).backward()
            optimizer.step()
            pruner.step()
    found = {"layouts": pruner.layouts(), "state": copy.deepcopy(model.state_dict())}
    return found if start is not None else {**found, "half": half}


def train_sampled(rank, world):
    """VR-PGE: the pruner averages gradients itself, so nothing is wrapped."""
    model = network("")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = VRPGEPruner(
        model, sparsity=0.5, block=(4, 2), sweeps=2, exclude="5", optimizers=optimizer
    )
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        pruner.backward(lambda x=x, y=y: F.cross_entropy(model(x[rank::world]), y[rank::world]))
        optimizer.step()
        pruner.step()
    gates = pruner.gates.s.clone()
    pruner.prune()
    probe = next(batches(1))[0]
    return {"gates": gates, "state": model.state_dict(), "output": model(probe).detach()}


def main():
    folder = Path(sys.argv[1])
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    results = {case: train(case, settings, rank, world) for case, settings in CASES.items()}
    results["sampled"] = train_sampled(rank, world)
    results["straight"] = half_and_half(rank, world)
    if world > 1:
        results |= alone(rank)
        one = torch.load(folder / "0-of-1.pt", weights_only=False)["straight"]["half"]
        results["from one"] = half_and_half(rank, world, one)
        dist.destroy_process_group()
    torch.save(results, folder / f"{rank}-of-{world}.pt")


def alone(rank):
    """What needs no counterpart in one process."""
    found = {}
    # A search for a time, of weights large enough that no two processes would find the same.
    torch.manual_seed(0)
    pruner = TetrisPruner(nn.Sequential(nn.Linear(128, 128)), block=(4, 4), budget=0.2)
    found["timed"] = pruner.layouts()
    # Choices by time: this process is told to measure in its own way.
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    x = torch.randn(64 if rank == 0 else 2048, 256)
    pruner = TetrisPruner(model, target=Latency(0.5, x, blocks=[(4, 1), (16, 1)]), sweeps=1)
    found["latency"] = {n: (o.block, o.sparsity) for n, o in pruner.layer_options.items()}
    found["latency layouts"] = pruner.layouts()
    torch.manual_seed(rank)
    for name, make in {
        "other weights": lambda: TetrisPruner(nn.Sequential(nn.Linear(32, 32)), sweeps=1),
        "first fails": lambda: ranks.first(lambda: 1 / 0),
        "wrapper": lambda: TetrisPruner(DistributedDataParallel(network(""))),
    }.items():
        try:
            make()
            found[name] = "nothing was raised"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    found["not wrapped anew"] = not_wrapped_anew(rank)
    return found


def not_wrapped_anew(rank):
    """Blocks go while DistributedDataParallel still counts on the sizes that it saw."""
    model = network("")
    wrapped = DistributedDataParallel(model)
    TetrisPruner(model, block=(4, 2), sweeps=1, execution="sparse", exclude="5")
    try:
        for x, _ in batches(2):
            wrapped(x[rank::2]).sum().backward()
        return "nothing was raised"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
