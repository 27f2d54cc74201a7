"""Prune a trained network to reordered blocks, fine-tune it, and see what it costs and gains.

    python examples/tetris_pruning.py
    python examples/tetris_pruning.py --block 16 16 --sparsity 0.95

TetrisPruner finds an order of rows and columns in which small weights share blocks, and masks the
lightest blocks step by step while training goes on; finalize() returns a network that stores and
computes what is left. --reorder identity shows what the order is worth.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import nn

import tetris
from tetris.data import Dataset, load_digits
from tetris.prune import Cubic, TetrisPruner


def main() -> None:
    """Train, prune, fine-tune; print what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of blocks to remove")
    parser.add_argument("--block", type=int, nargs=2, default=(8, 8), metavar=("OUT", "IN"))
    parser.add_argument("--reorder", default="threshold", help="or swap, l1_sort, identity")
    parser.add_argument("--epochs", type=int, default=20, help="of each phase")
    parser.add_argument("--tiny", action="store_true", help="one epoch of a narrow network")
    args = parser.parse_args()
    width, epochs = (64, 1) if args.tiny else (256, args.epochs)

    torch.manual_seed(0)
    data = load_digits()
    dense = nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    train(dense, data, epochs)
    print(f"dense: {accuracy(dense, data):.1%} of test digits right")
    model = copy.deepcopy(dense)
    steps = epochs * -(-len(data.train_y) // 64)
    pruner = TetrisPruner(
        model,
        sparsity=args.sparsity,
        block=tuple(args.block),
        reorder=args.reorder,
        exclude="4",  # the classifier: few weights, and accuracy hangs on each
        allow_empty_rows=True,
        schedule=Cubic(begin=0, end=steps // 2, every=max(1, steps // 40)),
    )
    train(model, data, epochs, pruner)
    print(pruner.report())
    sparse = tetris.fuse(pruner.finalize().eval())
    print(f"pruned: {accuracy(sparse, data):.1%} of test digits right")


def train(model: nn.Module, data: Dataset, epochs: int, pruner: TetrisPruner | None = None) -> None:
    """An ordinary loop, but for one line."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_y)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
            if pruner is not None:
                pruner.step()


@torch.inference_mode()
def accuracy(model: nn.Module, data: Dataset) -> float:
    """Share of test digits that are classified correctly."""
    return float((model(data.test_x).argmax(1) == data.test_y).float().mean())


if __name__ == "__main__":
    main()
