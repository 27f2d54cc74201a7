"""``tetris.analyze``: what a model would gain, and where it would lose."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checks import (
    check_block,
    check_flags,
    check_keywords,
    check_search,
    check_sparsity,
    check_weight,
    describe,
)
from ..cost import store
from ..cost.calls import calls_of, check_on_cpu
from ..cost.model import CostModel, come_from_memory
from ..layout_search import SearchOptions
from ..nn.kinds import DENSE_TYPES, groups_of, oriented
from ..progress import steps
from ..prune.options import LayerImportance, LayerOptions
from ..prune.saliency import check_importance, layer_saliency, prepare_importance
from ..prune.tree import Selector, fitting_block, select_layers
from .layers import Subject, analyze_layer
from .report import AnalysisReport

if TYPE_CHECKING:
    from typing_extensions import Unpack

BLOCKS = ((4, 1), (16, 1), (16, 16))
SPARSITIES = (0.75, 0.9)
SEARCH_S = 0.5
"""Seconds of a search, unless ``budget`` or ``sweeps`` says otherwise."""


@torch.no_grad()
def analyze(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    blocks: Iterable[tuple[int, int]] = BLOCKS,
    sparsities: Iterable[float] = SPARSITIES,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    types: tuple[type[nn.Module], ...] = DENSE_TYPES,
    importance: LayerImportance = "magnitude",
    measure: bool = False,
    threads: int | None = None,
    cost: CostModel | None = None,
    progress: bool = False,
    **search: Unpack[SearchOptions],
) -> AnalysisReport:
    """Say, layer by layer, what blocks would retain, how fast they would be, and where they lose.

    The model is not changed. Times are *predicted* by the cost model of this machine (see
    :func:`tetris.calibrate`), or the library's own if nothing was calibrated, for float32 on the
    CPU; the report says which. Dense is what torch computes, ``nn.Linear`` and ``nn.Conv2d``
    as they are.

    Args:
        model: Any module.
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of
            them by name; run once, in eval mode, to see how many tokens and pixels each layer gets.
            Without it there are no times and no recommendations: ``dense`` and ``overrides()`` of
            the report raise ValueError.
        blocks: Block shapes (bo, bi) to look at.
        sparsities: Shares of the blocks to remove, each with each block.
        include: Layers to analyze, as for :func:`tetris.sparsify`.
        exclude: Layers to leave out.
        types: Exact types to analyze.
        importance: What a weight is worth, as for :func:`tetris.sparsify`.
        measure: Measure dense and sparse layers, too, on random inputs of these sizes, with weights
            in cache and torch's number of threads. Needs the machine to itself.
        threads: To predict for; by default torch's number.
        cost: Another cost model.
        progress: Show a progress bar: a search takes half a second, and there is one for each
            layer, block and sparsity.
        **search: ``reorder``, ``seed``, ``budget``, ``sweeps``, ``balanced``, ``allow_empty_rows``
            and ``tie_kernel``, as for :func:`tetris.sparsify`.

    Returns:
        The report: ``print`` it; ``to_dict()``, ``to_markdown()``, ``plot(path)``; ``overrides()``
        and ``dense`` are what :func:`tetris.sparsify` takes to follow its recommendations.

    Raises:
        ValueError: an argument breaks a rule, a pattern matches nothing, there is no layer to
            analyze, the example does not go through one, or a weight is not on the CPU, for which
            times are.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> report = tetris.analyze(model, torch.randn(128, 256), exclude="classifier")
        >>> print(report)
        >>> sparse = tetris.sparsify(
        ...     model, overrides=report.overrides(), exclude=["classifier", *report.dense]
        ... )
    """
    where = "tetris.analyze"
    shapes, shares = checked_grid(where, blocks, sparsities)
    check_search(where, threads=threads)
    check_flags(where, measure=measure, progress=progress)
    own = [
        name for name in inspect.signature(analyze).parameters if name not in ("model", "search")
    ]
    check_keywords(where, search, [*own, *SearchOptions.__annotations__])
    options = LayerOptions(importance=importance, **search, where=where)
    if cost is not None and not isinstance(cost, CostModel):
        raise TypeError(f"{where}: cost must be a tetris.cost.CostModel (got {describe(cost)})")
    if measure and example_inputs is None:
        raise ValueError(f"{where}: measure=True needs example_inputs, for the sizes (got None)")
    if measure and threads not in (None, torch.get_num_threads()):
        raise ValueError(
            f"{where}: measure=True measures on torch's {torch.get_num_threads()} threads; call "
            f"torch.set_num_threads first (got threads={threads})"
        )
    selection = select_layers(where, model, include, exclude, types)
    layers = selection.layers
    if example_inputs is not None:
        check_on_cpu(where, layers, "leave example_inputs out: what is retained needs no times")
    for name, layer in layers.items():
        check_weight(f"{where}: layer {name!r}", layer.weight)
    check_importance(where, importance, layers)
    calls = {name: [] for name in layers}
    if example_inputs is not None:
        calls = calls_of(where, model, layers, example_inputs)
    with torch.enable_grad():
        prepare_importance(model, layers, dict.fromkeys(layers, options))
    cold = come_from_memory(sum(p.numel() * p.element_size() for p in model.parameters()))
    cost, threads = cost or store.load(), threads or torch.get_num_threads()
    subjects = []
    for first, group in selection.tied.items():
        parts = [layer_saliency(where, n, layers[n], importance) for n in group]
        layer = layers[first]
        saliency = oriented(layer, sum(parts[1:], start=parts[0]))
        own = [call for name in group for call in calls[name]]
        subjects.append(
            Subject(first, saliency, groups_of(layer), own, cold, layer, tuple(group[1:]))
        )
    how = search_of(options)
    found = []
    with steps(progress, "analyzing", len(subjects) * len(shapes) * len(shares)) as advance:
        for subject in subjects:
            layer = layers[subject.name]
            fitting = list(dict.fromkeys(fitting_block(layer, block) for block in shapes))
            found.append(
                analyze_layer(where, subject, fitting, shares, cost, threads, measure, how, advance)
            )
    return AnalysisReport(tuple(found), selection.skipped, threads, cost.source_for(threads))


def checked_grid(
    where: str, blocks: Iterable[tuple[int, int]], sparsities: Iterable[float]
) -> tuple[Sequence[tuple[int, int]], Sequence[float]]:
    """Blocks and sparsities, each at least one."""
    for name, value in (("blocks", blocks), ("sparsities", sparsities)):
        if not isinstance(value, Iterable) or isinstance(value, str):
            raise TypeError(
                f"{where}: {name} must be several, such as "
                f"{'[(4, 1), (16, 16)]' if name == 'blocks' else '[0.75, 0.9]'} "
                f"(got {describe(value)})"
            )
    shapes = list(dict.fromkeys(check_block(f"{where}: blocks", block) for block in blocks))
    shares = list(dict.fromkeys(check_sparsity(f"{where}: sparsities", s) for s in sparsities))
    if not shapes or not shares:
        raise ValueError(
            f"{where}: blocks and sparsities must each name one at least "
            f"(got {len(shapes)} and {len(shares)})"
        )
    return shapes, shares


def search_of(options: LayerOptions) -> SearchOptions:
    """What searches are told: half a second each, unless the options say otherwise."""
    search = options.search
    if search.get("budget") is None and search.get("sweeps") is None:
        search["budget"] = SEARCH_S
    return search
