"""Pruning by a Bayesian network's posterior: scores of draws become layouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..bayes.data import check_count
from ..bayes.ensemble import Ensemble
from ..bayes.network import layer_name
from ..bayes.posterior import Posterior
from ..bayes.priors import Gaussian
from ..bayes.scores import block_score, input_score, spread
from ..blocking import Blocking, removed_count
from ..checks import describe
from ..layout_search import search_method
from ..modules import replace_modules
from ..nn.linear import SparseLinear
from .options import LayerOverride, shows_settings
from .orders import Share
from .plan import Scope
from .pruner import Execution, Pruner
from .target import Target
from .tree import Selector

if TYPE_CHECKING:
    from typing_extensions import Unpack

Granularity = Literal["block", "input"]
#: Where settings have another default than elsewhere.
_DEFAULTS: LayerOverride = {"reorder": "identity", "allow_empty_rows": True}


class DSMPruner(Pruner):
    r"""Keeps the blocks that a posterior holds for large, in all its draws.

    A block is worth ``E|W_B| * P(|W_B| > t)`` under the draws of one chain, t the 10 % quantile of
    all norms; with ``granularity="input"`` whole inputs are. :meth:`prune` fixes one layout per
    layer for all draws. The network that is pruned is the mean of the draws, an ordinary one that
    may be fine-tuned with :meth:`step` and ends in :meth:`finalize`; :meth:`ensemble` makes a
    sparse network of each of several draws, under the same layouts. (Arnstad et al., "Dirichlet
    scale mixture priors for Bayesian neural networks", arXiv 2602.19859; the authors prune each
    draw by itself, which :func:`tetris.bayes.prune_draws` does and no layout can.)

    Args:
        posterior: Draws; a posterior of several chains must be narrowed to one,
            ``posterior.chain(0)``, since hidden nodes differ between chains.
        granularity: ``"block"``, or ``"input"``: inputs (bi of them together) stay or go in all
            rows.
        include: Layers ``linear1``, ``linear2``, ...; by default those with a shrinkage prior, or
            the first if none has one.
        exclude: Layers to leave alone.
        overrides: Settings for some layers.
        scope: ``"layer"`` or ``"global"``; this and the next four as for :class:`Pruner`.
        share: Channels that several layers keep in one order.
        target: What is to be left, in place of ``sparsity``; for granularity "block".
        execution: ``"masked"`` or ``"sparse"``, of fine-tuning.
        optimizers: Of fine-tuning with ``execution="sparse"``.
        progress: Show progress bars.
        **settings: ``sparsity``, ``block`` and the other fields of :class:`LayerOptions`. Two have
            another default here. ``reorder`` is ``"identity"``: the prior's blocks lie in the order
            of inputs; with a search, blocks are worth the sum of what their weights are worth.
            ``allow_empty_rows`` is True: a node that lambda has turned off keeps its bias alone,
            and a floor would pay for its noise with blocks of nodes that compute (digits, 64-256-
            256-10, MAP, 16x16 blocks, 75 % removed, no fine-tuning: accuracy .50 with the floor,
            .98 without).

    Attributes:
        posterior: As passed.

    Raises:
        ValueError: several chains; granularity "input" together with a search, a target or
            another scope.

    Example:
        >>> posterior = bayes.sample_nuts(network, x, y)
        >>> pruner = DSMPruner(posterior.chain(0), sparsity=0.9, block=(4, 2))
        >>> pruner.prune()
        >>> sparse, many = pruner.finalize(), pruner.ensemble(draws=20)
    """

    @partial(shows_settings, **_DEFAULTS)
    def __init__(
        self,
        posterior: Posterior,
        *,
        granularity: Granularity = "block",
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
        overrides: Mapping[str, LayerOverride] | None = None,
        scope: Scope = "layer",
        share: Share = (),
        target: Target | None = None,
        execution: Execution = "masked",
        optimizers: Optimizer | Iterable[Optimizer] = (),
        progress: bool = False,
        **settings: Unpack[LayerOverride],
    ) -> None:
        if not isinstance(posterior, Posterior):
            raise TypeError(
                f"{self.name}: posterior must be a tetris.bayes.Posterior, such as sample_hmc, "
                f"sample_nuts and MAP.fit return (got {describe(posterior)})"
            )
        if len(posterior.theta) != 1:
            raise ValueError(
                f"{self.name}: hidden nodes differ between chains, so scores are of one chain "
                f"(got {len(posterior.theta)}); pass posterior.chain(0)"
            )
        if granularity not in get_args(Granularity):
            raise ValueError(
                f"{self.name}: granularity must be 'block' or 'input' (got {describe(granularity)})"
            )
        self.posterior = posterior
        self.granularity: Granularity = granularity
        network = posterior.network
        if granularity == "input" and (target is not None or scope != "layer"):
            raise ValueError(
                f"{self.name}: granularity='input' removes a share of each layer's inputs; "
                f"leave out target and scope (got {describe(target)} and {describe(scope)})"
            )
        if include is None:
            shrunk = [i for i, p in enumerate(network.priors) if not isinstance(p, Gaussian)]
            include = [layer_name(i) for i in shrunk or [0]]
        settings = {**_DEFAULTS, **settings}
        self._draws = posterior.weights().flat()
        super().__init__(
            network.module(self._draws.mean()),
            include=include,
            exclude=exclude,
            types=(nn.Linear,),
            overrides=overrides,
            scope=scope,
            share=share,
            target=target,
            execution=execution,
            optimizers=optimizers,
            progress=progress,
            **settings,  # type: ignore[arg-type]
        )
        self._index = {layer_name(i): i for i in range(network.layers)}
        for name, own in self.layer_options.items():
            if granularity == "input" and search_method(self.name, own.reorder) != "identity":
                raise ValueError(
                    f"{self.name}: granularity='input' keeps whole inputs, whatever their order; "
                    f"layer {name!r} asks for reorder={own.reorder!r}, leave it out"
                )

    def arguments(self) -> dict[str, Any]:
        """Also what stays or goes together."""
        return {**super().arguments(), "granularity": self.granularity}

    def scores(self) -> dict[str, Tensor]:
        """Name -> worth of weights [out, in]; that of blocks or inputs is spread over theirs."""
        self._check_attached("scores")
        result = {}
        for name, layer in self.layers.items():
            own = self.layer_options[name]
            weights = self._draws.layers[self._index[name]][0]
            blocking = Blocking.of(self.name, "weight", layer.weight, own.block)
            if self.granularity == "input":
                result[name] = spread(self._columns(weights, own.block[1], blocking), blocking)
            elif search_method(self.name, own.reorder) == "identity":
                result[name] = spread(block_score(weights, own.block), blocking)
            else:
                result[name] = block_score(weights, (1, 1))
        return result

    def prune(self) -> None:
        """Fix the layouts: score, search under scope and settings, and keep."""
        self._check_attached("prune")
        sparsity = None
        if self.granularity == "input":  # floor to whole columns, the number of blocks that go
            sparsity = {}
            for name, own in self.layer_options.items():
                rows, columns = Blocking.of(
                    self.name, "weight", self.layers[name].weight, own.block
                ).grid
                gone = removed_count(own.sparsity, columns) * rows
                sparsity[name] = min(1.0, (gone + 0.5) / (rows * columns))
        plans = self.search(self.scores(), sparsity)
        self.keep({name: plan.layout for name, plan in plans.items()})

    @torch.no_grad()
    def ensemble(self, draws: int = 20) -> Ensemble:
        """Sparse networks of evenly spaced draws, all under the layouts that are kept now.

        Fine-tuning has no part in them.

        Args:
            draws: How many, at most those there are.

        Raises:
            RuntimeError: nothing has been removed yet, see :meth:`prune`; or the pruner has ended.
        """
        self._check_pruned("ensemble")
        check_count(f"{self.name}.ensemble", "draws", draws, 1)
        layouts = self.layouts()
        chosen = self.posterior.thin(draws).weights().flat()
        members = []
        for index in range(len(chosen.layers[0][0])):
            model = self.posterior.network.module(chosen[index])
            sparse: dict[str, nn.Module] = {}
            for name, layout in layouts.items():
                layer = model.get_submodule(name)
                assert isinstance(layer, nn.Linear)
                sparse[name] = SparseLinear.from_dense(layer, layout=layout)
            members.append(replace_modules(model, sparse))
        noise = None if chosen.noise is None else chosen.noise.float()
        return Ensemble(members, chosen.task, noise)

    def finalize(self, *, inplace: bool = False) -> nn.Module:
        """Return the model with sparse layers; see :meth:`Pruner.finalize`. After :meth:`prune`."""
        self._check_pruned("finalize")
        return super().finalize(inplace=inplace)

    def _check_pruned(self, method: str) -> None:
        self._check_attached(method)
        if not self._plans and self.sparsity == 0.0:
            raise RuntimeError(
                f"{self.name}.{method}: nothing has been removed yet; call prune() first, or "
                "remove() for the dense model"
            )

    def _columns(self, weights: Tensor, width: int, blocking: Blocking) -> Tensor:
        """[G, C] ranks of groups of inputs, equal in all block rows: no tie splits a column."""
        score = input_score(block_columns(weights, width))
        rank = torch.empty_like(score)
        rank[score.argsort(stable=True)] = torch.arange(1, len(score) + 1, dtype=score.dtype)
        return rank.expand(blocking.grid[0], -1)


def block_columns(weights: Tensor, width: int) -> Tensor:
    """[draws, 1, C]: norms of groups of ``width`` inputs over all outputs."""
    norms = weights.norm(dim=1, keepdim=True)
    missing = -norms.shape[-1] % width
    padded = torch.nn.functional.pad(norms, (0, missing))
    return padded.unflatten(-1, (-1, width)).norm(dim=-1)
