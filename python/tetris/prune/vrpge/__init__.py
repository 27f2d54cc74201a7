"""VR-PGE: sparse training on sampled blocks."""

from .pruner import VRPGEPruner as VRPGEPruner
