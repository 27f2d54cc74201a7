"""Discrimination-aware channel pruning, and networks that physically shrink."""

from .channels import ChannelReport as ChannelReport
from .channels import SelectChannels as SelectChannels
from .channels import shrink_channels as shrink_channels
from .pruner import DCPPruner as DCPPruner
