"""From a trained dense network to a smaller one, per method."""

import torch
from torch import nn

from ..layout import Reorder
from ..model import sparsify
from .config import DemoConfig, Method, Variant
from .train import mlp

CLASSIFIER = "4"  # the last layer's name in the network of train.mlp

_REORDER: dict[Method, Reorder] = {
    "element-wise": "identity",
    "unordered": "identity",
    "L1-sorted": "l1_sort",
    "TETRIS": "threshold",
}


def build(dense: nn.Sequential, variant: Variant, config: DemoConfig, seed: int) -> nn.Sequential:
    """The variant of a dense network, not yet fine-tuned."""
    if variant.method == "narrow":
        return narrow(dense, variant.sparsity, seed)
    model = sparsify(
        dense,
        sparsity=variant.sparsity,
        block=variant.block,
        exclude=CLASSIFIER,
        reorder=_REORDER[variant.method],
        sweeps=config.search_sweeps if variant.method == "TETRIS" else None,
        seed=seed,
        allow_empty_rows=config.allow_empty_rows,
    )
    assert isinstance(model, nn.Sequential)
    return model


def narrow(dense: nn.Sequential, sparsity: float, seed: int) -> nn.Sequential:
    """A fresh dense network with as many hidden weights as the pruned one stores.

    It is the plainest rival of pruning: no sparsity, no kernels. It trains for as many steps as
    the dense network and the fine-tuning together.
    """
    first, classifier = dense[0], dense[4]
    assert isinstance(first, nn.Linear)
    assert isinstance(classifier, nn.Linear)
    features, hidden = first.in_features, first.out_features
    weights = (1 - sparsity) * (features * hidden + hidden * hidden)
    width = max(1, round((-features + (features**2 + 4 * weights) ** 0.5) / 2))
    torch.manual_seed(seed)
    return mlp(features, width, classifier.out_features)
