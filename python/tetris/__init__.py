"""Reordered block-sparse GEMM for torch: pruned networks that are actually faster.

>>> sparse = tetris.sparsify(model, sparsity=0.9, block=(4, 1), exclude="classifier")
"""

import torch  # noqa: F401  (its libraries must be loaded before _C)

from . import torch_version

try:
    from . import _C
except ImportError as error:
    torch_version.check(error)
    raise

from . import bayes as bayes
from . import cost as cost
from . import frechet as frechet
from . import ops as ops
from . import prune as prune
from . import reorder as reorder
from . import tuning as tuning
from .analysis import AnalysisReport as AnalysisReport
from .analysis import analyze as analyze
from .checkpoint import load as load
from .checkpoint import save as save
from .cost import calibrate as calibrate
from .fold import FoldReport as FoldReport
from .fold import fold as fold
from .fold import shared_orders as shared_orders
from .fuse import FuseReport as FuseReport
from .fuse import fuse as fuse
from .info import Info as Info
from .info import info as info
from .layout import BlockLayout as BlockLayout
from .model import densify as densify
from .model import sparsify as sparsify
from .nn import SparseConv1d as SparseConv1d
from .nn import SparseConv2d as SparseConv2d
from .nn import SparseConvTranspose2d as SparseConvTranspose2d
from .nn import SparseLinear as SparseLinear
from .nn import SparseTransposedLinear as SparseTransposedLinear
from .prune.report import SparsifyReport as SparsifyReport
from .relayout import relayout as relayout

if _C.cuda_built():
    tuning.load()

__version__: str = _C.version
