"""Pruning methods. Each ends in one :class:`tetris.BlockLayout` per layer.

A method is one file with one class: it says what a weight is worth (``saliency``) and, if it must,
when masks change. :class:`BlockPruner` does the rest, in this order::

    saliency -> layout search -> block masks -> schedule -> finalize() -> model with sparse layers
"""

from .block_pruner import BlockPruner as BlockPruner
from .channels import ChannelReport as ChannelReport
from .channels import shrink_channels as shrink_channels
from .dcp import DCPPruner as DCPPruner
from .masks import BlockMask as BlockMask
from .options import LayerOptions as LayerOptions
from .options import LayerOverride as LayerOverride
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
from .shared import SharedOrder as SharedOrder
from .synaptic import SynapticPruner as SynapticPruner
from .target import Flops as Flops
from .target import Parameters as Parameters
from .target import Target as Target
from .tetris import TetrisPruner as TetrisPruner
from .vrpge import VRPGEPruner as VRPGEPruner
