"""VR-PGE: sparse training, masks drawn in every step and learnt from loss differences."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from ...checks import check_weight, describe, plain
from ...layout import BlockLayout
from ...nn.base import SparseLayer
from ...nn.kinds import DENSE_TYPES, DenseLayer, oriented
from ...parameters import check_kind, check_optimizers, check_states
from ...relayout import all_blocks
from ...sharding import check_whole
from .. import ranks
from ..options import LayerOptions, LayerOverride, shows_settings
from ..orders import Share
from ..plan import Scope
from ..pruner import Execution, Pruner
from ..report import warn_of_shortfall
from ..saliency import layer_saliency, prepare_importance
from ..states import check_generator, check_like, check_mapping, check_optimizer, check_state
from ..target import Target
from ..tree import Selector, check_hooks
from .carry import carry, spread
from .exchange import Exchange
from .gates import Atom, Gates, estimate, make_gates
from .passes import own_gradients, run_masks
from .sampled import SampledLayer, TopBlocks

if TYPE_CHECKING:
    from typing_extensions import Unpack


class VRPGEPruner(Pruner):
    """Trains on sampled blocks from the first step, and learns which ones to keep (VR-PGE).

    Every block B has a gate s_B, the probability that a training step computes with it; the gates
    of all layers spend at most ``sum_B cost_B s_B <= K``, K = (1 - sparsity) of the whole. A step
    draws Ks masks, runs the model forward and backward once with each on the *same* data, and
    updates

    * the weights by ordinary backpropagation of the mean loss, through the blocks that were drawn,
    * the gates by ``g = 1 / (Ks - 1) sum_k (L_k - mean(L)) z_k`` with ``z = (m - s) / sqrt(s (1 -
      s))``, whose mean is ``sqrt(s (1 - s)) * grad_s E[L]``; then they are projected onto the
      budget.

    (Zhou et al., "Efficient Neural Network Training via Forward and Backward Propagation
    Sparsification", NeurIPS 2021; the estimator follows the authors' code. Their gate is one per
    filter, here one per block, or per block row with ``atom="channel"``.)

    A drawn mask *is* a layout, and its step runs on the sparse kernels in both directions; there is
    nothing to pad, for they take any number of blocks. :meth:`prune` then keeps the blocks with the
    largest gates, the model is fine-tuned with :meth:`step`, and :meth:`finalize` returns it. The
    authors end with the best of ten sampled masks.

    **What the optimizer costs.** All blocks stay in memory, packed one after the other in the
    Parameter that was the dense weight's. Between :meth:`backward` and :meth:`step` the Parameter
    holds the drawn ones alone, and so do the states of attached optimizers: any optimizer with
    states shaped like the Parameter (SGD with momentum and weight decay, Adam, ...) then works on
    drawn blocks, at their cost. Blocks that were not drawn do not move in that step: their momentum
    and weight decay stand still, as with sparse gradients. With ``lazy=False`` the Parameter keeps
    its size and its gradient is zero elsewhere: all blocks move, as in the authors' code, at
    the optimizer's dense cost. The pruner need not know the optimizer then, until the shape or the
    order of weights changes: :meth:`refresh` asks for it, :meth:`prune` if ``execution="sparse"``.
    After :meth:`prune` with ``"masked"`` one that the pruner does not know is to be made anew.

    **In eval mode**, and in training mode outside :meth:`backward`, layers compute with the blocks
    that :meth:`prune` would keep now; nothing is drawn. Batch norm is the trap: its statistics mix
    masks while blocks are drawn, so measure them on the final mask
    (``torch.optim.swa_utils.update_bn``) before judging accuracy.

    **Several processes** (``torch.distributed``): every rank draws the same masks, and
    :meth:`backward` averages losses and all gradients over ranks. Do not wrap the model in
    DistributedDataParallel, whose hooks expect dense gradients.

    **On the CPU only**: masks are drawn, and blocks moved, by the CPU. A model on a GPU is refused;
    what :meth:`finalize` returns may go to one.

    Args:
        model: The model to train; changed in place until :meth:`remove` or :meth:`finalize`.
        options: Settings of the layers as one object, in place of the keywords below.
        samples: Ks, masks per step, at least 2.
        atom: ``"block"``; ``"channel"``: block rows are kept or dropped as a whole (with bo = 1:
            filters), and may all be dropped.
        gate_lr: Learning rate of the gates' Adam; :attr:`gate_optimizer` has it.
        clip: Largest joint norm of all gradients and g; None does not clip.
        clamp: Keep gates in [clamp, 1 - clamp], such as 1e-3: a gate at 0 or 1 has no gradient and
            can only leave by Adam's momentum. 0 lets them settle.
        lazy: Optimizers work on drawn blocks only, see above.
        include: Layers to prune; this and the rest as for :func:`tetris.sparsify`.
        exclude: Layers to leave alone.
        types: Exact types to prune.
        overrides: Settings for some layers; one with a sparsity has a budget of its own.
        scope: ``"global"``: one budget for all layers; ``"layer"``: one each.
        share: Channels that several layers keep in one order, see :class:`SharedOrder`.
        target: What is to be left, in place of ``sparsity``.
        execution: Of the fine-tuning after :meth:`prune`: ``"sparse"`` or ``"masked"``.
        optimizers: Whose states follow the blocks, one or several.
        progress: Show progress bars during searches.
        sparsity: 1 - K: the share of blocks that is dropped. The paper's code calls the *kept*
            share prune_rate.
        block: (bo, bi).
        importance: What a weight is worth to the search for the permutations.
        reorder: Search to use; ``"identity"`` does for random weights, which have no structure.
        balanced: Not here: gates compete wherever they are.
        allow_empty_rows: Let block rows lose all their blocks in :meth:`prune`. Drawn masks may
            leave them empty anyway.
        tie_kernel: One gate for all kernel positions of a block of channels.
        seed: Of the search, and of the masks.
        budget: Seconds per layer for the search.
        sweeps: Sweeps instead of seconds.

    Attributes:
        gate_optimizer: ``torch.optim.Adam`` of the gates, for learning rate schedules.

    Raises:
        ValueError: samples below 2, a budget that holds no block, a setting out of its range; a
            layer to prune is not on the CPU; an optimizer's states cannot follow blocks.

    Example:
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        >>> pruner = tetris.prune.VRPGEPruner(
        ...     model, sparsity=0.9, block=(16, 16), reorder="identity", optimizers=optimizer
        ... )
        >>> for x, target in batches:
        ...     optimizer.zero_grad()
        ...     loss = pruner.backward(lambda: F.cross_entropy(model(x), target))
        ...     optimizer.step()
        ...     pruner.step()
        >>> pruner.prune()                          # fine-tune with optimizer.step, pruner.step
        >>> sparse = pruner.finalize()
    """

    @shows_settings
    def __init__(
        self,
        model: nn.Module,
        options: LayerOptions | None = None,
        *,
        samples: int = 2,
        atom: Atom = "block",
        gate_lr: float = 12e-3,
        clip: float | None = 3.0,
        clamp: float = 0.0,
        lazy: bool = True,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
        types: tuple[type[nn.Module], ...] = DENSE_TYPES,
        overrides: Mapping[str, LayerOverride] | None = None,
        scope: Scope = "global",
        share: Share = (),
        target: Target | None = None,
        execution: Execution = "sparse",
        optimizers: Optimizer | Iterable[Optimizer] = (),
        progress: bool = False,
        **settings: Unpack[LayerOverride],
    ) -> None:
        _check_settings(self.name, samples, atom, gate_lr, clip, clamp)
        self.samples = samples
        self.atom: Atom = atom
        self.clip = clip
        self.lazy = lazy
        super().__init__(
            model,
            options,
            include=include,
            exclude=exclude,
            types=types,
            overrides=overrides,
            scope=scope,
            share=share,
            target=target,
            execution=execution,
            optimizers=optimizers,
            progress=progress,
            **settings,
        )
        for name, own in self.layer_options.items():
            if own.balanced:
                raise ValueError(
                    f"{self.name}: gates compete wherever they are, which balanced=True forbids "
                    f"(layer {name!r}); leave it out"
                )
            if own.bounded:
                raise ValueError(
                    f"{self.name}: gates compete without bounds for layers; give layer {name!r} a "
                    "sparsity of its own by overrides=, and leave min_sparsity and max_sparsity out"
                )
        self.generator = torch.Generator().manual_seed(self.options.seed)
        self._top = TopBlocks(
            *make_gates(
                self.name,
                {name: self._whole(name).blocking for name in self.layers},
                self.layer_options,
                self._budgets(),
                atom=atom,
                costs=self._costs(),
                clamp=float(clamp),  # what a state may hold, also of numpy's numbers
            )
        )
        for name, mask in self._masks.items():  # also with lazy=False: weights become blocks
            check_states(f"{self.name}: layer {name!r}", mask.parameter, self._optimizers)
        self._exchange = Exchange(model, self.layers, self._top, lazy)
        self._pending = False  # between backward() and step()
        self.gate_optimizer = torch.optim.Adam([self.gates.s], lr=float(gate_lr), fused=True)
        prepare_importance(model, self.layers, self.layer_options)
        plans = self.search(
            {
                name: layer_saliency(self.name, name, layer, self.layer_options[name].importance)
                for name, layer in self.layers.items()
            }
        )
        self._sample({name: all_blocks(plan.layout) for name, plan in plans.items()})

    # -- the training loop --------------------------------------------------------------------

    def attach(self, *optimizers: Optimizer) -> None:
        """Let optimizers' states follow the blocks, from the next change on.

        Raises:
            ValueError: one is of a kind that cannot follow blocks; none is attached then.
        """
        where = f"{self.name}.attach"
        for optimizer in check_optimizers(where, optimizers):
            for name, layer in self.sampled.items():
                check_kind(f"{where}: layer {name!r}", layer.weight, optimizer)
        super().attach(*optimizers)

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Draw the masks of a step, and compute all gradients.

        Call ``optimizer.zero_grad()`` first: masks differ from step to step, so gradients do not
        add up over calls. If something fails, gradients and weights are what they were before.

        Args:
            closure: Runs the model on the step's data and returns the loss, a scalar; it calls no
                ``backward``. Return the unscaled loss, and leave a ``GradScaler`` out: ``clip``
                bounds gradients as they are here. Called ``samples`` times, with one mask each,
                from the same state of torch's random numbers: dropout is the same in all, so losses
                differ by masks alone.

        Returns:
            The mean loss, detached.

        Raises:
            RuntimeError: :meth:`step` has not been called since the last time; :meth:`prune` has;
                a parameter of the model has a gradient already; the closure ran none of the layers
                in training mode; a loss is not finite; no attached optimizer holds a weight (with
                ``lazy``).
            TypeError: the closure returns something else than a tensor.
            ValueError: the loss is no scalar, or has no gradient; the model was moved to a GPU; an
                optimizer's states cannot follow blocks.
        """
        where = f"{self.name}.backward"
        self._check_sampling("backward")
        check_whole(where, self.model.parameters(), "fully_shard after prune()")
        _check_on_cpu(where, self.sampled)
        if not callable(closure):
            raise TypeError(
                f"{where}: pass a function that computes the loss, once for each mask: "
                f"pruner.backward(lambda: criterion(model(x), target)) (got {describe(closure)})"
            )
        if self._pending:
            raise RuntimeError(
                f"{where}: gradients of the last call are pending; call optimizer.step() and "
                "pruner.step() after each backward()"
            )
        # Not only where states are cut: prune() moves them, too, after the whole training.
        self._check_states(where, held=self.lazy, otherwise=", or make the pruner with lazy=False")
        with own_gradients(where, self.model):
            try:
                masks = self.gates.draw(self.samples, self.generator)
                drawn = self._exchange.cut(masks, self._optimizers)
                losses = run_masks(where, closure, self._exchange, drawn)
                measured = ranks.mean(torch.tensor(losses, dtype=torch.float64))
                self.gates.s.grad = estimate(measured, masks, self.gates.s)
                for parameter in _learning(self.model):
                    assert parameter.grad is not None
                    parameter.grad = ranks.mean(parameter.grad)
                self._clip()
            except BaseException:
                self._exchange.put_back()
                self.gates.s.grad = None
                raise
        self._pending = True
        return measured.mean()

    def update(self) -> None:
        """While sampling: put drawn blocks back, and let the gates learn; called by :meth:`step`.

        Raises:
            RuntimeError: there was no :meth:`backward` since the last step.
        """
        if not self.sampled:
            return
        if not self._pending:
            raise RuntimeError(
                f"{self.name}.step: no gradients to learn from; call loss = "
                "pruner.backward(closure) and optimizer.step() first, or prune() to fine-tune"
            )
        self._exchange.put_back()
        self._pending = False
        self.gate_optimizer.step()
        self.gates.s.grad = None
        self.gates.project()
        self._top.version += 1

    def skip(self) -> None:
        """Put drawn blocks back; the gates learn nothing."""
        if self._pending:
            self._exchange.put_back()
            self._pending = False
            self.gates.s.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Search the permutations anew, on ``s_B * |w|``; between epochs, as a rule.

        Gates travel with their weights: each weight keeps its gate, and a new block's gate (and
        Adam's moments of it) is the mean over its weights. Entries that ragged blocks lack count,
        too, so what the gates of a layer spend stays as it was.

        Raises:
            RuntimeError: between :meth:`backward` and :meth:`step`, or after :meth:`prune`; after a
                step, no attached optimizer holds a weight, whose momentum would stay behind.
            ValueError: a layer has hooks, which its replacement would not have.
        """
        self._check_sampling("refresh")
        self._check_idle("refresh")
        self._exchange.check_hooks(f"{self.name}.refresh")
        self._check_states(f"{self.name}.refresh", held=self.steps > 0)
        old = {name: layer.whole for name, layer in self.sampled.items()}
        parts = self._top.parts
        chance = {name: spread(whole, parts[name], self.gates.s) for name, whole in old.items()}
        self._exchange.unsample(self._optimizers)
        worth = {n: oriented(layer, layer.weight).abs() for n, layer in self.layers.items()}
        plans = self.search({n: oriented(self.layers[n], chance[n] * w) for n, w in worth.items()})
        self._sample({name: all_blocks(plan.layout) for name, plan in plans.items()})
        state = self.gate_optimizer.state[self.gates.s].values()
        for vector in (self.gates.s, *(v for v in state if v.dim())):
            for name, layer in self.sampled.items():
                part = parts[name]
                vector[part.gates] = carry(old[name], layer.whole, part, vector)
        self.gates.project()

    def prune(self) -> None:
        """Keep the blocks with the largest gates within the budget, for good.

        The model then trains as with any other pruner: ``loss.backward()``, ``optimizer.step()``,
        ``pruner.step()``. Measure batch norm's statistics anew first.

        Raises:
            RuntimeError: between :meth:`backward` and :meth:`step`, or called before; with
                ``execution="sparse"``, no attached optimizer holds a weight.
            ValueError: a layer has hooks, which its replacement would not have.
        """
        self._check_sampling("prune")
        self._check_idle("prune")
        self.keep(self.layouts())
        kept = {name: layout.sparsity for name, layout in self.layouts().items()}
        asked = {name: own.sparsity for name, own in self.layer_options.items()}
        if self.scope == "global":
            asked = {name: asked[name] for name in self._fixed}
            if not self._fixed:
                kept, asked = {"all": self.sparsity}, {"all": self.options.sparsity}
        warn_of_shortfall(f"{self.name}.prune", kept, asked)

    # -- what is kept -------------------------------------------------------------------------

    @property
    def gates(self) -> Gates:
        """The gates of all layers; ``pruner.gates.s`` is float64[n]."""
        return self._top.gates

    @property
    def sampled(self) -> dict[str, SampledLayer]:
        """Name -> layer in the model while masks are drawn; empty after :meth:`prune`."""
        return self._top.layers

    def probabilities(self) -> dict[str, Tensor]:
        """Name -> float64[G, C], the gate of each block in the order of the layout."""
        return {
            name: part.blocks(self.gates.s).view(layer.whole.block_grid).clone()
            for name, part in self._top.parts.items()
            if (layer := self.sampled.get(name)) is not None
        }

    def layouts(self) -> dict[str, BlockLayout]:
        """Name -> layout of what is kept; while masks are drawn, of what :meth:`prune` would."""
        if not self.sampled:
            return super().layouts()
        masks = self._top.masks()
        return {
            name: layer.whole.with_blocks(masks[name].view(layer.whole.block_grid))
            for name, layer in self.sampled.items()
        }

    def modules(self) -> dict[str, DenseLayer | SparseLayer]:
        """Name -> layer as it is in the model now: a ``SampledLayer`` while masks are drawn."""
        return {**super().modules(), **self.sampled}  # type: ignore[dict-item]

    # -- the end ------------------------------------------------------------------------------

    def finalize(self, *, inplace: bool = False) -> nn.Module:
        """Return the model with sparse layers; see :meth:`Pruner.finalize`.

        Raises:
            RuntimeError: masks are still drawn; :meth:`prune` comes first.
        """
        if self.sampled:
            raise RuntimeError(
                f"{self.name}.finalize: masks are still being drawn; call prune() first, which "
                "fixes the blocks"
            )
        return super().finalize(inplace=inplace)

    def remove(self) -> nn.Module:
        """Make the model dense again, with what :meth:`prune` keeps; end the pruner."""
        if self.sampled:
            self.prune()
        return super().remove()

    # -- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Steps, gates, their optimizer, random numbers, permutations, and what is kept.

        Raises:
            RuntimeError: between :meth:`backward` and :meth:`step`.
        """
        self._check_idle("state_dict")
        return super().state_dict()

    def extra_state(self) -> dict[str, Any]:
        """What drawing masks needs to go on exactly, and the settings that must agree."""
        wholes = {name: layer.whole for name, layer in self.sampled.items()}
        found = {
            "orders": {
                n: {"row_perm": w.row_perm, "col_perm": w.col_perm} for n, w in wholes.items()
            },
            "gates": self.gates.s.detach(),
            "gate_optimizer": self.gate_optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "settings": {
                "samples": self.samples,
                "atom": self.atom,
                "clamp": self.gates.clamp,
                "budget": [budget.amount for budget in self.gates.budgets],
            },
        }
        return copy.deepcopy(found)

    def check_extra_state(self, where: str, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless gates, their optimizer, generator and orders are of this kind."""
        super().check_extra_state(where, state)
        check_like(where, "gates", state["gates"], self.gates.s)
        check_optimizer(where, "gate_optimizer", state["gate_optimizer"], self.gate_optimizer)
        check_generator(where, "generator", state["generator"])
        orders = check_mapping(where, "orders", state["orders"])
        if orders:  # none: the blocks are fixed
            check_mapping(where, "orders", orders, self.layers)
        for name, perms in orders.items():
            check_mapping(where, f"orders of layer {name!r}", perms, ("row_perm", "col_perm"))
            try:
                replace(self._masks[name].layout(), **perms)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{where}: orders of layer {name!r} in the state are damaged ({error})"
                ) from error

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take it back, and draw masks again if the saved pruner did."""
        # Adam keeps the tensors that it is given: without a copy, training would change the state.
        own = copy.deepcopy({key: state[key] for key in self.extra_state()})
        with torch.no_grad():
            self.gates.s.copy_(own["gates"])
        self.gate_optimizer.load_state_dict(own["gate_optimizer"])
        self.generator.set_state(own["generator"])
        self._sample(
            {name: replace(self._whole(name), **perms) for name, perms in own["orders"].items()}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a pruner of the same settings stopped; see :meth:`Pruner.load_state_dict`.

        Load the pruner's state before the model's and the optimizer's: it gives weights the shapes
        these know.

        Raises:
            ValueError: as there; samples, atom, clamp or a budget differ.
        """
        where = f"{self.name}.load_state_dict"
        self._check_idle("load_state_dict")
        check_state(where, state)
        own = self.extra_state()["settings"]
        settings = check_mapping(where, "settings", state.get("settings", own), own)
        for name, value in settings.items():
            if plain(value) != plain(own[name]):
                source = "sparsity, target and scope" if name == "budget" else name
                raise ValueError(
                    f"{where}: {name} is {value!r} in the state and {own[name]!r} in this pruner; "
                    f"make the pruner with the same {source}"
                )
        gates = state.get("gates")
        if isinstance(gates, Tensor) and gates.shape != self.gates.s.shape:
            raise ValueError(
                f"{where}: the state has {gates.numel()} gates, this pruner "
                f"{len(self.gates.s)}; make the pruner with the same tie_kernel"
            )
        super().load_state_dict(state)

    # -- inside -------------------------------------------------------------------------------

    def _budgets(self) -> list[tuple[list[str], float]]:
        """Layers that share a budget, and its sparsity."""
        alone = set(self.layers) if self.scope == "layer" else self._fixed
        groups = [
            ([name], self.layer_options[name].sparsity) for name in self.layers if name in alone
        ]
        together = [name for name in self.layers if name not in alone]
        return [*groups, (together, self.options.sparsity)] if together else groups

    def _sample(self, wholes: Mapping[str, BlockLayout]) -> None:
        self._exchange.sample(wholes, self._optimizers)

    def _set(
        self, layouts: Mapping[str, BlockLayout], *, saved: Mapping[str, Any] | None = None
    ) -> None:
        # Masks and stored blocks start from dense layers.
        if self.sampled:
            self._exchange.check_hooks(self.name)
            moved = self.lazy or self.execution == "sparse"
            self._check_states(self.name, held=moved and self.steps > 0 and saved is None)
            self._exchange.unsample(self._optimizers)
        super()._set(layouts, saved=saved)

    def _clip(self) -> None:
        """Bound the joint norm of the gradients of weights and gates."""
        if self.clip is None:
            return
        learnt: list[Tensor] = [*_learning(self.model), self.gates.s]
        norm = get_total_norm([p.grad for p in learnt if p.grad is not None])
        if norm > self.clip:
            clip_grads_with_norm_(learnt, self.clip, norm)

    def _check_execution(self) -> None:
        _check_on_cpu(self.name, self.layers)
        super()._check_execution()
        if "" in self.layers:
            raise ValueError(
                f"{self.name}: a model that is one layer cannot be replaced in place; put it into "
                "an nn.Sequential"
            )
        for name, layer in self.layers.items():
            check_hooks(self.name, name, layer)
            check_weight(f"{self.name}: layer {name!r}", layer.weight)

    def _check_sampling(self, method: str) -> None:
        self._check_attached(method)
        if not self.sampled:
            raise RuntimeError(
                f"{self.name}.{method}: the blocks are fixed since prune(); train with "
                "loss.backward(), optimizer.step() and pruner.step()"
            )

    def _check_idle(self, method: str) -> None:
        if self._pending:
            raise RuntimeError(
                f"{self.name}.{method}: a step is under way; call optimizer.step() and "
                "pruner.step() first"
            )

    def _check_states(self, where: str, held: bool, otherwise: str = "") -> None:
        self._exchange.check_states(where, self._optimizers, held, otherwise)


def _learning(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that have a gradient."""
    return [p for p in model.parameters() if p.requires_grad and p.grad is not None]


def _check_on_cpu(where: str, layers: Mapping[str, DenseLayer | SampledLayer]) -> None:
    for name, layer in layers.items():
        if layer.weight.device.type != "cpu":
            raise ValueError(
                f"{where}: it draws blocks on the CPU, and layer {name!r} is on "
                f"{layer.weight.device}; move the model to the CPU until finalize()"
            )


def _check_settings(
    where: str, samples: int, atom: Atom, gate_lr: float, clip: float | None, clamp: float
) -> None:
    if not isinstance(samples, int) or samples < 2:
        raise ValueError(
            f"{where}: samples must be an int of 2 or more: the gates learn from differences "
            f"between losses (got {describe(samples)})"
        )
    if atom not in get_args(Atom):
        raise ValueError(f"{where}: atom must be 'block' or 'channel' (got {describe(atom)})")
    if not gate_lr > 0.0:
        raise ValueError(f"{where}: gate_lr must be positive (got {describe(gate_lr)})")
    if clip is not None and not clip > 0.0:
        raise ValueError(f"{where}: clip must be positive, or None (got {describe(clip)})")
    if not 0.0 <= clamp < 0.5:
        raise ValueError(
            f"{where}: clamp must be in [0, 0.5), such as 1e-3 (got {describe(clamp)})"
        )
