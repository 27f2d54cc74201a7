"""Prune while several processes train one network: DistributedDataParallel under torchrun.

    torchrun --nproc_per_node=2 examples/distributed.py
    torchrun --nproc_per_node=2 examples/distributed.py --execution sparse

Every process makes the same pruner. The first one searches for the order of rows and columns, the
others take it, and all keep the same blocks. With --execution sparse a step costs what is left; the
network is then wrapped anew when blocks have gone, since their gradients have other sizes.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tetris
from tetris.data import load_digits
from tetris.prune import Cubic, TetrisPruner


def main() -> None:
    """Train, prune and print what is left; the first process speaks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--execution", default="masked", choices=("masked", "sparse"))
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of blocks to remove")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="one epoch of a narrow network")
    args = parser.parse_args()
    width, epochs = (64, 1) if args.tiny else (256, args.epochs)

    if not dist.is_torchelastic_launched():
        parser.error("start it as torchrun --nproc_per_node=2 examples/distributed.py")
    dist.init_process_group("gloo")  # torchrun has set what it needs
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same first weights everywhere
    data = load_digits()
    model = nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = epochs * (len(data.train_y) // 64)
    pruner = TetrisPruner(
        model,
        sparsity=args.sparsity,
        block=(8, 1),
        exclude="4",
        schedule=Cubic(begin=steps // 4, end=steps // 2, every=max(1, steps // 40)),
        execution=args.execution,
        optimizers=optimizer,
    )
    ddp = DistributedDataParallel(model)
    for epoch in range(epochs):
        order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64)[: steps // epochs]:
            own = batch[rank::world]  # this process's share of the images
            optimizer.zero_grad()
            F.cross_entropy(ddp(data.train_x[own]), data.train_y[own]).backward()
            optimizer.step()
            before = pruner.layouts()
            pruner.step()
            if args.execution == "sparse" and pruner.layouts() != before:
                ddp = DistributedDataParallel(model)

    sparse = tetris.fuse(pruner.finalize().eval())
    if rank == 0:
        with torch.inference_mode():
            right = (sparse(data.test_x).argmax(1) == data.test_y).float().mean()
        print(f"{world} processes: {pruner.sparsity:.1%} removed, {right:.1%} of test digits right")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
