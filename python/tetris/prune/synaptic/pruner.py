"""Synaptic Strength: learn how strong each connection is, shrink strengths, keep the strongest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...checks import describe
from ...layout import BlockLayout
from ...nn.kinds import DENSE_TYPES, oriented
from ...parameters import check_kind, check_optimizers, holds
from ...sharding import check_whole
from .. import ranks
from ..batches import Batches, check_batches
from ..choose import choose_blocks
from ..options import LayerOptions, LayerOverride, shows_settings
from ..orders import Share
from ..plan import Scope
from ..pruner import Execution, Pruner
from ..report import SparsifyReport, warn_of_shortfall
from ..states import check_flag, check_like, check_mapping, check_state
from ..stored import check_held
from ..target import Target
from ..tree import Selector, check_hooks
from .rates import LearningRates
from .scales import Scales
from .strength import StrengthLayer, Synapses

if TYPE_CHECKING:
    from typing_extensions import Unpack

Per = Literal["connection", "block"]
"""What has a strength of its own; see :class:`SynapticPruner`."""

#: Blocks are formed anew only while at most this share of the strengths is zero: weights that
#: shrank to zero together would be dealt to other blocks.
DENSE_ENOUGH = 0.1


class SynapticPruner(Pruner):
    """Prunes the connections, or blocks, whose learned strength is least.

    A connection is one kernel, from an input map i to an output map j (of a linear layer, one
    weight). Its strength is the norm of the kernel times the scale of its input, and batch norm
    says what that is: as ``ReLU(gamma x + beta) = gamma ReLU(x + beta / gamma)`` for gamma > 0,
    gamma moves into the kernels behind, which become ``K_ij = s_ij V_ij / |V_ij|`` with ``s_ij =
    gamma_i |K_ij|``. Training then shrinks strengths: after each optimizer step of learning rate
    eta, :meth:`step` applies ``s <- sign(s) max(|s| - eta penalty sqrt(|B|), 0)``, |B| being the
    number of weights that share s (the proximal step of an L1 penalty; subgradients reach no
    zeros). :meth:`prune` keeps the strongest. After Lin et al., "Synaptic Strength for
    Convolutional Neural Network", NeurIPS 2018 (arXiv:1811.02454), which describes strength,
    penalty, threshold and fine-tuning; formulas and defaults here are a reconstruction.

    Three phases::

        pruner = SynapticPruner(...)   # same function, other parameters: make the optimizer now
        train, step()                  # strengths shrink
        pruner.prune()                 # layouts are fixed, weights are ordinary again
        fine-tune, step()
        sparse = pruner.finalize()

    *Where gamma goes.* It moves where ``torch.fx`` shows that the output of the batch norm reaches
    only layers that are pruned here, through positively homogeneous steps (ReLU, pooling, dropout,
    flattening). Where it goes elsewhere too, or for channels with gamma <= 0, batch norm stays and
    the score is ``|gamma_i| s_ij``. Where no batch norm shows (residual sums, other activations,
    none at all), the score is ``rms(x_i) s_ij`` with the root mean square of the input over
    ``batches``.

    A ``BatchNorm1d`` in front of a linear layer only counts where the graph shows that it sees
    ``[N, C]``, or ``batches`` do. With ``batches``, the first one is passed through the model
    before and after scales move, whose outputs must be the same.

    *Blocks.* With ``per="connection"`` strengths are the saliency of the layout search at the end,
    for any block. With ``per="block"`` the weights of a block share one strength; blocks are formed
    by a search on the dense weights, and again every ``refresh`` steps while strengths are dense.

    *Ranking.* With scope ``"global"``, the default, strengths of all layers compete as they are
    (a kernel counts by its strength, whatever its size); every block row keeps its best block
    unless ``allow_empty_rows``.

    *Fine-tuning* is of ordinary weights, not of s and V: with 10 % of the kernels of a
    small network that came to the same (.992 and .992 right, 4 seeds), with 4 % to more (.980 and
    .976).

    *Without batch norm* strengths shrink all the same, ``s_ij = |K_ij|``, though the scale of the
    input is measured only when they are ranked: of an MLP at 95 % in 8x8 blocks that gave .90, the
    saliency without training .86 (3 seeds). It has no advantage there: :class:`TetrisPruner`, which
    needs no such training, gave .91.

    *Half precision*: convert the model first, for strengths are kept in float32 then; so small are
    the steps they shrink by. *Deep copies* go on training if model, pruner and optimizers are
    copied together, ``copy.deepcopy((model, pruner, optimizer))``.

    *Distributed training*: wrap the model in DistributedDataParallel after making the pruner, and
    anew after :meth:`prune`, for both exchange Parameters.

    Args:
        model: The model, trained or not; changed in place until :meth:`remove` or
            :meth:`finalize`.
        options: Settings of the layers as one object, in place of the keywords below.
        per: ``"connection"`` or ``"block"``.
        penalty: The L1 penalty per unit of learning rate.
        lr_sum: In place of ``penalty``: the sum of the learning rates of all steps until
            :meth:`prune` (steps * lr / 2 of a linear or cosine decay to zero). The penalty is then
            such that a strength whose gradient is zero shrinks by ``shrinkage`` medians.
        shrinkage: Total shrinkage for ``lr_sum``, in units of the median initial strength. More
            leaves less to fine-tuning: with a tenth of a small network's kernels .84 were right
            before it with 1, .97 with 1.5; after it .992 and .990 (5 seeds).
        refresh: With ``per="block"``: search the blocks anew every so many steps, of the weights
            as they are then.
        batches: Needed where batch norm does not tell the scale of the inputs, which is measured
            on these then; as for :class:`Taylor`. They also check that moving scales is right.
        include: Layers to prune; this and the rest as for :func:`tetris.sparsify`.
        exclude: Layers to leave alone: the first and the last as a rule.
        types: Exact types to prune.
        overrides: Settings for some layers.
        scope: ``"global"`` or ``"layer"``.
        target: What is to be left, in place of ``sparsity``.
        share: Channels that several layers keep in one order, see :class:`SharedOrder`.
        execution: What layers compute with from :meth:`prune` on, see :class:`Pruner`.
        optimizers: Optimizers whose learning rate and states are followed; see :meth:`attach`.
        progress: Show progress bars during searches.
        sparsity: Share of blocks to remove.
        block: (bo, bi) of the layout.
        reorder: Search to use.
        balanced: Store equally many blocks in every block row.
        allow_empty_rows: Let block rows lose all their blocks.
        tie_kernel: Keep or remove all kernel positions of a block of channels together; with
            ``block=(1, 1)``, prune whole kernels as the paper does.
        seed: Seed of the search.
        budget: Seconds per layer for the search.
        sweeps: Sweeps instead of seconds.

    Raises:
        ValueError: as :func:`tetris.sparsify`; also layers whose inputs have no known scale,
            settings that contradict each other, nothing that would be left, optimizers that decay
            directions, a model whose outputs change as scales move. The model is as it was then.
        TypeError: batches that can be read but once, such as a generator.

    Attributes:
        penalty: The penalty in use.
        pruned: Whether :meth:`prune` has been called.

    Example:
        >>> pruner = tetris.prune.SynapticPruner(
        ...     model, sparsity=0.9, block=(8, 8), exclude=["stem", "classifier"],
        ...     lr_sum=steps * 2e-3 / 2,
        ... )
        >>> optimizer = torch.optim.AdamW(pruner.parameter_groups(weight_decay=0.01), lr=2e-3)
        >>> pruner.attach(optimizer)
        >>> for x, target in batches:
        ...     optimizer.zero_grad()
        ...     criterion(model(x), target).backward()
        ...     optimizer.step()
        ...     pruner.step()
        ...     schedule.step()
        >>> print(pruner.prune())
        >>> torch.optim.swa_utils.update_bn(batches, model)  # its statistics were of all weights
        >>> ...  # fine-tune in the same way, with a new optimizer
        >>> sparse = pruner.finalize()
    """

    @shows_settings
    def __init__(
        self,
        model: nn.Module,
        options: LayerOptions | None = None,
        *,
        per: Per = "connection",
        penalty: float | None = None,
        lr_sum: float | None = None,
        shrinkage: float = 1.0,
        refresh: int | None = None,
        batches: Batches | None = None,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
        types: tuple[type[nn.Module], ...] = DENSE_TYPES,
        overrides: Mapping[str, LayerOverride] | None = None,
        scope: Scope = "global",
        target: Target | None = None,
        share: Share = (),
        execution: Execution = "masked",
        optimizers: Optimizer | Iterable[Optimizer] = (),
        progress: bool = False,
        **settings: Unpack[LayerOverride],
    ) -> None:
        super().__init__(
            model,
            options,
            include=include,
            exclude=exclude,
            types=types,
            overrides=overrides,
            scope=scope,
            target=target,
            share=share,
            execution=execution,
            optimizers=optimizers,
            progress=progress,
            **settings,
        )
        self.per: Per = per
        self.refresh = refresh
        self.pruned = False
        self._check_settings(penalty, lr_sum, shrinkage)
        self.batches = None if batches is None else check_batches(self.name, batches)
        self._scales = Scales(self.name, model, self.layers, self.batches)
        self._rates = LearningRates()
        self._lr: float | None = None  # of step(lr)
        self._strengths: dict[str, StrengthLayer] = {}
        synapses = {name: self._synapses_of(name) for name in self.layers}
        if per == "block":
            for name, layout in self._search_order().items():
                synapses[name] = _ordered(
                    synapses[name], layout.to(self.layers[name].weight.device)
                )
        try:
            self._scales.push()
            for name, layer in self.layers.items():
                self._strengths[name] = StrengthLayer(layer, synapses[name])
            self.penalty = (
                float(penalty) if penalty is not None else self._default_penalty(lr_sum, shrinkage)
            )
            self._check_decay(self._optimizers)
        except BaseException:
            for strengths in self._strengths.values():
                strengths.undo()
            self._scales.undo()
            raise
        self._scales.settle()
        self._rates.follow(self._optimizers)
        for strengths in self._strengths.values():
            strengths.v.grad = None  # it was the weight's

    # -- training -----------------------------------------------------------------------------

    def parameter_groups(self, **settings: Any) -> list[dict[str, Any]]:
        """All parameters of the model for an optimizer, strengths and directions without decay.

        Args:
            **settings: Of both groups, such as ``lr`` and ``weight_decay``.

        Example:
            >>> torch.optim.SGD(pruner.parameter_groups(weight_decay=5e-4), lr=0.1, momentum=0.9)
        """
        own = [p for layer in self._strengths.values() for p in (layer.s, layer.v)]
        known = {id(p) for p in own}
        rest = [p for p in self.model.parameters() if id(p) not in known]
        groups = [{**settings, "params": rest}]
        if own:
            groups.append({**settings, "params": own, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    def attach(self, *optimizers: Optimizer) -> None:
        """Take the learning rates of these optimizers, and let their states follow the blocks.

        Raises:
            ValueError: one of them decays strengths or directions; none is attached then.
        """
        self._check_decay(check_optimizers(f"{self.name}.attach", optimizers))
        super().attach(*optimizers)
        if not self.pruned:
            self._rates.follow(self._optimizers)

    def step(self, lr: float | None = None, *, skipped: bool = False) -> None:
        """Call after each ``optimizer.step()``: shrink strengths, or zero what was pruned.

        Args:
            lr: Learning rate of the step that was taken, where no optimizer is attached. Attached
                ones tell it themselves, whether their scheduler steps before or after this, and
                nothing shrinks where they took no step.
            skipped: The optimizer has made no step; see :meth:`Pruner.step`.

        Raises:
            RuntimeError: the learning rate is not known; strengths are in half precision.
            ValueError: an attached optimizer decays strengths or directions.
        """
        if lr is not None and not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"{self.name}.step: lr must be a number >= 0 (got {describe(lr)})")
        self._lr = lr
        super().step(skipped=skipped)

    def update(self) -> None:
        """Shrink strengths by what the step's learning rate says; form blocks anew when due."""
        if self.pruned:
            return
        check_whole(f"{self.name}.step", self.model.parameters(), "fully_shard after prune()")
        self._check_rates()
        for layer in self._strengths.values():
            taken = self._rates.take(layer.s)
            layer.shrink(self.penalty * (taken if self._lr is None else self._lr))
        self._scales.hold()
        if self.refresh and self.steps % self.refresh == 0 and self.zeros <= DENSE_ENOUGH:
            for name, layout in self._search_order().items():
                self._strengths[name].reorder(layout.row_perm, layout.col_perm, self._optimizers)

    @property
    def zeros(self) -> float:
        """Share of the strengths that are exactly zero now."""
        self._check_phase("zeros", pruned=False)
        s = torch.cat([layer.s.detach().flatten() for layer in self._strengths.values()])
        return float((s == 0).double().mean())

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Layer -> score of each connection ``[out, in / groups]``, or block ``[rows, columns]``.

        The norm of the weights that share a strength, each times the scale of its input: |s| where
        batch norm's scale was pushed into the layer.
        """
        self._check_phase("scores", pruned=False)
        worth = self._scales.weights()
        return {n: synapses.norms(worth[n]) for n, synapses in self._synapses().items()}

    # -- pruning ------------------------------------------------------------------------------

    @torch.no_grad()
    def prune(self) -> SparsifyReport:
        """Fix the blocks that are kept: the strongest. Weights are ordinary Parameters again.

        An optimizer that held directions holds the weights now, without state; strengths are gone.
        Batch norm saw the outputs of all weights: measure its statistics anew, such as by
        ``torch.optim.swa_utils.update_bn(batches, model)``, before judging the pruned model.

        Returns:
            What is stored.

        Raises:
            RuntimeError: it has been called before; with ``execution="sparse"``, no attached
                optimizer holds the weights that were trained. Nothing is changed then.
            ValueError: with ``execution="sparse"``, a layer has hooks, or an optimizer keeps what
                cannot follow blocks.
        """
        self._check_attached("prune")
        self._check_phase("prune", pruned=False)
        saliency = {n: self._saliency(n, score) for n, score in self.scores().items()}
        if self.per == "connection":
            layouts = {name: plan.layout for name, plan in self.search(saliency).items()}
        else:
            layouts = ranks.first_layouts(self._select(saliency))
        self.keep(layouts)
        reached = {name: layout.sparsity for name, layout in self.layouts().items()}
        asked = {name: o.sparsity for name, o in self.layer_options.items()}
        if self.scope == "global" and not self._fixed:
            reached, asked = {"all": self.sparsity}, {"all": self.options.sparsity}
        elif self.scope == "global":
            asked = {name: asked[name] for name in self._fixed}
        warn_of_shortfall(f"{self.name}.prune", reached, asked)
        return self.report()

    def finalize(self, *, inplace: bool = False) -> nn.Module:
        """Return the model with sparse layers; see :meth:`Pruner.finalize`. After :meth:`prune`."""
        self._check_phase("finalize", pruned=True)
        return super().finalize(inplace=inplace)

    def remove(self) -> nn.Module:
        """Make the model an ordinary dense one again, masked if it was pruned; end the pruner."""
        self._check_attached("remove")
        self._fold()
        return super().remove()

    # -- checkpoints --------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Penalty, phase, and the channels whose scale was pushed on."""
        return {
            "penalty": self.penalty,
            "per": self.per,
            "pruned": self.pruned,
            "pushed": self._scales.state_dict(),
        }

    def check_extra_state(self, where: str, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless penalty, phase and channels are of this kind."""
        super().check_extra_state(where, state)
        penalty = state["penalty"]
        if not isinstance(penalty, (int, float)) or not 0 <= penalty < math.inf:
            raise ValueError(
                f"{where}: penalty of the state must be a finite number >= 0 "
                f"(got {describe(penalty)})"
            )
        pruned = check_flag(where, "pruned", state["pruned"])
        own = {} if pruned else self._scales.state_dict()
        pushed = check_mapping(where, "pushed", state["pushed"], own)
        for name, channels in own.items():
            check_like(where, f"pushed of {name!r}", pushed[name], channels)

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`extra_state` gave."""
        self.penalty = float(state["penalty"])
        if state["pruned"]:
            self._fold()
        else:
            self._scales.load_state_dict(state["pushed"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a pruner of the same layers and settings stopped.

        Load this first, then the model's state, which holds strengths, directions and blocks, then
        make the optimizer and load its state. An optimizer that was made before :meth:`prune` and
        kept beyond it has strengths among its Parameters: make it before this, as there.

        Raises:
            ValueError: the state is of other layers or settings, or from before :meth:`prune`
                when this pruner is beyond it.
        """
        where = f"{self.name}.load_state_dict"
        check_state(where, state)
        if state.get("per", self.per) != self.per:
            raise ValueError(
                f"{where}: the state is of per={state['per']!r}, this pruner of {self.per!r}; make "
                "the pruner with the same per"
            )
        if self.pruned and not state.get("pruned", True):
            raise ValueError(
                f"{where}: the state is from before prune(), this pruner is beyond it; make a "
                "new pruner of a new model"
            )
        super().load_state_dict(state)

    # -- inside -------------------------------------------------------------------------------

    def _check_settings(
        self, penalty: float | None, lr_sum: float | None, shrinkage: float
    ) -> None:
        where = self.name
        if self.per not in get_args(Per):
            raise ValueError(
                f"{where}: per must be 'connection' or 'block' (got {describe(self.per)})"
            )
        if (penalty is None) == (lr_sum is None):
            got = "none" if penalty is None else "both"
            raise ValueError(
                f"{where}: one of penalty and lr_sum is needed (got {got}); lr_sum is the sum of "
                "the learning rates of all steps until prune(): steps * lr / 2 of a linear or "
                "cosine decay to zero"
            )
        for name, value in (("penalty", penalty), ("lr_sum", lr_sum), ("shrinkage", shrinkage)):
            zero = name == "penalty"  # ranks strengths without shrinking them
            if value is not None and not (0 <= value < math.inf and (zero or value > 0)):
                raise ValueError(
                    f"{where}: {name} must be a finite number {'>= 0' if zero else '> 0'} "
                    f"(got {describe(value)})"
                )
        if self.refresh is not None:
            if self.per != "block":
                raise ValueError(
                    f"{where}: refresh forms blocks anew, which per='connection' does not train; "
                    "use per='block', or leave it out"
                )
            if not isinstance(self.refresh, int) or self.refresh < 1:
                raise ValueError(
                    f"{where}: refresh must be a number of steps >= 1 "
                    f"(got {describe(self.refresh)})"
                )
        for name, o in self.layer_options.items():
            if o.importance != "magnitude":
                raise ValueError(
                    f"{where}: layer {name!r}: importance is not used, strengths are; leave it "
                    "out, or use TetrisPruner"
                )
            if o.sparsity == 1.0 and o.allow_empty_rows:
                raise ValueError(
                    f"{where}: layer {name!r}: sparsity=1.0 with allow_empty_rows=True would keep "
                    "nothing; ask for less, or leave allow_empty_rows out to keep one block per "
                    "block row"
                )

    def _check_phase(self, what: str, *, pruned: bool) -> None:
        if self.pruned and not pruned:
            raise RuntimeError(f"{self.name}.{what}: prune() has been called, strengths are gone")
        if pruned and not self.pruned:
            raise RuntimeError(
                f"{self.name}.{what}: nothing has been removed yet; call prune() first, or "
                "remove() for the dense model"
            )

    def _synapses_of(self, name: str) -> Synapses:
        o = self.layer_options[name]
        block, tied = ((1, 1), True) if self.per == "connection" else (o.block, o.tie_kernel)
        return Synapses.of(f"{self.name}: layer {name!r}", self.layers[name], block, tied)

    def _synapses(self) -> dict[str, Synapses]:
        return {name: layer.strength.synapses for name, layer in self._strengths.items()}

    def _saliency(self, name: str, score: Tensor) -> Tensor:
        """Scores of synapses at their weights, shaped like the layer's weight.

        Of a kernel they average to its score. Blocks at single kernel positions share it out by
        magnitude: were all positions worth the same, which of them are kept would be arbitrary
        (10 % of 8x8 blocks of the digits' network, before fine-tuning: .445 instead of .584 right).
        """
        layer, synapses = self.layers[name], self._synapses()[name]
        spread = synapses.spread(score)
        if self.per == "connection" and spread.dim() > 2:
            weight = oriented(layer, layer.weight.detach()).abs()
            mean = weight.flatten(2).mean(2).view(*weight.shape[:2], *(1,) * (weight.dim() - 2))
            spread = torch.where(mean > 0, spread * weight / mean, 0.0)
        if self.per == "block":  # a block is worth its score at ragged edges, too
            bo, bi = synapses.blocking.block
            whole = bo * bi * synapses.positions / synapses.sizes(score.device)
            spread = spread * synapses.spread(whole)
        return oriented(layer, spread)

    @torch.no_grad()
    def _search_order(self) -> dict[str, BlockLayout]:
        """Layouts whose order gathers the strong weights of now in blocks."""
        worth = {n: oriented(self.layers[n], w.abs()) for n, w in self._scales.weights().items()}
        return {name: plan.layout for name, plan in self.search(worth).items()}

    def _select(self, saliency: Mapping[str, Tensor]) -> dict[str, BlockLayout]:
        """Layouts of the blocks that have strengths: their order stays."""
        worth = {
            n: ranks.mean(oriented(self.layers[n], s), s.device).cpu() for n, s in saliency.items()
        }
        orders = {
            n: replace(self._whole(n), row_perm=s.row_perm, col_perm=s.col_perm)
            for n, s in self._synapses().items()
        }
        return choose_blocks(
            worth,
            orders,
            self.layer_options,
            {name: o.sparsity for name, o in self.layer_options.items()},
            self.options.sparsity if self.scope == "global" else None,
            self._fixed,
            self._costs(),
        )

    def _check_rates(self) -> None:
        """Raise unless strengths can shrink: by known learning rates, which alone shrink them."""
        self._check_decay(self._optimizers)
        for name, layer in self._strengths.items():
            if torch.finfo(layer.s.dtype).bits < 32:
                raise RuntimeError(
                    f"{self.name}.step: the strengths of layer {name!r} have become "
                    f"{layer.s.dtype}, in which small steps are lost; convert the model before "
                    "making the pruner, which keeps strengths in float32, or train under "
                    "torch.autocast"
                )
            if self._lr is None and not any(holds(o, layer.s) for o in self._optimizers):
                raise RuntimeError(
                    f"{self.name}.step: no attached optimizer holds the strengths of layer "
                    f"{name!r}, so the learning rate is not known; make the optimizer after the "
                    "pruner, of pruner.parameter_groups(), and pruner.attach(optimizer), or pass "
                    "step(lr)"
                )

    def _check_decay(self, optimizers: Iterable[Optimizer]) -> None:
        """Raise ValueError if an optimizer decays strengths or directions."""
        decays: dict[nn.Parameter, float] = {}
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            for parameter in group["params"] if group.get("weight_decay") else ():
                decays[parameter] = group["weight_decay"]
        for name, layer in self._strengths.items():
            for parameter, what in ((layer.s, "strengths"), (layer.v, "directions")):
                if parameter in decays and parameter.requires_grad:
                    raise ValueError(
                        f"{self.name}: an optimizer decays the {what} of layer {name!r} "
                        f"(weight_decay={float(decays[parameter]):g}), which only the penalty may "
                        "shrink; make it of pruner.parameter_groups(weight_decay=...), which "
                        "spares them"
                    )

    def _default_penalty(self, lr_sum: float | None, shrinkage: float) -> float:
        """Such that strengths shrink by so many medians while learning rates sum up to lr_sum."""
        assert lr_sum is not None  # checked to be given where penalty is not
        strengths = torch.cat([layer.relative() for layer in self._strengths.values()])
        median = float(strengths[strengths > 0].median()) if bool(strengths.any()) else 0.0
        return shrinkage * median / lr_sum

    def _fold(self) -> None:
        """Make weights ordinary Parameters again."""
        for layer in self._strengths.values():
            layer.fold(self._optimizers)
        self._strengths = {}
        self._scales.release()
        self._rates.stop()
        self.pruned = True

    def _set(
        self, layouts: Mapping[str, BlockLayout], *, saved: Mapping[str, Any] | None = None
    ) -> None:
        if saved is None or not all(bool(layer["dense"]) for layer in saved.values()):
            if self.execution == "sparse":
                self._check_stored(layouts, trained=self.steps > 0 and saved is None)
            self._fold()
        super()._set(layouts, saved=saved)

    def _check_stored(self, layouts: Mapping[str, BlockLayout], trained: bool) -> None:
        """Raise where stored blocks could not take weights over, while strengths are there."""
        for name, layer in self._strengths.items():
            if not self._masks[name].changes(layouts[name]):
                continue
            check_hooks(self.name, name, layer.layer)
            for optimizer in self._optimizers:  # fold() drops what others keep
                check_kind(f"{self.name}: layer {name!r}", layer.v, optimizer)
            if trained and layer.learns:
                check_held(self.name, name, layer.v, self._optimizers)


def _ordered(synapses: Synapses, layout: BlockLayout) -> Synapses:
    """Synapses in the order of a layout, with both permutations as tensors."""
    sizes = (("row_perm", layout.out_features), ("col_perm", layout.in_features))
    perms = {}
    for name, size in sizes:
        perm = getattr(layout, name)
        perms[name] = (
            torch.arange(size, dtype=torch.int32, device=layout.device) if perm is None else perm
        )
    return Synapses(synapses.blocking, synapses.positions > 1, **perms)
