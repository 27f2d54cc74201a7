"""Self-supervised GAN compression: the trained discriminator judges the pruned generator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ...blocking import removed_count
from ...checks import check_model, describe
from ...layout import BlockLayout
from ...nn.base import SparseLayer
from ...nn.kinds import DENSE_TYPES, DenseLayer
from .. import ranks
from ..block_pruner import BlockPruner
from ..options import LayerOptions, LayerOverride, shows_settings
from ..orders import Share
from ..plan import Scope
from ..pruner import Execution
from ..saliency import layer_saliency
from ..schedule import Schedule
from ..states import check_like, check_mapping, check_state
from ..target import Target
from ..tree import Selector
from .checks import Atom, check_discriminator, check_settings, check_task, checked_terms
from .guard import DivergenceError, Snapshot, Watch, not_finite
from .loss import Judge, frozen_copy, judging, relative_difference, same_mode
from .tasks import GANTask, Network, Sample

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GANPruner(BlockPruner):
    """Prunes a trained generator gradually, with its own discriminator as the judge.

    The dense generator G_O is kept, frozen; G_C is the one that is pruned. Both make images of the
    same inputs, and for each loss term that the GAN was trained with, G_C shall get the value that
    G_O gets (Yu and Pool, "Self-Supervised GAN Compression", NeurIPS 2020)::

        R(a, b) = |a - b| / (|a| + eps)         a of G_O, without gradient; b of G_C
        L_GC = R(gen) + alpha * R(cla) + beta * R(rec) + ...     weights of the GAN's training
        L_DC = R(dis) + delta * R(gp)                            both with real images
        L    = L_GC + strength * L_DC

    Blocks go by magnitude, as the schedule says. In each step the pruned generator descends L, and
    with ``train_d`` the discriminator takes one ordinary step: real images against those of G_C.

    **Readings of the paper**, where it leaves open what is meant. G_O is not said to be frozen;
    here it is. The discriminator "can adapt", but how is not said: ``train_d`` offers both. R
    compares means over the batch, as the equation has scalars; ``per_sample=True`` compares sample
    by sample, ``mean|a_i - b_i| / (mean|a_i| + eps)``. Means can agree where images do not.

    **What runs in which mode.** G_O runs in the mode of the generator, layer by layer, without
    moving its statistics, and from the same random numbers: L is 0 where both are equal. While it
    judges, the discriminator is in eval mode and gets no gradients, for it has to be one function
    of both; its own step runs in the mode that you gave it.

    **Pitfalls.** R explodes where a is near 0, as scores of critics and gradient penalties may be:
    raise ``eps``. It also holds G_C back where it does *better* than G_O. Batch norm:
    measure the statistics on the final masks before judging images.

    **When training fails.** Every ``snapshot_every`` steps generator, discriminator, masks and
    optimizers are copied. A loss, a weight or a statistic that is not finite, or a discriminator
    that has told nothing for ``patience`` steps, raises :class:`DivergenceError`, with everything
    back at the last copy: ``finalize()`` then gives the last good generator.

    Args:
        generator: Trained; changed in place until :meth:`remove` or :meth:`finalize`.
        discriminator: That it was trained with; changed in place if ``train_d``.
        options: Settings of the layers as one object, in place of the keywords below.
        task: What the GAN does, with the loss terms of its training: :class:`UnconditionalGAN`,
            :class:`ConditionalGAN`, :class:`ImageToImageGAN` or a :class:`GANTask` of your own.
        schedule: :class:`Cubic`; the paper's begins at a sparsity of 0.05 and ends after half of
            the steps, which are a tenth of those the GAN was trained for. Or ``"one_shot"``, or
            ``f(step, final) -> sparsity``.
        train_d: Let the discriminator adapt.
        d_optimizer: Of the discriminator, with ``train_d``; a tenth of the learning rate that it
            was trained with does.
        strength: Weight of L_DC, lambda in the paper.
        eps: See above.
        per_sample: See above.
        atom: ``"block"``, or ``"filter"``: block rows are kept or dropped as a whole, the largest
            stay. With bo = 1 these are filters, otherwise bo filters of like magnitude. Search and
            floor are not used then, and a layer keeps at least one.
        snapshot_every: Steps between copies.
        patience: Steps without a word from the discriminator.
        include: Layers to prune; this and the rest as for :func:`tetris.sparsify`.
        exclude: Layers to leave alone; the last one if neither ``include`` nor ``exclude`` is
            given: it mixes few channels into the image, and the paper's exception is ours.
        types: Exact types to prune.
        overrides: Settings for some layers.
        scope: ``"layer"`` or ``"global"``.
        share: Channels whose order several layers share, see :class:`SharedOrder`; blocks only.
        target: What is to be left, in place of ``sparsity``.
        search_every_update: Search the permutations anew whenever masks change. Removed blocks may
            come back then.
        execution: ``"masked"``, or ``"sparse"`` to train on stored blocks.
        optimizers: Of the generator, one or several: brought back when training fails, and with
            ``"sparse"`` their states follow the blocks.
        progress: Show progress bars during searches.
        sparsity: Share of blocks to remove in the end; this and the rest as for
            :func:`tetris.sparsify`, with its defaults.
        block: (bo, bi).
        importance: What a weight is worth.
        reorder: Search to use, on the dense generator's weights.
        balanced: Store equally many blocks in every block row.
        allow_empty_rows: Let block rows lose all their blocks.
        tie_kernel: Keep or remove all kernel positions of a block of channels together.
        seed: Seed of the search.
        budget: Seconds per layer for the search.
        sweeps: Sweeps instead of seconds.

    Attributes:
        original: G_O.
        terms: Term -> R of the last :meth:`loss`, before weights; those of L_DC begin with ``d/``,
            and ``d`` is the discriminator's own loss in its last step.

    Raises:
        ValueError: a setting out of its range, or as :class:`BlockPruner`.
        RuntimeError: several processes train (``torch.distributed``), whose gradients of two
            networks would have to be averaged.

    Example:
        >>> optimizer = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.5, 0.99))
        >>> pruner = tetris.prune.GANPruner(
        ...     generator, discriminator, task=tetris.prune.UnconditionalGAN(), sparsity=0.75,
        ...     block=(8, 8), schedule=tetris.prune.Cubic(0, 400, every=20, initial=0.05),
        ...     d_optimizer=torch.optim.Adam(discriminator.parameters(), 1e-4, betas=(0.5, 0.99)),
        ...     optimizers=optimizer,
        ... )
        >>> for real in batches:
        ...     loss = pruner.loss(real, torch.randn(len(real), 64))
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     pruner.step()
        >>> sparse = pruner.finalize()
    """

    @shows_settings
    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        options: LayerOptions | None = None,
        *,
        task: GANTask,
        schedule: Literal["one_shot"] | Schedule,
        train_d: bool = True,
        d_optimizer: Optimizer | None = None,
        strength: float = 0.5,
        eps: float = 1e-3,
        per_sample: bool = False,
        atom: Atom = "block",
        snapshot_every: int = 50,
        patience: int = 20,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
        types: tuple[type[nn.Module], ...] = DENSE_TYPES,
        overrides: Mapping[str, LayerOverride] | None = None,
        scope: Scope = "layer",
        share: Share = (),
        target: Target | None = None,
        search_every_update: bool = False,
        execution: Execution = "masked",
        optimizers: Optimizer | Iterable[Optimizer] = (),
        progress: bool = False,
        **settings: Unpack[LayerOverride],
    ) -> None:
        where = self.name
        check_model(where, generator)
        if not isinstance(discriminator, nn.Module):
            raise TypeError(
                f"{where}: discriminator must be the trained torch.nn.Module "
                f"(got {describe(discriminator)})"
            )
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f"{where}: one process trains; here are {dist.get_world_size()}, and nothing would "
                "average the gradients of the two networks"
            )
        check_settings(where, strength, eps, atom, snapshot_every, patience)
        check_task(where, task)
        check_discriminator(where, generator, discriminator, train_d, d_optimizer)
        if atom == "filter":
            if scope != "layer" or search_every_update or share:
                raise ValueError(
                    f"{where}: atom='filter' ranks the rows of each layer, once they are sorted; "
                    "use scope='layer', no share= and no search_every_update"
                )
            if settings.get("balanced"):
                raise ValueError(f"{where}: atom='filter' empties block rows, not balanced=True")
            settings = {"reorder": "l1_sort", **settings, "allow_empty_rows": True}  # type: ignore[assignment]
            if options is not None:
                raise TypeError(
                    f"{where}: with atom='filter' settings go by keyword, such as sparsity=0.5"
                )
        if include is None and exclude is None:
            exclude = _last(generator, types)
        self.task = task
        self.discriminator = discriminator
        self.train_d = train_d
        self.d_optimizer = d_optimizer
        self.strength = strength
        self.eps = eps
        self.per_sample = per_sample
        self.atom: Atom = atom
        self.snapshot_every = snapshot_every
        self.original = frozen_copy(generator)
        self.terms: dict[str, float] = {}
        self._pending: Sample | None = None
        self._watch = Watch(patience)
        super().__init__(
            generator,
            options,
            schedule=schedule,
            include=include,
            exclude=exclude,
            types=types,
            overrides=overrides,
            scope=scope,
            share=share,
            target=target,
            search_every_update=search_every_update,
            execution=execution,
            optimizers=optimizers,
            progress=progress,
            **settings,
        )
        self._good: Snapshot | None = None  # none is needed before the first step

    # -- the training loop --------------------------------------------------------------------

    def loss(self, real: Tensor | Sequence[Tensor], *inputs: Tensor) -> Tensor:
        """L of a batch, a scalar to call ``backward()`` of.

        Args:
            real: Real images, or a tuple of them and their labels.
            *inputs: Of the generators, such as latents and labels.

        Raises:
            DivergenceError: the loss is not finite, or the discriminator has collapsed;
                everything is back at the last good state.
            ValueError: a generator gives something else than a tensor; real images are missing; the
                task has no terms, or a weight for one that there is not; nothing can learn.
            TypeError: a term is not a tensor.
        """
        self._check_attached("loss")
        where = f"{self.name}.loss"
        truth = (real,) if isinstance(real, Tensor) else tuple(real)
        if not truth or not inputs or not all(isinstance(t, Tensor) for t in (*truth, *inputs)):
            raise ValueError(
                f"{where}: takes real images, or (images, labels), and the generator's inputs "
                f"(got {describe(real)} and {len(inputs)} inputs)"
            )
        if self._good is None:
            self._good = self._snapshot()
        judge = Judge(self.discriminator, truth)
        with judging(self.discriminator):
            same_mode(self.original, self.model)
            with torch.random.fork_rng(self._devices()):
                want = self._evaluate(where, self.original, judge, truth, inputs)[1]
            judge.scores.clear()
            sample, got = self._evaluate(where, self.model, judge, truth, inputs)
        differences = {
            name: relative_difference(want[name].detach(), got[name], self.eps, self.per_sample)
            for name in got
        }
        self._check_weights(where, differences)
        total = sum(self._weight(name) * d for name, d in differences.items())
        assert isinstance(total, Tensor)
        if torch.is_grad_enabled() and not total.requires_grad:
            raise ValueError(
                f"{where}: the loss depends on no parameter of the generator that requires grad; "
                "call generator.requires_grad_(True)"
            )
        kept = {"d": self.terms["d"]} if "d" in self.terms else {}
        self.terms = {name: float(d.detach()) for name, d in differences.items()} | kept
        if not bool(total.isfinite()):
            listed = ", ".join(f"{n} {v:.4g}" for n, v in self.terms.items())
            data = "".join(
                f"; {name} have such numbers already"
                for name, tensors in (("the real images or labels", truth), ("the inputs", inputs))
                if not all(bool(t.isfinite().all()) for t in tensors)
            )
            self._diverged("loss", f"the loss is {float(total.detach())} ({listed}{data})")
        if problem := self._watch.scores(judge.scores):
            self._diverged("loss", problem)
        # In the type of the real images: step() need not be under the autocast that loss() was.
        generated = sample.generated.detach().to(truth[0].dtype)
        self._pending = Sample(self.model, sample.inputs, sample.real, generated)
        return total

    def step(self, *, skipped: bool = False) -> None:
        """Call after each ``optimizer.step()``: follow the schedule, let the discriminator learn.

        Args:
            skipped: The optimizer has made no step, and the discriminator makes none; see
                :meth:`Pruner.step`.

        Raises:
            DivergenceError: a weight or the discriminator's loss is not finite, or it has learnt
                nothing for long; everything is back at the last good state.
            RuntimeError: there was no :meth:`loss` since the last step.
        """
        self._check_attached("step")
        if self._pending is None:
            raise RuntimeError(
                f"{self.name}.step: no batch to learn from; call loss = pruner.loss(real, latent), "
                "loss.backward() and optimizer.step() first"
            )
        sample, self._pending = self._pending, None
        if skipped:
            super().step(skipped=True)
            return
        if name := not_finite(self.model):
            self._diverged("step", f"{name} of the generator is not finite")
        super().step()
        if self.train_d:
            self._teach(sample)
        if self.steps % self.snapshot_every == 0 and not self._watch.suspicious:
            self._good = self._snapshot()

    # -- what the base class asks for ---------------------------------------------------------

    def saliency(self, name: str, layer: DenseLayer | SparseLayer) -> Tensor:
        """Importance of each weight, in the shape of ``layer.weight`` or ``layer.values``."""
        return layer_saliency(self.name, name, layer, self.layer_options[name].importance)

    def update(self) -> None:
        """Choose the masks that hold after ``self.steps`` steps, if they differ from now."""
        if self.atom == "block":
            super().update()
            return
        sparsity = {n: self._scheduled(t) for n, t in self._targets.items()}
        if sparsity == self._reached:
            return
        if self.execution == "sparse" and self._reached is not None:
            self._check_rising(sparsity)
        self._prepare()
        layouts = {n: self._filters(n, layout, sparsity[n]) for n, layout in self.layouts().items()}
        self._set(ranks.first_layouts(layouts))
        self._reached = sparsity

    def extra_state(self) -> dict[str, Any]:
        """Also the original generator, which a resumed program cannot have."""
        own = {"atom": self.atom, "original": self.original.state_dict()}
        return {**super().extra_state(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a pruner stopped; see :meth:`Pruner.load_state_dict`.

        The discriminator's and its optimizer's states are loaded beside those of the generator.
        """
        where = f"{self.name}.load_state_dict"
        check_state(where, state)
        if state.get("atom", self.atom) != self.atom:
            raise ValueError(
                f"{where}: the state is of a pruner with "
                f"atom={state['atom']!r}, this one has {self.atom!r}; make the pruner with the same"
            )
        super().load_state_dict(state)

    def check_extra_state(self, where: str, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless the original generator takes its state."""
        super().check_extra_state(where, state)
        own = self.original.state_dict()
        original = check_mapping(where, "original", state["original"], own)
        for name, like in own.items():
            if isinstance(like, Tensor):
                check_like(where, f"{name!r} in original", original[name], like)

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        super().load_extra_state(state)
        self.original.load_state_dict(state["original"])
        self._pending, self._good = None, None

    # -- inside -------------------------------------------------------------------------------

    def _evaluate(
        self,
        where: str,
        generator: nn.Module,
        judge: Network,
        real: tuple[Tensor, ...],
        inputs: tuple[Tensor, ...],
    ) -> tuple[Sample, dict[str, Tensor]]:
        """What a generator makes, and its loss terms; those of the discriminator are marked."""
        generated = generator(*inputs)
        if not isinstance(generated, Tensor):
            raise ValueError(
                f"{where}: the generator must return a tensor of images (got {describe(generated)})"
            )
        sample = Sample(generator, inputs, real, generated)
        terms = checked_terms(where, "generator", self.task.generator_terms(judge, sample))
        own = checked_terms(where, "discriminator", self.task.discriminator_terms(judge, sample))
        return sample, terms | {_d(n): term for n, term in own.items()}

    def _check_weights(self, where: str, terms: Iterable[str]) -> None:
        """Raise unless there are terms, and one for each weight."""
        plain = dict.fromkeys(name.removeprefix(_D) for name in terms)
        if not plain:
            raise ValueError(f"{where}: the task has no terms; see tetris.prune.GANTask")
        for name, weight in self.task.weights.items():
            if weight and name not in plain:
                raise ValueError(
                    f"{where}: the task has a weight for {name!r}, which is none of its terms "
                    f"({', '.join(plain)})"
                )

    def _weight(self, name: str) -> float:
        plain = name.removeprefix(_D)
        weight = self.task.weights.get(plain, 1.0)
        return weight if plain == name else self.strength * weight

    def _teach(self, sample: Sample) -> None:
        """One ordinary step of the discriminator."""
        assert self.d_optimizer is not None
        terms = self.task.discriminator_terms(self.discriminator, sample)
        loss = sum(self.task.weights.get(n, 1.0) * term.mean() for n, term in terms.items())
        assert isinstance(loss, Tensor)
        value = self.terms["d"] = float(loss.detach())
        if not bool(loss.isfinite()):
            self._diverged("step", f"the discriminator's loss is {value}")
        if not loss.requires_grad:
            raise RuntimeError(
                f"{self.name}.step: train_d, but no parameter of the discriminator requires grad; "
                "call discriminator.requires_grad_(True), or pass train_d=False for a fixed one"
            )
        self.d_optimizer.zero_grad()
        loss.backward()
        self.d_optimizer.step()
        if name := not_finite(self.discriminator):
            self._diverged("step", f"{name} of the discriminator is not finite")
        if problem := self._watch.loss(value):
            self._diverged("step", problem)

    @torch.no_grad()
    def _filters(self, name: str, layout: BlockLayout, sparsity: float) -> BlockLayout:
        """The layout with whole block rows, those worth most among the present ones."""
        rows, columns = layout.block_grid
        scores = self._stored_scores(name, layout)
        row = layout.block_mask().nonzero()[:, 0]
        worth = scores.new_zeros(rows).index_add_(0, row, scores)
        keep = max(1, rows - removed_count(sparsity, rows))
        chosen = torch.zeros(rows, dtype=torch.bool, device=worth.device)
        chosen[worth.argsort(descending=True, stable=True)[:keep]] = True
        return layout.with_blocks(chosen[:, None].expand(rows, columns).to(layout.device))

    def _devices(self) -> list[int]:
        tensors = chain(self.model.parameters(), self.discriminator.parameters())
        return sorted({t.device.index for t in tensors if t.device.type == "cuda"})

    def _all_optimizers(self) -> list[Optimizer]:
        return [*self._optimizers, *([self.d_optimizer] if self.d_optimizer else [])]

    def _snapshot(self) -> Snapshot:
        return Snapshot.of(self, (self.model, self.discriminator), self._all_optimizers())

    def _diverged(self, method: str, problem: str) -> None:
        good = self._good
        assert good is not None
        steps = self.steps
        good.restore(self, (self.model, self.discriminator), self._all_optimizers())
        self._good = good
        self._watch = Watch(self._watch.patience)
        what, after = ", masks and the optimizers known here", "lower learning rates"
        if not self._optimizers:
            what = " and masks"
            after += ", and a new optimizer of the generator (optimizers= would bring yours back)"
        raise DivergenceError(
            f"{self.name}.{method}: after {steps} steps {problem}. Generator, discriminator{what} "
            f"are back at step {good.step}, the last good state; finalize() gives it, or go on "
            f"with {after}",
            good.step,
        )


_D = "d/"


def _d(name: str) -> str:
    return _D + name


def _last(generator: nn.Module, types: tuple[type[nn.Module], ...]) -> str | None:
    """Name of the last layer, unless it is the only one."""
    names = [n for n, m in generator.named_modules() if isinstance(m, tuple(types))]
    return names[-1] if len(names) > 1 else None
