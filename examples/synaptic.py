"""Learn how strong each connection is, let weak ones shrink to zero, prune (Synaptic Strength).

    python examples/synaptic.py
    python examples/synaptic.py --per block --block 4 4 --sparsity 0.75
    python examples/synaptic.py --block 1 1      # single kernels, as in the paper

Batch norm's scales move into the kernels behind them, so that a kernel's norm, its strength, tells
what it contributes. Training shrinks strengths; the strongest are kept and fine-tuned.
"""

import argparse

import torch
from torch import nn

from tetris.data import load_digits
from tetris.prune import SynapticPruner


def conv(inputs: int, outputs: int) -> list[nn.Module]:
    """A convolution, batch norm and an activation that lets scales through."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


def main() -> None:
    """Train strengths, prune, fine-tune, and test the sparse model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of blocks to remove")
    parser.add_argument("--block", type=int, nargs=2, default=(8, 1), metavar=("OUT", "IN"))
    parser.add_argument("--per", default="connection", choices=("connection", "block"))
    parser.add_argument("--shrinkage", type=float, default=1.0, help="in median strengths")
    parser.add_argument("--tiny", action="store_true", help="one epoch of each")
    args = parser.parse_args()
    epochs = 1 if args.tiny else 12
    torch.manual_seed(0)
    data = load_digits()
    batches = -(-len(data.train_y) // 64)
    images, test = data.train_x.view(-1, 1, 8, 8), data.test_x.view(-1, 1, 8, 8)
    top = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    model = nn.Sequential(*conv(1, 32), *conv(32, 32), nn.MaxPool2d(2), *conv(32, 64), *top)

    def train(optimizer: torch.optim.Optimizer, epochs: int) -> None:
        model.train()
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
        for chosen in (c for _ in range(epochs) for c in torch.randperm(len(images)).split(64)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), data.train_y[chosen]).backward()
            optimizer.step()
            pruner.step()
            decay.step()

    @torch.inference_mode()
    def accuracy(network: nn.Module) -> float:
        return float((network.eval()(test).argmax(1) == data.test_y).float().mean())

    pruner = SynapticPruner(
        model,
        per=args.per,
        sparsity=args.sparsity,
        block=tuple(args.block),
        tie_kernel=True,  # whole kernels
        exclude=["0", "12"],  # the first layer and the classifier
        lr_sum=epochs * batches * 2e-3 / 2,  # of a cosine from 2e-3 to zero
        shrinkage=args.shrinkage,
    )
    pruner.attach(adam := torch.optim.AdamW(pruner.parameter_groups(weight_decay=0.01), lr=2e-3))
    train(adam, epochs)
    print(f"trained: {accuracy(model):.1%} right, {pruner.zeros:.1%} of the strengths are zero")
    print(pruner.prune())
    torch.optim.swa_utils.update_bn(images.split(64), model)  # its statistics were of all weights
    print(f"pruned: {accuracy(model):.1%} right")
    train(torch.optim.Adam(model.parameters(), lr=1e-3), max(1, epochs // 2))
    print(f"fine-tuned: {accuracy(pruner.finalize()):.1%} right, sparse")


if __name__ == "__main__":
    main()
