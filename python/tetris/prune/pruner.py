"""What every pruning method shares: layers, settings, what they keep, the end, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..blocking import Blocking
from ..checks import check_block, check_weight, describe, plain
from ..importance import saliency_of
from ..layout import BlockLayout
from ..modules import copy_or_same, replace_modules
from ..nn.base import SparseLayer, make_sparse
from ..nn.kinds import DENSE_TYPES, DenseLayer, groups_of, oriented, sparse_type
from ..parameters import check_optimizers
from ..reorder import SearchResult
from ..sharding import check_whole, gathered
from ..warn import warn
from . import ranks
from .masks import GATHER, MaskedWeight
from .options import LayerOptions, LayerOverride, check_bounds
from .orders import Share, check_share
from .plan import Plan, Scope, plan_layers
from .report import LayerReport, SparsifyReport
from .saliency import check_importance
from .states import check_count, check_flag, check_mapping, check_state
from .stored import StoredBlocks
from .target import Target, budgeted
from .tree import Selector, check_hooks, layer_options, select_layers

if TYPE_CHECKING:
    from typing_extensions import Unpack

Execution = Literal["masked", "sparse"]
"""How the layers of a pruner compute while they train; see :class:`Pruner`."""


class Pruner:
    """Removes blocks of a model's weights, and makes the model sparse in the end.

    A method derives from this class, or from :class:`BlockPruner` if it is a saliency and a
    schedule. It turns scores into layouts with :meth:`search` and puts them into force with
    :meth:`keep`; until then layers are as dense as they were. Then the model is fine-tuned by an
    ordinary loop that calls :meth:`step`, and :meth:`finalize` returns the sparse model. Parameters
    stay the objects they were: optimizers made before or after work alike.

    With ``execution="masked"`` masks act through a parametrization of ``weight``, so forward and
    gradients see the masked weight, and :meth:`step` also zeroes the Parameter, which momentum and
    weight decay have moved. A step costs what a dense one does, and a bit.

    With ``execution="sparse"`` a layer becomes a sparse one in the model as soon
    as a block of it is removed, and stays one: forward, backward and the optimizer work on stored
    blocks, and changing them costs as much. The trajectory is the masked one up to rounding. Pass
    ``optimizers``, or :meth:`attach` them, for what they keep of removed blocks goes with these.

    Under ``torch.distributed`` every process makes the same pruner, of the model inside its
    ``DistributedDataParallel``, and calls it alike. Worth is averaged over processes, the first one
    searches, and all keep the same blocks. With ``execution="sparse"`` wrap the model anew whenever
    :meth:`layouts` has changed: DistributedDataParallel counts on the sizes that it has seen. With
    FSDP2, make the pruner before ``fully_shard``; masks then change as usual, stored blocks do not,
    and :meth:`finalize` needs a model that is not sharded (docs/distributed.md).

    Args:
        model: The model; changed in place until :meth:`remove` or :meth:`finalize`.
        options: Settings of the layers, in place of ``settings``.
        include: Layers to prune, as for :func:`tetris.sparsify`.
        exclude: Layers to leave alone.
        types: Exact types to prune.
        overrides: Settings for some layers.
        scope: ``"layer"`` or ``"global"``.
        share: Channels that several layers keep in one order, see :class:`SharedOrder`.
        target: What is to be left, such as ``tetris.prune.Flops(0.2, x)``, in place of
            ``sparsity``.
        execution: ``"masked"``, or ``"sparse"`` to train on stored blocks.
        optimizers: Whose states follow the stored blocks, one or several.
        progress: Show progress bars.
        **settings: ``sparsity``, ``block`` and the other fields of :class:`LayerOptions`, as for
            :func:`tetris.sparsify`.

    Attributes:
        steps: Calls of :meth:`step` so far.
        layers: name -> dense layer, of those that are pruned, in the model's order.
        layer_options: name -> settings.

    Example:
        >>> class Random(tetris.prune.Pruner):                  # blocks at random, all at once
        ...     def prune(self):
        ...         worth = {n: torch.rand_like(layer.weight) for n, layer in self.layers.items()}
        ...         self.keep({n: plan.layout for n, plan in self.search(worth).items()})
        >>> pruner = Random(model, sparsity=0.75, block=(8, 8), exclude="classifier")
        >>> pruner.prune()
        >>> pruner.sparsity
        0.75
        >>> sparse = pruner.finalize()
    """

    def __init__(
        self,
        model: nn.Module,
        options: LayerOptions | None = None,
        *,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
        types: tuple[type[nn.Module], ...] = DENSE_TYPES,
        overrides: Mapping[str, LayerOverride] | None = None,
        scope: Scope = "layer",
        share: Share = (),
        target: Target | None = None,
        execution: Execution = "masked",
        optimizers: Optimizer | Iterable[Optimizer] = (),
        progress: bool = False,
        **settings: Unpack[LayerOverride],
    ) -> None:
        where = self.name
        if options is not None and (not isinstance(options, LayerOptions) or settings):
            raise TypeError(
                f"{where}: settings go by keyword, such as sparsity=0.9, or all in one "
                f"LayerOptions (got {' and '.join([describe(options), *settings])})"
            )
        asked = options or LayerOptions.of(where, settings, type(self).__init__)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise TypeError(
                f"{where}: a pruner takes the model inside DistributedDataParallel, ddp.module "
                "(got the wrapper, which cannot be copied and numbers layers otherwise)"
            )
        self.model = model
        self.scope: Scope = scope
        self.execution: Execution = execution
        self.progress = progress
        self.steps = 0
        self._target = target
        self._optimizers = check_optimizers(where, optimizers)
        selection = select_layers(where, model, include, exclude, types)
        for group in selection.tied.values():
            if len(group) > 1:
                raise ValueError(
                    f"{where}: {group[0]!r} and {group[1]!r} share one weight, which cannot be "
                    "masked twice; exclude them, or use tetris.sparsify, which keeps the tie"
                )
        self.layers = selection.layers
        self._skipped = selection.skipped
        check_importance(where, asked.importance, self.layers)
        own, self._fixed = layer_options(where, model, selection, asked, overrides)
        self._budget, self.options, self.layer_options = budgeted(
            where,
            target,
            model,
            selection,
            asked,
            own,
            self._fixed,
            "sparsity" in settings or options is not None,
            together=True,
            progress=progress,
        )
        check_bounds(where, scope, self.layer_options, self._fixed)
        self._check_execution()
        whole = {name: self._whole(name) for name in self.layers}
        self.share = check_share(
            where,
            share,
            {name: layout.weight_shape for name, layout in whole.items()},
            self.layer_options,
            {name: layout.groups for name, layout in whole.items()},
        )
        # The dense weights' shapes: on stored blocks the Parameters get other ones.
        self._like = {n: layer.weight.detach().to("meta") for n, layer in self.layers.items()}
        self._plans: dict[str, Plan] = {}
        self._masks: dict[str, MaskedWeight | StoredBlocks] = {}
        for name, layer in self.layers.items():
            if execution == "sparse":
                self._masks[name] = StoredBlocks(model, name, layer, whole[name])
            else:
                self._masks[name] = MaskedWeight(layer, whole[name])

    # -- for methods --------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Of the method, for messages."""
        return type(self).__name__

    def update(self) -> None:
        """Change what is kept after ``self.steps`` steps; called by :meth:`step`."""

    def skip(self) -> None:
        """Forget the step that is under way; called by :meth:`step` when it is skipped."""

    def extra_state(self) -> dict[str, Any]:
        """What a method adds to :meth:`state_dict`."""
        return {}

    def arguments(self) -> dict[str, Any]:
        """What a state must agree on to be loaded: plain values, in the terms of the user."""
        return {
            "scope": self.scope,
            "target": plain(self._target),
            **{
                f"{f.name} of layer {name!r}": plain(getattr(options, f.name))
                for name, options in self.layer_options.items()
                for f in fields(options)
            },
        }

    def check_extra_state(self, where: str, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless :meth:`load_extra_state` can take ``state``, the whole one.

        Called before anything is changed; the keys of :meth:`extra_state` are there.
        """

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`extra_state` gave; ``state`` is the whole one.

        What can fail belongs into :meth:`check_extra_state`.
        """

    def modules(self) -> dict[str, DenseLayer | SparseLayer]:
        """Name -> layer as it is in the model now."""
        return {name: mask.module for name, mask in self._masks.items()}

    def search(
        self,
        saliency: Mapping[str, Tensor],
        sparsity: Mapping[str, float] | None = None,
        together: float | None = None,
    ) -> dict[str, Plan]:
        """Search the layouts that keep the most saliency, under scope, target and settings.

        Args:
            saliency: name -> worth of each weight, shaped like the dense layer's weight,
                non-negative and finite.
            sparsity: name -> other sparsity than the settings say.
            together: Other sparsity of all layers together, with scope ``"global"``.

        Returns:
            name -> plan; ``plan.layout`` is for :meth:`keep`.
        """
        worth = {
            name: oriented(
                layer,
                saliency_of(f"{self.name}: layer {name!r}", self._like[name], saliency[name]),
            )
            for name, layer in self.layers.items()
        }
        options = self._underway(together)
        for name, own in (sparsity or {}).items():
            options[name] = replace(options[name], sparsity=own)
        # Not their Parameters: a method may have parametrized the weights while it trains.
        with gathered(self.model):
            weights: dict[str, Tensor] = {
                n: m.values if isinstance(m, SparseLayer) else m.weight
                for n, m in self.modules().items()
            }
            ranks.check_same(self.name, weights)
            worth = {n: ranks.mean(w, weights[n].device) for n, w in worth.items()}

        def plan() -> dict[str, tuple[float, BlockLayout, SearchResult]]:
            plans = plan_layers(
                self.name,
                worth,
                options,
                self._fixed,
                self.scope,
                self.options.sparsity if together is None else together,
                self.progress,
                {name: groups_of(layer) for name, layer in self.layers.items()},
                self._costs(),
                self.share,
            )
            return {n: (p.options.sparsity, p.layout, p.search) for n, p in plans.items()}

        self._plans = {
            n: Plan(replace(options[n], sparsity=own), worth[n], layout, found)
            for n, (own, layout, found) in ranks.first(plan).items()
        }
        return self._plans

    def keep(self, layouts: Mapping[str, BlockLayout]) -> None:
        """Keep the blocks of these layouts from now on, and no others, in the layers they name.

        Raises:
            ValueError: a name is none of :attr:`layers`, or a layout is not of the layer's size and
                the pruner's block.
        """
        where = f"{self.name}.keep"
        for name, layout in layouts.items():
            if name not in self._masks:
                raise ValueError(
                    f"{where}: no layer {name!r} is pruned here (only {', '.join(self._masks)})"
                )
            own = self._masks[name].layout().blocking
            if layout.blocking != own:
                raise ValueError(
                    f"{where}: the layout of layer {name!r} must have its size and the pruner's "
                    f"block (got {layout.blocking}, the layer has {own})"
                )
        self._set(ranks.first_layouts(layouts))
        self._apply()

    def __repr__(self) -> str:
        if not self._masks:
            return f"{self.name}(ended)"
        layers = f"{len(self.layers)} layer{'s' * (len(self.layers) != 1)}"
        return f"{self.name}({layers}, step {self.steps}, {self.sparsity:.1%} of blocks removed)"

    # -- the training loop --------------------------------------------------------------------

    def step(self, *, skipped: bool = False) -> None:
        """Call once after each ``optimizer.step()``: drop or zero what goes.

        With several backward passes per optimizer step, it is still called once per optimizer step.

        Args:
            skipped: The optimizer has made no step, as under a GradScaler that found infinite
                gradients: nothing changes, :attr:`steps` included, and gradients that were looked
                at are forgotten.

        Raises:
            RuntimeError: blocks change, and no optimizer that was passed or attached holds them;
                blocks are to be regrown by gradient, and no backward pass has gone through a layer.
        """
        self._check_attached("step")
        if skipped:
            self.skip()
            return
        self.steps += 1
        try:
            self.update()
        except BaseException:
            self.steps -= 1
            raise
        self._apply()

    def attach(self, *optimizers: Optimizer) -> None:
        """Let optimizers' states follow the stored blocks, from the next change on."""
        new = check_optimizers(f"{self.name}.attach", optimizers)
        self._optimizers += tuple(o for o in new if all(o is not old for old in self._optimizers))

    @property
    def sparsity(self) -> float:
        """Removed share of the blocks of all layers, now."""
        self._check_attached("sparsity")
        layouts = self.layouts().values()
        stored = sum(layout.nnz_blocks for layout in layouts)
        return 1.0 - stored / sum(math.prod(layout.block_grid) for layout in layouts)

    def layouts(self) -> dict[str, BlockLayout]:
        """Name -> layout that stores what is kept now: all, before the first :meth:`keep`."""
        return {name: mask.layout() for name, mask in self._masks.items()}

    @torch.no_grad()
    def report(self) -> SparsifyReport:
        """What is kept now, in terms of the saliency the last layout search saw.

        After :meth:`load_state_dict` that saliency is not known, and shares of it are NaN.
        """
        self._check_attached("report")
        if not self._plans and self.sparsity == 0.0:
            raise RuntimeError(f"{self.name}.report: nothing has been removed yet")
        layers = [
            LayerReport.of(name, layout.to("cpu"), *_seen(self._plans.get(name)))
            for name, layout in self.layouts().items()
        ]
        latency = None if self._budget is None else self._budget.latency
        return SparsifyReport(tuple(layers), self._skipped, latency)

    # -- the end ------------------------------------------------------------------------------

    @torch.no_grad()
    def finalize(self, *, inplace: bool = False) -> nn.Module:
        """Return the model with sparse layers in place of the masked ones.

        It computes what the masked model computes, up to rounding.

        Args:
            inplace: Change the model itself; the pruner is done then. Otherwise the result is a
                deep copy and training may go on.

        Raises:
            ValueError: a layer has hooks that would be lost, or is of a type or on a device that
                sparse layers cannot compute with: masks train anywhere, ``model.float().cpu()``
                brings them home.
        """
        self._check_attached("finalize")
        check_whole(f"{self.name}.finalize", self.model.parameters(), GATHER)
        unfinished = {n: m for n, m in self.modules().items() if not isinstance(m, SparseLayer)}
        for name, layer in unfinished.items():
            parameter = self._masks[name].parameter
            check_hooks(self.name, name, layer, parameter if inplace else None)
            check_weight(f"{self.name}.finalize: layer {name!r}", parameter)
        if inplace and "" in self.layers:
            raise ValueError(
                f"{self.name}: a model that is one layer cannot be replaced in place; "
                "use inplace=False"
            )
        with self._copying():
            target = copy_or_same(f"{self.name}.finalize", self.model, inplace)
        new: dict[str, nn.Module] = {}
        for name in unfinished:
            layer = target.get_submodule(name)
            assert isinstance(layer, DenseLayer)
            layout = self._masks[name].layout()
            values = nn.Parameter(
                layout.pack(oriented(layer, layer.weight)),
                requires_grad=self._masks[name].parameter.requires_grad,
            )
            new[name] = make_sparse(
                sparse_type(layer),
                layer,
                layout,
                bias=layer.bias,  # type: ignore[arg-type]
                values=values,
            )
        target = replace_modules(target, new)
        if inplace:
            self._end()
        return target

    def remove(self) -> nn.Module:
        """Make the model an ordinary dense one again, with the masked weights; end the pruner.

        Raises:
            ValueError: an optimizer's states cannot follow the stored blocks, or a layer on stored
                blocks has hooks, which would be lost; nothing is changed then.
        """
        self._check_attached("remove")
        for mask in self._masks.values():
            mask.check_unset(f"{self.name}.remove", self._optimizers)
        for mask in self._masks.values():
            mask.unset(self._optimizers)
        self._end()
        return self.model

    # -- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Steps, masks and permutations: with the model's state, all to resume from."""
        self._check_attached("state_dict")
        return {
            "steps": self.steps,
            "execution": self.execution,
            "arguments": self.arguments(),
            "layers": {
                name: {"block": mask.block, **{k: v.clone() for k, v in mask.state_dict().items()}}
                for name, mask in self._masks.items()
            },
            **self.extra_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a pruner of the same layers and settings stopped.

        Settings that hold functions or data (an importance, a target's example) are compared by
        name. To go on with another schedule, say, load first and set :attr:`schedule` then.

        Load the model's and the optimizer's state too: this one holds no weights. Optimizers number
        Parameters in the model's order, which masking changes: make the optimizer after the
        pruner in both programs, or before it in both. With ``execution="sparse"`` this comes first:
        it makes those layers sparse that were, and those dense that were, and the model's and the
        optimizer's state then find the shapes they know.

        Raises:
            ValueError: the state is of other layers, shapes or settings, or damaged; the message
                names what differs. Pruner, model and optimizers are as they were then.
        """
        where = f"{self.name}.load_state_dict"
        self._check_attached("load_state_dict")
        check_state(where, state)
        known = ("steps", "layers", "arguments", *self.extra_state())
        missing = [k for k in known if k not in state]
        if missing:
            raise ValueError(f"{where}: the state lacks {', '.join(missing)}")
        steps = check_count(where, "steps", state["steps"])
        layers = check_mapping(where, "layers", state["layers"])
        if set(layers) != set(self._masks):
            raise ValueError(
                f"{where}: the state is of layers {sorted(layers)}, "
                f"this pruner of {sorted(self._masks)}; make the pruner with the same include "
                "and exclude"
            )
        execution = state.get("execution", "masked")
        if execution != self.execution:
            raise ValueError(
                f"{where}: the state is of a pruner with "
                f"execution={execution!r}, this one has {self.execution!r}; make the pruner with "
                "the same execution"
            )
        layouts = {}
        for name, mask in self._masks.items():
            saved = check_mapping(where, f"layer {name!r}", layers[name])
            check_flag(where, f"dense of layer {name!r}", saved.get("dense", False))
            try:
                block = check_block(where, saved["block"])
                if block == mask.block:
                    layouts[name] = mask.saved_layout(saved)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"{where}: layer {name!r} of the state is of another size than the model's, "
                    f"or damaged ({type(error).__name__}: {error})"
                ) from error
            if block != mask.block:
                raise ValueError(
                    f"{where}: layer {name!r} has blocks of {mask.block} here "
                    f"and {block} in the state; make the pruner with the same block"
                )
        self._check_arguments(where, check_mapping(where, "arguments", state["arguments"]))
        self.check_extra_state(where, state)
        # Of all Parameters of the layer: a method may have its own in place of the weight.
        early = self.steps == 0 and any(
            optimizer.state.get(parameter) and layouts[name] != self._masks[name].layout()
            for name, layer in self.modules().items()
            for parameter in layer.parameters()
            for optimizer in self._optimizers
        )
        try:
            self._set(layouts, saved=layers)
        except ValueError as error:
            raise ValueError(f"{where}: {error}. {_FIRST}" if early else str(error)) from error
        if early:
            warn(
                f"{where}: an optimizer had states already, which went the way of other blocks. "
                f"{_FIRST}"
            )
        self.steps = steps
        self._plans = {}
        self.load_extra_state(state)
        self._apply()

    # -- inside -------------------------------------------------------------------------------

    def _whole(self, name: str) -> BlockLayout:
        """The layout that stores all blocks of a layer, in the order they stand."""
        layer, block = self.layers[name], self.layer_options[name].block
        weight = oriented(layer, layer.weight.detach())
        sizes = Blocking.of(self.name, f"weight of layer {name!r}", weight, block, groups_of(layer))
        return BlockLayout.from_block_mask(
            torch.ones(sizes.grid, dtype=torch.bool, device=weight.device),
            sizes.block,
            sizes.out_features,
            sizes.in_features,
            kernel_size=sizes.kernel_size,
            groups=sizes.groups,
        )

    def _check_execution(self) -> None:
        """Raise unless ``execution`` is known, and the layers go with "sparse"."""
        where = self.name
        if self.execution not in get_args(Execution):
            raise ValueError(
                f"{where}: execution must be 'masked' or 'sparse' (got {describe(self.execution)})"
            )
        if self.execution == "masked":
            return
        if "" in self.layers:
            raise ValueError(
                f"{where}: a model that is one layer cannot be replaced in place, as "
                "execution='sparse' does; put it into an nn.Sequential"
            )
        for name, layer in self.layers.items():
            check_hooks(where, name, layer)
            check_weight(f"{where}: layer {name!r}", layer.weight)

    def _check_attached(self, method: str) -> None:
        if not self._masks:
            raise RuntimeError(
                f"{self.name}.{method}: the pruner has ended (remove() or "
                "finalize(inplace=True)); make a new one to prune further"
            )

    def _check_arguments(self, where: str, saved: Mapping[str, Any]) -> None:
        own = self.arguments()
        saved = {name: plain(value) for name, value in saved.items()}
        for name in [*own, *(n for n in saved if n not in own)]:
            if (name in saved, saved.get(name)) != (name in own, own.get(name)):
                raise ValueError(
                    f"{where}: {name} is {saved.get(name, 'absent')!r} in the state and "
                    f"{own.get(name, 'absent')!r} in this pruner; make the pruner with the same"
                )

    def _underway(self, together: float | None) -> dict[str, LayerOptions]:
        """Settings of the layers when all together have so much of the final sparsity.

        What a layer loses at least, it loses in proportion.
        """
        if together is None or not self.options.sparsity:
            return dict(self.layer_options)
        share = min(1.0, together / self.options.sparsity)
        return {
            n: replace(o, min_sparsity=o.min_sparsity * share)
            for n, o in self.layer_options.items()
        }

    def _costs(self) -> Mapping[str, float]:
        """Name -> what one stored number costs, in the target's unit."""
        return {} if self._budget is None else self._budget.costs

    def _copying(self) -> AbstractContextManager[None]:
        """Surrounds the copying of the model."""
        return nullcontext()

    def _set(
        self, layouts: Mapping[str, BlockLayout], *, saved: Mapping[str, Any] | None = None
    ) -> None:
        """Let the layers keep what layouts say, and be dense or sparse as they were saved."""
        dense = {n: bool(layer["dense"]) for n, layer in (saved or {}).items() if "dense" in layer}
        trained = self.steps > 0 and saved is None
        for name, layout in layouts.items():
            mask = self._masks[name]
            if mask.changes(layout, dense.get(name)):
                mask.check(self.name, self._optimizers, trained)
                if dense.get(name):
                    mask.check_unset(self.name, self._optimizers)
        for name, layout in layouts.items():
            self._masks[name].set(layout, self._optimizers, dense.get(name))

    def _apply(self) -> None:
        for mask in self._masks.values():
            mask.apply()

    def _end(self) -> None:
        self._masks = {}


_FIRST = (
    "To resume, load the pruner's state first, then the model's and the optimizer's "
    "(docs/training.md)"
)


def _seen(plan: Plan | None) -> tuple[Tensor | None, SearchResult | None]:
    return (None, None) if plan is None else (plan.saliency, plan.search)
