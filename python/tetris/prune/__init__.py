"""Pruning methods. Each ends in one :class:`tetris.BlockLayout` per layer.

A method is one class, in a file (:mod:`tetris.prune.tetris`) or a folder of its own. It derives
from :class:`Pruner`, which selects layers, searches layouts, masks and finalizes, or from
:class:`BlockPruner` if it is a saliency and a schedule::

    saliency -> layout search -> block masks -> schedule -> finalize() -> model with sparse layers
"""

from .block_pruner import BlockPruner as BlockPruner
from .dcp import ChannelReport as ChannelReport
from .dcp import DCPPruner as DCPPruner
from .dcp import shrink_channels as shrink_channels
from .distillation import Distillation as Distillation
from .dsm import DSMPruner as DSMPruner
from .gan import ConditionalGAN as ConditionalGAN
from .gan import DivergenceError as DivergenceError
from .gan import GANPruner as GANPruner
from .gan import GANTask as GANTask
from .gan import ImageToImageGAN as ImageToImageGAN
from .gan import UnconditionalGAN as UnconditionalGAN
from .latency import BLOCKS as BLOCKS
from .latency import Latency as Latency
from .latency import LatencyPlan as LatencyPlan
from .masks import BlockMask as BlockMask
from .options import LayerOptions as LayerOptions
from .options import LayerOverride as LayerOverride
from .orders import Part as Part
from .orders import SharedOrder as SharedOrder
from .orders import SharedOrders as SharedOrders
from .providers import ActivationNorm as ActivationNorm
from .providers import Fisher as Fisher
from .providers import Taylor as Taylor
from .pruner import Pruner as Pruner
from .regrow import Regrow as Regrow
from .report import LayerReport as LayerReport
from .report import SparsifyReport as SparsifyReport
from .schedule import Cubic as Cubic
from .schedule import OneShot as OneShot
from .schedule import Schedule as Schedule
from .synaptic import SynapticPruner as SynapticPruner
from .target import Flops as Flops
from .target import Parameters as Parameters
from .target import Target as Target
from .tetris import TetrisPruner as TetrisPruner
from .vrpge import VRPGEPruner as VRPGEPruner

# The modules of this package are not for ``import *``: one is called tetris.
__all__ = [
    "BLOCKS",
    "ActivationNorm",
    "BlockMask",
    "BlockPruner",
    "ChannelReport",
    "ConditionalGAN",
    "Cubic",
    "DCPPruner",
    "DSMPruner",
    "Distillation",
    "DivergenceError",
    "Fisher",
    "Flops",
    "GANPruner",
    "GANTask",
    "ImageToImageGAN",
    "Latency",
    "LatencyPlan",
    "LayerOptions",
    "LayerOverride",
    "LayerReport",
    "OneShot",
    "Parameters",
    "Part",
    "Pruner",
    "Regrow",
    "Schedule",
    "SharedOrder",
    "SharedOrders",
    "SparsifyReport",
    "SynapticPruner",
    "Target",
    "Taylor",
    "TetrisPruner",
    "UnconditionalGAN",
    "VRPGEPruner",
    "shrink_channels",
]
