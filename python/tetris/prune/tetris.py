"""TETRIS: reorder so that light weights share blocks, then remove the lightest blocks."""

from __future__ import annotations

from torch import Tensor

from ..nn.base import SparseLayer
from ..nn.kinds import DenseLayer
from .block_pruner import BlockPruner
from .saliency import layer_saliency


class TetrisPruner(BlockPruner):
    """Prunes to blocks by the magnitude of reordered weights, around an ordinary training loop.

    A block is worth the sum of the importance of its weights, ``c_B = sum_B |W[row_perm][:,
    col_perm]|``; the ``floor(sparsity * blocks)`` lightest go (Ji et al., "TETRIS: TilE-matching
    the TRemendous Irregular Sparsity", NeurIPS 2018; the search for the permutations is that of
    :mod:`tetris.reorder`). Rows are outputs: a block is bo outputs by bi inputs, of a
    convolution at one kernel position, or with ``tie_kernel``, as in the paper, at all of them.

    Args:
        model: The model to prune; changed in place until :meth:`remove` or :meth:`finalize`.
        options: Settings of the layers as one object, in place of the keywords below.
        schedule: ``"one_shot"``; ``Cubic(begin, end, every)``; or ``f(step, final) -> sparsity``.
        include: Layers to prune; this and the rest as for :func:`tetris.sparsify`.
        exclude: Layers to leave alone: the first and the last as a rule.
        types: Exact types to prune.
        overrides: Settings for some layers.
        scope: ``"layer"`` or ``"global"``.
        share: Channels that several layers keep in one order, see :class:`SharedOrder`.
        target: What is to be left in place of ``sparsity``: :class:`Parameters` or :class:`Flops`.
        search_every_update: Search anew whenever the schedule removes more; off, the permutations
            of the dense model stay.
        search_at: Steps after which to search anew, such as ``range(100, 1001, 100)``.
        execution: ``"masked"``: a dense step with masked weights; ``"sparse"``: on stored blocks,
            see :class:`BlockPruner`.
        optimizers: Whose states follow the blocks, with ``"sparse"`` or ``regrow``.
        regrow: A :class:`Regrow`, to exchange blocks while training.
        progress: Show progress bars during searches.
        sparsity: Share of blocks to remove in the end; this and the rest as for
            :func:`tetris.sparsify`, with its defaults.
        block: (bo, bi).
        importance: What a weight is worth; a function, :class:`Taylor`, :class:`Fisher` or
            :class:`ActivationNorm` is asked here and at every change of masks.
        reorder: Search to use.
        balanced: Store equally many blocks in every block row.
        allow_empty_rows: Let block rows lose all their blocks.
        tie_kernel: Keep or remove all kernel positions of a block of channels together.
        seed: Seed of the search.
        budget: Seconds per layer for the search.
        sweeps: Sweeps instead of seconds.
        min_sparsity: With scope ``"global"``: share of its blocks that a layer loses at least.
        max_sparsity: With scope ``"global"``: share that it loses at most.

    Raises:
        ValueError: as :func:`tetris.sparsify`; also layers that share a weight.

    Example:
        >>> pruner = tetris.prune.TetrisPruner(
        ...     model, sparsity=0.9, block=(4, 1), exclude="classifier",
        ...     schedule=tetris.prune.Cubic(begin=0, end=1000, every=50),
        ... )
        >>> for x, target in batches:
        ...     loss = criterion(model(x), target)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     pruner.step()
        >>> sparse = pruner.finalize()

        Steps that cost what is stored, and blocks that move to where gradients are large:

        >>> model = tetris.densify(sparse)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        >>> pruner = tetris.prune.TetrisPruner(
        ...     model, sparsity=0.9, block=(8, 8), exclude="classifier",
        ...     execution="sparse", optimizers=optimizer,
        ...     regrow=tetris.prune.Regrow(share=0.3, every=100, end=7500),
        ... )

    BatchNorm statistics of the unpruned model do not fit the pruned one: after one-shot pruning
    without training, pass training data through ``torch.optim.swa_utils.update_bn``.
    """

    def saliency(self, name: str, layer: DenseLayer | SparseLayer) -> Tensor:
        """Importance of each weight, in the shape of ``layer.weight`` or ``layer.values``."""
        return layer_saliency(self.name, name, layer, self.layer_options[name].importance)
