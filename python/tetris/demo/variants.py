"""From a trained dense network to a smaller one, per method."""

import torch
from torch import nn

from ..layout import Reorder
from ..model import sparsify
from .config import DemoConfig, Method, Variant
from .networks import Network

_REORDER: dict[Method, Reorder] = {
    "element-wise": "identity",
    "unordered": "identity",
    "L1-sorted": "l1_sort",
    "TETRIS": "threshold",
}


def build(
    dense: nn.Module,
    network: Network,
    variant: Variant,
    config: DemoConfig,
    features: int,
    seed: int,
) -> nn.Module:
    """The variant of a dense network, not yet fine-tuned.

    ``narrow`` is a fresh dense network with as many hidden weights as the pruned one stores, the
    plainest rival of pruning: no sparsity, no kernels. It trains for as many steps as the dense
    network and the fine-tuning together.
    """
    if variant.method == "narrow":
        classifier = dense.get_submodule(network.classifier)
        assert isinstance(classifier, nn.Linear)
        torch.manual_seed(seed)
        width = network.narrow_width(features, config.width, variant.sparsity)
        return network.build(features, width, classifier.out_features)
    return sparsify(
        dense,
        sparsity=variant.sparsity,
        block=variant.block,
        exclude=network.classifier,
        reorder=_REORDER[variant.method],
        sweeps=config.search_sweeps if variant.method == "TETRIS" else None,
        seed=seed,
        allow_empty_rows=config.allow_empty_rows,
    )
