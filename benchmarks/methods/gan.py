"""GAN compression: does a trained discriminator with relative losses keep a pruned generator?

A class-conditional generator is trained with a spectrally normed discriminator, and compressed in a
fraction of the steps. The accuracy is that of labels: how many generated images a fixed classifier
takes for the class that was asked for; FD is the Frechet distance of its features. What it makes of
real images that it has not seen is the first row. Every variant sees the same batches, stores
equally many blocks and takes equally many steps; so does the dense generator that is trained on.
Seconds of training say what a step costs, as far as the machine was idle.

Block rows keep their best block, whole filters of course do not. At 50 % that makes no difference:
without the floor, blocks up to 16x16 came out the same.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tetris
from tetris.data import Dataset
from tetris.plotting import matplotlib_figure, plot_images
from tetris.prune import ConditionalGAN, Cubic, DivergenceError, GANPruner, TetrisPruner

from . import latency
from .experiment import Check, Claim, Row, Setting
from .gan_networks import (
    CLASSES,
    LAST,
    LATENT,
    Discriminator,
    Generator,
    small_generator,
    weights_of,
)
from .gan_training import (
    QUICK,
    RECIPES,
    Batch,
    Judge,
    Recipe,
    batches,
    examples,
    images,
    recalibrate,
    samples,
    train_gan,
)
from .progress import Progress
from .report import groups
from .stats import DIVERGED, Comparison, by_seed, figure, mean_sd

FULL, BLOCK = 0.75, (8, 8)
"""Of the comparison with other ways to train."""

BLOCKS = ((1, 1), (4, 1), (8, 8), (16, 16))
SPARSITIES = {"digits": (0.5,), "fashion": (0.5, 0.75)}
"""Of the comparison between block sizes, and whole filters."""

BASELINES = ("one-shot", "gradual, trained D", "gradual, fresh D")
"""That the method is to beat."""

CONTROL = "gradual, slow D"
"""With the discriminator's learning rate of the method, so that only the loss differs."""

LONGER = "dense, trained on"

STORED = (8, 8)
"""Blocks that hold whole filters: rows that stay are dense, single weights would be slow."""

SWEEPS = 10  # of the layout search: reproducible
BATCH = 64  # of the latency


@dataclass(frozen=True)
class Trained:
    """What all variants of a seed start from."""

    name: str
    seed: int
    data: Dataset
    recipe: Recipe
    judge: Judge
    generator: Generator
    discriminator: Discriminator

    def steps(self) -> Iterator[Batch]:
        """Batches of a compression."""
        return batches(self.name, self.data, self.recipe, self.recipe.compress, self.seed + 100)

    def schedule(self) -> Cubic:
        """Gradual pruning in the first half."""
        half = self.recipe.compress // 2
        return Cubic(0, half, every=max(1, half // 20), initial=0.05)


class GANExperiment:
    """See the module."""

    name = "gan"
    title = "GAN compression: generators pruned under their own discriminator"

    def rows(self, setting: Setting, progress: Progress) -> Iterator[Row]:
        """Real images, dense, the method, other ways to train at equal storage, other blocks."""
        runs = list(_runs(setting.data))
        progress.plan(len(setting.seeds) * (1 + len(runs)))
        setting.out.mkdir(parents=True, exist_ok=True)
        done: list[Row] = []
        for seed in setting.seeds:
            progress.describe(f"seed {seed}: dense training")
            start = _trained(setting, seed)
            progress.advance()
            models: dict[str, nn.Module] = {"dense": start.generator}
            real = Row("real images", seed, start.judge.accuracy, extra={"FD": start.judge.floor})
            rows = [real, _row("dense", start, start.generator)]
            for run in runs:
                progress.describe(f"seed {seed}: {run.label}")
                began = time.perf_counter()
                try:
                    masked, model = run.train(start)
                    _check_finite(model)
                except DivergenceError as error:  # the others still tell something
                    progress.describe(f"seed {seed}: {run.label} diverged: {error}")
                    rows.append(_diverged(run, seed))
                    progress.advance()
                    continue
                seconds = time.perf_counter() - began
                row = _row(run.variant, start, model, run.block, run.sparsity, masked)
                rows.append(replace(row, extra={**row.extra, "training, s": seconds}))
                models[row.label] = model
                progress.advance()
            progress.describe(f"seed {seed}: measuring latency")
            nets = {n: cast(Generator, m).net for n, m in models.items() if n != LONGER}
            times = latency.measure(nets, _inputs(setting.data, seed))
            rows = [latency.timed(row, times) for row in rows]
            if seed == setting.seeds[0]:
                shown = {"real images": examples(start.data, setting.data)}
                shown |= {label: samples(model, setting.data) for label, model in models.items()}
                plot_images(shown, setting.out / f"{self.name}-{setting.data}-samples.png")
            done += rows
            yield from rows
        plot_figures(done, setting.out / f"{self.name}-{setting.data}-figures.png")

    def claims(self, setting: Setting) -> list[Claim]:
        """Labels are better kept than by other ways to train."""
        claims = [
            Claim(_label("method"), _label(rival), note="label accuracy") for rival in BASELINES
        ]
        control = "label accuracy, not demanded: at equal learning rates of the discriminator"
        return [*claims, Claim(_label("method"), _label(CONTROL), note=control)]

    def check(self, rows: Sequence[Row]) -> list[Check]:
        """Distances, the zero of the loss, and that sparse models compute the masked ones."""
        sparsities = dict.fromkeys(r.sparsity for r in rows if r.variant == "method, filters")
        rises = [c for share in sparsities if share is not None for c in _rises(rows, share)]
        return [_distance(rows), _zero(), *rises, _equal(rows)]


@dataclass(frozen=True)
class Run:
    """One way to come to a smaller generator.

    Attributes:
        variant: Its name.
        train: Returns the masked generator, or None, and the one to judge, in eval mode.
        block: (bo, bi).
        sparsity: Removed share of the blocks.
    """

    variant: str
    train: Callable[[Trained], tuple[nn.Module | None, nn.Module]]
    block: tuple[int, int] | None = BLOCK
    sparsity: float | None = FULL

    @property
    def label(self) -> str:
        """As in tables."""
        return Row(self.variant, 0, 0.0, block=self.block, sparsity=self.sparsity).label


def _check_finite(model: nn.Module) -> None:
    """Ways to train that watch over themselves raise; others end with numbers that are none."""
    if not all(t.isfinite().all() for t in model.state_dict().values()):
        raise DivergenceError("weights that are not finite", 0)


def _diverged(run: Run, seed: int) -> Row:
    """The row of a training that came to nothing."""
    figures = {"FD": math.nan}
    return Row(run.variant, seed, math.nan, None, run.block, run.sparsity, extra=figures)


def _runs(data: str) -> Iterator[Run]:
    yield Run(LONGER, _trained_on, None, None)
    yield Run("method", lambda t: _method(t))
    yield Run("method, fixed D", lambda t: _method(t, train_d=False))
    yield Run("gradual, trained D", lambda t: _adversarial(t, copy.deepcopy(t.discriminator)))
    yield Run(CONTROL, lambda t: _adversarial(t, copy.deepcopy(t.discriminator), 0.1))
    yield Run("gradual, fresh D", lambda t: _adversarial(t, _fresh(t)))
    yield Run("one-shot", lambda t: _adversarial(t, copy.deepcopy(t.discriminator), one_shot=True))
    yield Run("fixed D, plain", lambda t: _adversarial(t, copy.deepcopy(t.discriminator), None))
    yield Run("distillation", _distilled)
    yield Run("small dense", _small, None, None)
    for sparsity in SPARSITIES[data]:
        for block in BLOCKS:
            if (sparsity, block) != (FULL, BLOCK):
                yield Run("method", _with(block, sparsity), block, sparsity)
        yield Run("method, filters", _whole_filters(sparsity), None, sparsity)


def _with(
    block: tuple[int, int], sparsity: float
) -> Callable[[Trained], tuple[nn.Module, nn.Module]]:
    return lambda t: _method(t, block, sparsity)


def _whole_filters(sparsity: float) -> Callable[[Trained], tuple[nn.Module, nn.Module]]:
    """Filters go one by one; the rest, whole rows, is stored in blocks that kernels are fast on."""

    def train(start: Trained) -> tuple[nn.Module, nn.Module]:
        generator, single = _method(start, (1, 1), sparsity, "filter")
        stored = tetris.sparsify(
            tetris.densify(single),
            exclude=LAST,
            sparsity=sparsity,
            block=STORED,
            reorder="l1_sort",  # rows of zeros come last
            allow_empty_rows=True,
        )
        return generator, stored

    return train


def _trained(setting: Setting, seed: int) -> Trained:
    name = setting.data
    recipe = (QUICK if setting.quick else RECIPES)[name]
    data = images(name, seed)
    judge = Judge(name, data, recipe, seed)
    torch.manual_seed(seed)
    generator, discriminator = Generator(name), Discriminator(name)
    train_gan(
        generator,
        discriminator,
        batches(name, data, recipe, recipe.dense, seed),
        recipe.adam(generator),
        recipe.adam(discriminator),
    )
    recalibrate(generator, name, recipe.batch)
    return Trained(name, seed, data, recipe, judge, generator, discriminator)


def _fresh(start: Trained) -> Discriminator:
    torch.manual_seed(start.seed + 200)
    return Discriminator(start.name)


def _method(
    start: Trained,
    block: tuple[int, int] = BLOCK,
    sparsity: float = FULL,
    atom: str = "block",
    train_d: bool = True,
) -> tuple[nn.Module, nn.Module]:
    """GANPruner, with a tenth of the learning rate for the discriminator."""
    generator = copy.deepcopy(start.generator).train()
    discriminator = copy.deepcopy(start.discriminator).train()
    optimizer = start.recipe.adam(generator)
    pruner = GANPruner(
        generator,
        discriminator,
        task=ConditionalGAN(),
        schedule=start.schedule(),
        train_d=train_d,
        d_optimizer=start.recipe.adam(discriminator, 0.1) if train_d else None,
        atom=atom,  # type: ignore[arg-type]
        exclude=LAST,
        optimizers=optimizer,
        sparsity=sparsity,
        block=block,
        sweeps=SWEEPS,
    )
    for batch in start.steps():
        optimizer.zero_grad()
        pruner.loss((batch.real, batch.labels), batch.latent, batch.wanted).backward()
        optimizer.step()
        pruner.step()
    return _finished(start, generator, pruner)


def _adversarial(
    start: Trained,
    discriminator: Discriminator,
    d_share: float | None = 1.0,
    *,
    one_shot: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """Pruning by magnitude while the GAN trains on as it did."""
    generator = copy.deepcopy(start.generator)
    pruner = _magnitude(start, generator, one_shot)
    train_gan(
        generator,
        discriminator,
        start.steps(),
        start.recipe.adam(generator),
        None if d_share is None else start.recipe.adam(discriminator, d_share),
        pruner.step,
    )
    return _finished(start, generator, pruner)


def _trained_on(start: Trained) -> tuple[None, nn.Module]:
    """The dense GAN, for as many steps as compression takes: what further training alone gives."""
    generator, discriminator = copy.deepcopy(start.generator), copy.deepcopy(start.discriminator)
    train_gan(
        generator,
        discriminator,
        start.steps(),
        start.recipe.adam(generator),
        start.recipe.adam(discriminator),
    )
    return None, recalibrate(generator, start.name, start.recipe.batch)


def _distilled(start: Trained) -> tuple[nn.Module, nn.Module]:
    """Gradual pruning; the dense generator's images are the targets, there is no discriminator."""
    generator = copy.deepcopy(start.generator).train()
    teacher = copy.deepcopy(start.generator).train()  # in the same mode of batch norm
    pruner = _magnitude(start, generator)
    optimizer = start.recipe.adam(generator)
    for batch in start.steps():
        with torch.no_grad():
            wanted = teacher(batch.latent, batch.wanted)
        optimizer.zero_grad()
        F.mse_loss(generator(batch.latent, batch.wanted), wanted).backward()
        optimizer.step()
        pruner.step()
    return _finished(start, generator, pruner)


def _small(start: Trained) -> tuple[None, nn.Module]:
    """A narrow generator with as many weights, from scratch, with all steps of dense and pruned."""
    last = weights_of(start.generator.get_submodule(LAST))
    stored = last + (1.0 - FULL) * (weights_of(start.generator) - last)
    torch.manual_seed(start.seed + 300)
    generator, discriminator = small_generator(start.name, int(stored)), Discriminator(start.name)
    recipe = start.recipe
    steps = batches(
        start.name, start.data, recipe, recipe.dense + recipe.compress, start.seed + 300
    )
    train_gan(generator, discriminator, steps, recipe.adam(generator), recipe.adam(discriminator))
    return None, recalibrate(generator, start.name, recipe.batch)


def _magnitude(start: Trained, generator: nn.Module, one_shot: bool = False) -> TetrisPruner:
    return TetrisPruner(
        generator,
        schedule="one_shot" if one_shot else start.schedule(),
        exclude=LAST,
        sparsity=FULL,
        block=BLOCK,
        sweeps=SWEEPS,
    )


def _finished(
    start: Trained, generator: nn.Module, pruner: TetrisPruner | GANPruner
) -> tuple[nn.Module, nn.Module]:
    recalibrate(generator, start.name, start.recipe.batch)
    return generator, pruner.finalize()


def _inputs(name: str, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    latent = torch.randn(BATCH, LATENT[name], generator=random)
    return Generator.inputs(latent, torch.arange(BATCH) % CLASSES)


def _row(
    variant: str,
    start: Trained,
    model: nn.Module,
    block: tuple[int, int] | None = None,
    sparsity: float | None = None,
    masked: nn.Module | None = None,
) -> Row:
    """Judge a generator; ``stored`` counts the last layer too, which is smaller in a small one."""
    accuracy, distance = start.judge(model)
    extra = {"FD": distance}
    if masked is not None:
        extra["error"] = _error(model, masked, _inputs(start.name, start.seed))
    sparse = [m for m in model.modules() if isinstance(m, tetris.nn.SparseLayer)]
    stored = weights_of(model) + sum(m.layout.stored_values for m in sparse)
    return Row(
        variant,
        start.seed,
        accuracy,
        block=block,
        sparsity=sparsity,
        stored=stored,
        extra=extra,
    )


@torch.no_grad()
def _error(sparse: nn.Module, masked: nn.Module, x: Tensor) -> float:
    """Relative error of the sparse generator's images."""
    got, want = (cast(Generator, model).net(x) for model in (sparse, masked))
    return float((got - want).norm() / want.norm())


def _label(variant: str) -> str:
    return f"{variant} {BLOCK[0]}x{BLOCK[1]} {100 * FULL:g}%"


def _mean(rows: Sequence[Row], label: str, field: str = "FD") -> float:
    return mean_sd(figure(row, field) for row in rows if row.label == label)[0]


def _distance(rows: Sequence[Row]) -> Check:
    own = _mean(rows, _label("method"))
    rivals = {rival: _mean(rows, _label(rival)) for rival in BASELINES}
    what = "FD within twice that of the best of " + "; ".join(BASELINES)
    if any(map(math.isnan, rivals.values())):
        return what, None, DIVERGED
    if math.isnan(own):
        return what, False, DIVERGED
    best = min(rivals, key=rivals.__getitem__)
    return (
        what,
        own <= 2.0 * rivals[best],
        f"{own:.1f} against {rivals[best]:.1f} of {best}",
    )


def _rises(rows: Sequence[Row], sparsity: float) -> Iterator[Check]:
    """Every mean above the one before; and the trend, that noise of neighbours hides less."""
    share = f"{100 * sparsity:g}%"
    labels = [f"method {bo}x{bi} {share}" for bo, bi in BLOCKS] + [f"method, filters {share}"]
    means = [_mean(rows, label) for label in labels]
    sizes = "1x1, 4x1, 8x8, 16x16, filters"
    rises = f"mean FD at {share} rises with the size of blocks: {sizes}"
    trends = f"log FD at {share} has a rising trend: {sizes}"
    if any(map(math.isnan, means)):
        yield rises, None, DIVERGED
        yield trends, None, DIVERGED
        return
    yield (
        rises,
        all(a <= b for a, b in zip(means, means[1:], strict=False)),
        ", ".join(f"{mean:.1f}" for mean in means),
    )
    columns = [by_seed(rows, label) for label in labels]
    steps = np.arange(len(labels))
    slopes = [
        float(np.polyfit(steps, [math.log(figure(c[seed], "FD")) for c in columns], 1)[0])
        for seed in columns[0]
    ]
    slope, deviation = mean_sd(slopes)
    trend = Comparison(
        Claim(labels[-1], labels[0], "FD"), slope, deviation / math.sqrt(len(slopes)), len(slopes)
    )
    yield trends, trend.holds, f"{trend} a step"


def _equal(rows: Sequence[Row]) -> Check:
    what = "sparse generators equal the masked ones to 1e-5"
    errors = [row.extra["error"] for row in rows if "error" in row.extra]
    if not errors:
        return what, None, DIVERGED
    return what, all(error < 1e-5 for error in errors), f"{np.max(errors):.1g}"


def _zero() -> Check:
    torch.manual_seed(0)
    generator, discriminator = Generator("digits").train(), Discriminator("digits")
    pruner = GANPruner(
        generator,
        discriminator,
        task=ConditionalGAN(),
        schedule="one_shot",
        train_d=False,
        exclude=LAST,
        sparsity=0.0,
        sweeps=1,
    )
    labels = torch.arange(64) % CLASSES
    real, latent = (torch.randn(64, 64), labels), torch.randn(64, 16)
    loss = float(pruner.loss(real, latent, labels).detach())
    return "L is 0 where both generators are equal", abs(loss) < 1e-5, f"{loss:.2g}"


_PANELS = {
    "accuracy": ("label accuracy, %", 100.0, "linear"),
    "FD": ("Frechet distance of features", 1.0, "log"),
    "latency_ms": (f"ms per batch of {BATCH}", 1.0, "linear"),
}


def plot_figures(rows: Sequence[Row], path: Path) -> None:
    """Draw label accuracy, Frechet distance and time of every variant, mean and deviation."""
    members = groups(rows)
    height = 0.28 * len(members) + 1.0
    drawing = matplotlib_figure("benchmarks.methods")(figsize=(12.0, height), dpi=110)
    drawing.set_layout_engine("constrained")
    panels = drawing.subplots(1, len(_PANELS), sharey=True)
    for axes, (field, (title, unit, scale)) in zip(panels, _PANELS.items(), strict=True):
        for place, group in enumerate(members.values()):
            found = [row.value(field) for row in group]
            values = [unit * v for v in found if v is not None and not math.isnan(v)]
            if values:
                mean, deviation = mean_sd(values)
                spread = 0.0 if deviation != deviation else deviation
                axes.barh(place, mean, xerr=spread, color="#1f5fa8", capsize=2)
        axes.set_xscale(scale)
        axes.set_xlabel(title)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(members)), list(members))
    panels[0].invert_yaxis()
    drawing.savefig(path)


EXPERIMENT = GANExperiment()
