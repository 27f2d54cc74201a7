"""Prune while several processes train one network: DistributedDataParallel under torchrun.

    torchrun --nproc_per_node=2 examples/distributed.py
    torchrun --nproc_per_node=2 examples/distributed.py --execution sparse
    torchrun --nproc_per_node=2 examples/distributed.py --fsdp

Every process makes the same pruner, the first one searches, and all keep the same blocks. With
--execution sparse a step costs what is left; the network is wrapped anew when blocks have gone,
since gradients have other sizes. With --fsdp processes share the parameters (FSDP2), by masks only.
"""

import copy
from argparse import ArgumentParser, RawTextHelpFormatter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tetris
from tetris.data import load_digits
from tetris.prune import Cubic, TetrisPruner


def main() -> None:
    """Train, prune and print what is left; the first process speaks."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--execution", default="masked", choices=("masked", "sparse"))
    parser.add_argument("--fsdp", action="store_true", help="share the parameters, by FSDP2")
    parser.add_argument("--tiny", action="store_true", help="one epoch of a narrow network")
    args = parser.parse_args()
    width, epochs = (64, 1) if args.tiny else (256, 20)
    if not dist.is_torchelastic_launched():
        parser.error("start it as torchrun --nproc_per_node=2 examples/distributed.py")
    dist.init_process_group("gloo")  # torchrun has set what it needs
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same first weights everywhere
    data = load_digits()
    hidden = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(width, 10))
    dense = copy.deepcopy(model)
    steps = epochs * (len(data.train_y) // 64)
    schedule = Cubic(begin=steps // 4, end=steps // 2, every=max(1, steps // 40))
    settings = {"sparsity": 0.9, "block": (8, 1), "exclude": "4", "schedule": schedule}
    pruner = TetrisPruner(model, execution=args.execution, **settings)
    mesh = init_device_mesh("cpu", (world,))
    trained = fully_shard(model, mesh=mesh) if args.fsdp else DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    pruner.attach(optimizer)
    for epoch in range(epochs):
        order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64)[: steps // epochs]:
            own = batch[rank::world]  # this process's share of the images
            optimizer.zero_grad()
            F.cross_entropy(trained(data.train_x[own]), data.train_y[own]).backward()
            optimizer.step()
            before = pruner.layouts()
            pruner.step()
            if args.execution == "sparse" and pruner.layouts() != before:
                trained = DistributedDataParallel(model)
    if args.fsdp:  # a model that is whole takes over
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        sharded, pruner = pruner, TetrisPruner(dense, **settings)
        pruner.load_state_dict(sharded.state_dict())
        dense.load_state_dict(state)
    sparse = tetris.fuse(pruner.finalize().eval())
    if rank == 0:
        with torch.inference_mode():
            right = (sparse(data.test_x).argmax(1) == data.test_y).float().mean()
        print(f"{world} processes: {pruner.sparsity:.1%} removed, {right:.1%} of test digits right")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
