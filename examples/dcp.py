"""Prune by what a classifier in the middle of the network needs (DCP), on scikit-learn's digits.

    python examples/dcp.py                     # input channels: a smaller dense network
    python examples/dcp.py --atom block        # 8x8 blocks: sparse layers
    python examples/dcp.py --epsilon 0.02      # stop adding when the loss stops falling

A head stands behind the second convolution: the layers before it keep what helps the head to tell
digits apart and what rebuilds their old outputs; those behind it ask the network's own loss.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from tetris.data import load_digits
from tetris.demo.train import accuracy, recalibrate, train
from tetris.prune import DCPPruner


def network(width: int) -> nn.Sequential:
    """Four convolutions with batch norm, and a classifier."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for inputs, outputs in ((1, width), (width, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def main() -> None:
    """Train, choose, fine-tune, and print what became of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--atom", default="channel", choices=("channel", "block"))
    parser.add_argument("--sparsity", type=float, default=0.75, help="share to remove")
    parser.add_argument("--epsilon", type=float, help="DCP-Adapt; --sparsity is the least then")
    parser.add_argument("--tiny", action="store_true", help="a narrow network, hardly trained")
    args = parser.parse_args()
    width, epochs = (16, 1) if args.tiny else (32, 8)

    torch.manual_seed(0)
    data, model = load_digits(), network(width)
    train(model, data, epochs=epochs, batch=64, learning_rate=2e-3, seed=0, step=lambda: None)
    print(f"dense: {accuracy(model, data):.1%} of the test digits right")

    pruner = DCPPruner(
        model,
        atom=args.atom,
        block=(8, 8) if args.atom == "block" else (8, 1),
        sparsity=args.sparsity,
        include=["4", "7", "10"],  # all convolutions but the first
        heads=["4"],
        progress=True,
    )
    batches = list(zip(data.train_x.split(64), data.train_y.split(64), strict=True))
    pruner.select(batches, epochs=1 if args.tiny else 5, epsilon=args.epsilon)
    for name, choice in pruner.selections.items():
        print(f"  layer {name}: {len(choice.chosen)} of {choice.atoms} kept ({choice.stopped})")
    recalibrate(model, data, batch=64)
    print(f"pruned: {accuracy(model, data):.1%}")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for x, target in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        pruner.step()
    final = pruner.finalize().eval()
    recalibrate(final, data, batch=64)
    print(f"fine-tuned for an epoch: {accuracy(final, data):.1%}")
    print(pruner.shrunk or pruner.report())


if __name__ == "__main__":
    main()
