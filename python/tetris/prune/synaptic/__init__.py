"""Synaptic Strength: connections by learned strengths."""

from .pruner import SynapticPruner as SynapticPruner
