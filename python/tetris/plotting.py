"""Pictures of layouts. Needs matplotlib: ``pip install 'tetris[plot]'``."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .analysis.report import AnalysisReport
    from .layout import BlockLayout

_MAX_PIXELS = 1024  # larger matrices are averaged down: a screen shows no more
_KEPT, _FAINT = "#1f5fa8", "#f3f1ec"


def plot_layout(
    layout: BlockLayout, path: str | PathLike[str], weight: Tensor | None = None
) -> None:
    """Save the two views of a layout side by side; see :meth:`tetris.BlockLayout.plot`.

    Left, the weights that are kept, where the model has them; right, the same weights after the
    permutations, where they fill blocks that a dense kernel can read.

    Args:
        layout: The layout.
        path: File to write; the ending chooses the format.
        weight: The dense weight; kept weights are then coloured by magnitude.
    """
    figure_class = matplotlib_figure("BlockLayout.plot")
    bo, bi = layout.block
    kept = layout.mask().float()
    shade = kept
    if weight is not None:
        if weight.shape != kept.shape:
            raise ValueError(
                f"BlockLayout.plot: weight must be {list(kept.shape)} (got {list(weight.shape)})"
            )
        magnitude = weight.detach().float().abs().to(kept.device)
        top = _high(magnitude, kept)
        shade = kept * (0.35 + 0.65 * (magnitude / top).clamp(max=1.0))
    # A matrix of outputs by inputs; of a convolution by inputs of a group, position by position.
    before, after = (
        layout.blocking.ordered(shade, *perms).reshape(layout.out_features, -1)
        for perms in ((None, None), (layout.row_perm, layout.col_perm))
    )
    axis = "input" if layout.kernel_size is None else "kernel position, input"

    panel = 4.1 * before.shape[0] / before.shape[1]  # inches, if pixels are square
    figure = figure_class(figsize=(9.2, min(max(panel, 1.6), 9.0) + 1.1), dpi=150)
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2)
    same = layout.reordered == "none"
    _draw(left, before, "Kept weights, original order", axis, "output")
    title = f"The same weights as {bo}x{bi} blocks, " + ("order unchanged" if same else "reordered")
    _draw(right, after, title, f"{axis}, packed order", "output, packed order")
    rows, columns = layout.block_grid
    what = (
        "darker: larger magnitude, pale: removed"
        if weight is not None
        else "blue: kept, pale: removed"
    )
    figure.suptitle(
        f"{layout.blocking} weight, {layout.nnz_blocks} of "
        f"{rows * columns} blocks stored ({layout.sparsity:.0%} removed)    {what}",
        fontsize=9,
    )
    figure.savefig(path)


def _high(magnitude: Tensor, kept: Tensor) -> float:
    """A magnitude that few kept weights exceed, so that outliers do not wash out the picture."""
    values = magnitude[kept.bool()]
    if values.numel() == 0:
        return 1.0
    return max(float(values.kthvalue(max(1, int(0.98 * values.numel()))).values), 1e-30)


def _draw(axes: Any, image: Tensor, title: str, x_label: str, y_label: str) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    rows, cols = image.shape
    if max(rows, cols) > _MAX_PIXELS:
        size = (min(rows, _MAX_PIXELS), min(cols, _MAX_PIXELS))
        image = F.adaptive_avg_pool2d(image[None, None], size)[0, 0]
    axes.imshow(
        image.cpu().numpy(),
        cmap=LinearSegmentedColormap.from_list("kept", [_FAINT, _KEPT]),
        vmin=0.0,
        vmax=max(float(image.max()), 1e-6),
        extent=(0, cols, rows, 0),
        aspect="auto" if max(rows, cols) > 4 * min(rows, cols) else "equal",
        interpolation="nearest",
    )
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.tick_params(labelsize=7)


def plot_images(rows: Mapping[str, Tensor], path: str | PathLike[str]) -> None:
    """Save gray images as a grid, one labelled row for each entry.

    Args:
        rows: Label -> images [n, height, width], equally many in each row; black is the
            lowest value of all, white the highest.
        path: File to write; the ending chooses the format.

    Example:
        >>> plot_images({"dense": generator(z)[:, 0], "pruned": sparse(z)[:, 0]}, "samples.png")
    """
    shapes = {tuple(images.shape) for images in rows.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise ValueError(
            "plot_images: all rows need images [n, height, width] of one shape "
            f"(got {', '.join(str(list(shape)) for shape in sorted(shapes)) or 'no rows'})"
        )
    count = next(iter(shapes))[0]
    figure_class = matplotlib_figure("plot_images")
    figure = figure_class(figsize=(0.6 * count + 2.0, 0.6 * len(rows)), dpi=100)
    grid = figure.subplots(
        len(rows),
        count,
        squeeze=False,
        gridspec_kw={
            "wspace": 0.05,
            "hspace": 0.05,
            "left": 2.0 / (0.6 * count + 2.0),
            "right": 1.0,
            "top": 1.0,
            "bottom": 0.0,
        },
    )
    low = min(float(images.min()) for images in rows.values())
    high = max(float(images.max()) for images in rows.values())
    for line, (label, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images.detach().float().cpu(), strict=True):
            axes.imshow(image.numpy(), cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
            axes.set_axis_off()
        line[0].text(
            -0.1, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=8
        )
    figure.savefig(path)


def plot_analysis(report: AnalysisReport, path: str | PathLike[str]) -> None:
    """Save predicted speed-up and retained saliency of each layer's choices.

    Args:
        report: What :func:`tetris.analyze` returned.
        path: File to write; the ending chooses the format.
    """
    figure_class = matplotlib_figure("AnalysisReport.plot")
    names = [layer.name or "(root)" for layer in report.layers]
    figure = figure_class(figsize=(10.0, 1.6 + 0.32 * len(names)), dpi=150)
    figure.set_layout_engine("constrained")
    speed, kept = figure.subplots(1, 2, sharey=True)
    kinds = sorted({(c.block, round(c.sparsity, 2)) for r in report.layers for c in r.choices})
    blocks = sorted({block for block, _ in kinds})
    for row, layer in enumerate(report.layers):
        for choice in layer.choices:
            colour = f"C{blocks.index(choice.block) % 10}"
            marker = dict(color=colour, alpha=0.35 + 0.65 * choice.sparsity**4, s=26)
            best = choice is layer.best
            marker |= dict(marker="*" if best else "o", zorder=3 if best else 2)
            if choice.speedup == choice.speedup:  # not NaN
                speed.scatter(choice.speedup, row, **marker)
            kept.scatter(100 * choice.retained, row, **marker)
    for block in blocks:
        kept.scatter([], [], color=f"C{blocks.index(block) % 10}", label=f"{block[0]}x{block[1]}")
    speed.axvline(1.0, color="black", linewidth=0.8)
    speed.set_xlabel("predicted speed-up (left of the line sparse loses)", fontsize=8)
    kept.set_xlabel("retained saliency, %", fontsize=8)
    speed.set_yticks(range(len(names)), names)
    speed.invert_yaxis()
    figure.legend(
        title="block; paler: less sparse; star: recommended",
        loc="outside upper center",
        ncols=max(1, len(blocks)),
        fontsize=7,
        title_fontsize=7,
    )
    for axes in (speed, kept):
        axes.tick_params(labelsize=7)
        axes.grid(axis="x", linewidth=0.3)
    figure.savefig(path)


def matplotlib_figure(where: str) -> Any:
    """The ``Figure`` of matplotlib, which needs no display; ``where`` is named where it lacks."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"{where} needs matplotlib, which is an extra: pip install 'tetris[plot]'"
        ) from error
    return Figure
