"""What operations do to channels: a rule for each, by name."""

from . import layers as layers
from . import pointwise as pointwise
from . import shapes as shapes
