"""Training a small GAN, and what its images are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetris.data import Dataset
from tetris.frechet import Gaussian, frechet_distance

from .data import Split, split
from .gan_networks import CLASSES, LATENT, Classifier

IMAGES = {"digits": None, "fashion": 15_000}
SIZE = {"digits": (8, 8), "fashion": (28, 28)}


@dataclass(frozen=True)
class Recipe:
    """How the networks are trained.

    Attributes:
        dense: Steps of the dense GAN.
        compress: Steps of every compression.
        classifier: Epochs of the classifier.
        batch: Real images, and generated ones, per step.
        learning_rate: Of Adam, whose betas are 0.5 and 0.99.
        images: Generated for the Frechet distance.
    """

    dense: int
    compress: int
    classifier: int
    batch: int
    learning_rate: float
    images: int = 2000

    def adam(self, network: nn.Module, share: float = 1.0) -> torch.optim.Adam:
        """An optimizer; ``share`` of the learning rate."""
        rate = share * self.learning_rate
        return torch.optim.Adam(network.parameters(), rate, betas=(0.5, 0.99))


RECIPES = {
    "digits": Recipe(dense=4000, compress=800, classifier=40, batch=64, learning_rate=1e-3),
    "fashion": Recipe(dense=1500, compress=150, classifier=3, batch=32, learning_rate=1e-3),
}
QUICK = {
    "digits": replace(RECIPES["digits"], dense=1500, compress=200, images=1000),
    "fashion": replace(RECIPES["fashion"], dense=200, compress=30, classifier=1, images=1000),
}


@dataclass(frozen=True)
class Batch:
    """Of one step.

    Attributes:
        real: Images.
        labels: Their classes.
        latent: Inputs of the generator.
        wanted: Classes of the images to be made.
    """

    real: Tensor
    labels: Tensor
    latent: Tensor
    wanted: Tensor


def images(name: str, seed: int) -> Split:
    """The split of a seed, with pixels in [-1, 1]; digits are flat."""
    data = split(name, seed, images=IMAGES[name], flat=name == "digits")
    low, high = data.train_x.min(), data.train_x.max()

    def scaled(x: Tensor) -> Tensor:
        return (x - low) / (high - low) * 2.0 - 1.0

    return replace(
        data,
        train_x=scaled(data.train_x),
        test_x=scaled(data.test_x),
        valid_x=scaled(data.valid_x),
    )


def batches(name: str, data: Dataset, recipe: Recipe, steps: int, seed: int) -> Iterator[Batch]:
    """Batches of a seed: all variants see the same ones."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(data.train_y), (recipe.batch,), generator=random)
        latent = torch.randn(recipe.batch, LATENT[name], generator=random)
        wanted = torch.randint(CLASSES, (recipe.batch,), generator=random)
        yield Batch(data.train_x[chosen], data.train_y[chosen], latent, wanted)


def train_gan(
    generator: nn.Module,
    discriminator: nn.Module,
    steps: Iterator[Batch],
    g_optimizer: torch.optim.Optimizer,
    d_optimizer: torch.optim.Optimizer | None,
    step: Callable[[], object] = lambda: None,
) -> None:
    """Ordinary training with the logistic loss; the discriminator is fixed without an optimizer."""
    generator.train()
    discriminator.train(d_optimizer is not None)
    for batch in steps:
        generated = generator(batch.latent, batch.wanted)
        if d_optimizer is not None:
            d_optimizer.zero_grad()
            real = F.softplus(-discriminator(batch.real, batch.labels)).mean()
            fake = F.softplus(discriminator(generated.detach(), batch.wanted)).mean()
            (real + fake).backward()
            d_optimizer.step()
        g_optimizer.zero_grad()
        F.softplus(-discriminator(generated, batch.wanted)).mean().backward()
        g_optimizer.step()
        step()


class Judge:
    """A classifier of the real images, and what it makes of generated ones.

    Args:
        name: ``digits`` or ``fashion``.
        data: Real images; test images make the real side of the Frechet distance for Fashion-MNIST,
            training images for digits, of which there are few.
        recipe: How it is trained.
        seed: Of training, and of the latents it judges by.

    Attributes:
        real: Normal distribution of the features of real images.
        accuracy: On test images: what labels of perfect images would have.
        floor: Frechet distance of real images, which neither classifier nor GAN has seen, to
            ``real``. They are 450 digits or 1000 of Fashion-MNIST, fewer than generated ones: a
            bit too large.
    """

    def __init__(self, name: str, data: Split, recipe: Recipe, seed: int) -> None:
        torch.manual_seed(seed)
        self.name, self.recipe, self.seed = name, recipe, seed
        self.classifier = Classifier(name)
        optimizer = torch.optim.Adam(self.classifier.parameters(), 1e-3)
        order = torch.Generator().manual_seed(seed)
        for _ in range(recipe.classifier):
            for chosen in torch.randperm(len(data.train_y), generator=order).split(64):
                optimizer.zero_grad()
                logits = self.classifier(data.train_x[chosen])
                F.cross_entropy(logits, data.train_y[chosen]).backward()
                optimizer.step()
        self.classifier.eval()
        with torch.no_grad():
            right = self.classifier(data.test_x).argmax(1) == data.test_y
            known = data.train_x if name == "digits" else data.test_x
            self.real = Gaussian.of(self.classifier.features(known))
            unseen = data.test_x if name == "digits" else data.valid_x
            self.floor = frechet_distance(self.classifier.features(unseen), self.real)
        self.accuracy = float(right.float().mean())

    @torch.no_grad()
    def __call__(self, generator: nn.Module) -> tuple[float, float]:
        """Label accuracy and Frechet distance of a generator in eval mode."""
        random = torch.Generator().manual_seed(1000 + self.seed)
        labels = torch.arange(self.recipe.images) % CLASSES
        latent = torch.randn(len(labels), LATENT[self.name], generator=random)
        features = torch.cat(
            [
                self.classifier.features(generator(z, y))
                for z, y in zip(latent.split(250), labels.split(250), strict=True)
            ]
        )
        right = self.classifier.last(features).argmax(1) == labels
        return float(right.float().mean()), frechet_distance(features, self.real)


@torch.no_grad()
def recalibrate(generator: nn.Module, name: str, batch: int, count: int = 32) -> nn.Module:
    """Measure batch norm anew, over batches as in training; the generator is left in eval mode."""
    random = torch.Generator().manual_seed(77)
    norms = [m for m in generator.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    generator.train()
    for _ in range(count):
        latent = torch.randn(batch, LATENT[name], generator=random)
        generator(latent, torch.randint(CLASSES, (batch,), generator=random))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return generator.eval()


def samples(generator: nn.Module, name: str) -> Tensor:
    """[10, height, width], one image per class, of the same latents for every generator."""
    random = torch.Generator().manual_seed(5)
    latent = torch.randn(CLASSES, LATENT[name], generator=random)
    with torch.no_grad():
        made = generator(latent, torch.arange(CLASSES))
    return made.reshape(CLASSES, *SIZE[name])


def examples(data: Dataset, name: str) -> Tensor:
    """[10, height, width], the first test image of each class."""
    first = [int((data.test_y == label).nonzero()[0]) for label in range(CLASSES)]
    return data.test_x[first].reshape(CLASSES, *SIZE[name])
