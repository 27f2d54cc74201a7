"""Curves of the Bayesian experiment: pruning, attacks, calibration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tetris import bayes
from tetris.bayes import Posterior, Predictive
from tetris.plotting import matplotlib_figure

from . import dsm_small as small

SHARES = (0.0, 0.25, 0.5, 0.75, 0.85, 0.9, 0.95)
EPSILONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
BINS = 10
AXES = {
    "pruning": ("share removed", "test error"),
    "fgsm": ("epsilon of FGSM, in deviations of inputs", "test error"),
    "calibration": ("promised", "came true"),
}


class Curves:
    """Collects curves, one per seed; draws their means, a picture per kind, a panel per data."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, dict[str, list[np.ndarray]]]] = {}

    def add(self, name: str, prior: str, posterior: Posterior, x: Tensor, y: Tensor) -> None:
        """All curves of one posterior.

        Args:
            name: Of the data.
            prior: Of the posterior.
            posterior: Its draws.
            x: [M, in], test points.
            y: [M].
        """
        weights = posterior.thin(small.SHOWN // 2).weights()
        first = weights.layers[0][0]
        regression = weights.task == "regression"
        field = "RMSE" if regression else "NLL"

        def error(found: Predictive) -> float:
            return found.rmse(y) if regression else found.nll(y)

        per_draw = [
            error(Predictive.of(weights.with_weight(0, bayes.prune_draws(first, share)), x))
            for share in SHARES
        ]
        self._put("pruning", f"{name}, {field}: weights, per draw", prior, SHARES, per_draw)
        blocks = []
        for share in SHARES:
            kept = small.masks(posterior, share) if share else torch.ones(())
            blocks.append(error(Predictive.of(weights.with_weight(0, first * kept), x)))
        self._put("pruning", f"{name}, {field}: 4x2 blocks, one mask", prior, SHARES, blocks)
        attacked = [error(small.attack(weights, x, y, eps)) for eps in EPSILONS]
        self._put("fgsm", f"{name}, {field}", prior, EPSILONS, attacked)
        promised, observed, _ = Predictive.of(weights, x).calibration(y, BINS)
        self._put("calibration", name, prior, promised.tolist(), observed.tolist())

    def _put(
        self, kind: str, panel: str, line: str, x: Sequence[float], y: Sequence[float]
    ) -> None:
        panels = self._found.setdefault(kind, {})
        panels.setdefault(panel, {}).setdefault(line, []).append(np.array([x, y]))

    def draw(self, stem: Path) -> list[Path]:
        """Write ``<stem>-pruning.png``, ``-fgsm.png`` and ``-calibration.png``; means as JSON."""
        means = {
            kind: {
                panel: {line: _mean(seeds).tolist() for line, seeds in curves.items()}
                for panel, curves in panels.items()
            }
            for kind, panels in self._found.items()
        }
        numbers = stem.with_name(f"{stem.name}-curves.json")
        numbers.write_text(json.dumps(means, indent=1) + "\n")
        return [
            _draw(
                panels, AXES[kind], kind == "calibration", stem.with_name(f"{stem.name}-{kind}.png")
            )
            for kind, panels in self._found.items()
        ]


def _mean(seeds: Sequence[np.ndarray]) -> np.ndarray:
    """[2, points] of [2, points] each; empty bins of calibration left out."""
    every = np.stack(seeds)
    return np.nanmean(every[..., ~np.isnan(every).all((0, 1))], axis=0)


def _draw(
    panels: Mapping[str, Mapping[str, Sequence[np.ndarray]]],
    labels: tuple[str, str],
    diagonal: bool,
    path: Path,
) -> Path:
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = matplotlib_figure("benchmarks.methods")(
        figsize=(4.4 * columns, 3.8 * rows + 0.6), dpi=130
    )
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, columns, squeeze=False).T.flatten()
    for empty in axes[len(panels) :]:
        empty.set_axis_off()
    axes = axes[: len(panels)]
    names = list(dict.fromkeys(line for lines in panels.values() for line in lines))
    for panel, (title, curves) in zip(axes, panels.items(), strict=True):
        if diagonal:
            panel.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for line, seeds in curves.items():
            x, y = _mean(seeds)
            index = names.index(line)
            panel.plot(x, y, marker="osD^v<>"[index % 7], color=f"C{index}", label=line)
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel(labels[0])
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(labels[1])
    handles = {h.get_label(): h for p in axes for h in p.get_legend_handles_labels()[0]}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=6, frameon=False
    )
    figure.savefig(path)
    return path
