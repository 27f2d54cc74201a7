"""Train sparsely from the first step, and learn which blocks to keep (VR-PGE).

    python examples/vrpge.py
    python examples/vrpge.py --sparsity 0.9 --samples 4

The inputs are the 64 pixels of a digit and 192 numbers of pure noise. No step ever computes with
more than the drawn blocks, yet in the end most blocks of the first layer are on the pixels: gates
learn from how the loss differs between masks. Then the blocks are fixed and fine-tuned.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import tetris
from tetris.data import load_digits
from tetris.prune import VRPGEPruner


def main() -> None:
    """Train, print what is kept, and test the sparse model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, default=0.8, help="share of blocks to drop")
    parser.add_argument("--samples", type=int, default=2, help="masks per step, at least 2")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--tiny", action="store_true", help="two epochs")
    args = parser.parse_args()

    torch.manual_seed(0)
    data, epochs = load_digits(), 2 if args.tiny else args.epochs
    train_x, test_x = (
        torch.cat([x, 0.75 * torch.randn(len(x), 192)], 1) for x in (data.train_x, data.test_x)
    )
    model = nn.Sequential(
        nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    pruner = VRPGEPruner(
        model,
        sparsity=args.sparsity,
        block=(16, 16),
        samples=args.samples,
        exclude="4",
        reorder="identity",  # random weights have no structure to reorder for
        allow_empty_rows=True,
        optimizers=optimizer,  # whose states then hold drawn blocks only
    )

    for epoch in range(epochs):
        for batch in torch.randperm(len(train_x)).split(64):
            x, y = train_x[batch], data.train_y[batch]
            optimizer.zero_grad()
            pruner.backward(lambda x=x, y=y: F.cross_entropy(model(x), y))
            optimizer.step()
            pruner.step()
        if (epoch + 1) % max(1, epochs // 6) == 0:
            kept = pruner.layouts()["0"].block_mask()
            share = float(kept[:, :4].sum() / kept.sum())
            print(f"epoch {epoch + 1}: {share:.0%} of the first layer's blocks are on pixels")

    pruner.prune()  # the blocks are fixed; a model with batch norm needs update_bn now
    for _ in range(max(1, epochs // 6)):
        for batch in torch.randperm(len(train_x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
            pruner.step()

    sparse = tetris.fuse(pruner.finalize().eval())
    with torch.inference_mode():
        right = (sparse(test_x).argmax(1) == data.test_y).float().mean()
    print(f"{pruner.sparsity:.0%} of the blocks removed, {right:.1%} of the test digits right")


if __name__ == "__main__":
    main()
