"""Train a small GAN on the digits of scikit-learn, and compress its generator.

    python examples/gan.py
    python examples/gan.py --sparsity 0.5 --block 16 16 --out samples.png

The discriminator that the GAN was trained with judges the pruned generator: for each of its loss
terms the pruned one shall get the value that the dense one gets. Blocks go gradually, during the
first half of the compression, which takes a fifth of the steps of the training.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import tetris
from tetris.data import load_digits
from tetris.frechet import frechet_distance
from tetris.plotting import plot_images
from tetris.prune import Cubic, GANPruner, UnconditionalGAN


def main() -> None:
    """Train, compress, and print how far images are from real ones."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--sparsity", type=float, default=0.75, help="share of blocks to remove")
    parser.add_argument("--block", type=int, nargs=2, default=(8, 8), metavar=("BO", "BI"))
    parser.add_argument("--out", metavar="PNG", help="draw images of both generators")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    steps, short = (40, 8) if args.tiny else (4000, 800)

    torch.manual_seed(0)
    data = load_digits().train_x
    data = data / data.abs().max()
    norm, relu, leak = nn.BatchNorm1d, nn.ReLU(), nn.LeakyReLU(0.2)
    hidden = [nn.Linear(32, 128), norm(128), relu, nn.Linear(128, 128), norm(128), relu]
    g = nn.Sequential(*hidden, nn.Linear(128, 64), nn.Tanh())
    first, second, last = (spectral_norm(nn.Linear(*s)) for s in ((64, 128), (128, 128), (128, 1)))
    d = nn.Sequential(first, leak, second, leak, last)

    def adam(network: nn.Module, learning_rate: float = 1e-3) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), learning_rate, betas=(0.5, 0.99))

    g_optimizer, d_optimizer = adam(g), adam(d)
    for _ in range(steps):
        real, fake = data[torch.randint(len(data), (64,))], g(torch.randn(64, 32))
        d_optimizer.zero_grad()
        (F.softplus(-d(real)) + F.softplus(d(fake.detach()))).mean().backward()
        d_optimizer.step()
        g_optimizer.zero_grad()
        F.softplus(-d(fake)).mean().backward()
        g_optimizer.step()

    schedule = Cubic(0, short // 2, every=max(1, short // 40), initial=0.05)
    pruner = GANPruner(
        g, d, task=UnconditionalGAN("logistic"), schedule=schedule, d_optimizer=adam(d, 1e-4),
        optimizers=(optimizer := adam(g)), sparsity=args.sparsity, block=tuple(args.block),
    )  # fmt: skip
    for _ in range(short):
        loss = pruner.loss(data[torch.randint(len(data), (64,))], torch.randn(64, 32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()

    sparse, latent = tetris.fuse(pruner.finalize().eval()), torch.randn(1000, 32)
    with torch.no_grad():
        made = {"dense": pruner.original.eval()(latent), "compressed": sparse(latent)}
    for name, images in made.items():  # pixels are the features here; a classifier's are better
        print(f"{name}: Frechet distance of pixels {frechet_distance(images, data):.2f}")
    if args.out:
        plot_images({name: x[:10].view(-1, 8, 8) for name, x in made.items()}, args.out)


if __name__ == "__main__":
    main()
