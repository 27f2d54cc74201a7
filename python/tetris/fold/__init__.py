"""Folding channel orders into a network's parameters, so that none is left to apply.

::

    capture    graphs of the model, or of the modules that can be traced
    flow       reads them, an operation at a time (rules/): which channels meet
    channels   what follows: orders, and the axes that are in them
    shared     orders as a joint search takes them          -> tetris.shared_orders
    apply      parameters, norms and layouts in an order; verify: the same results
    fold       all of it                                    -> tetris.fold
"""

from .fold import fold as fold
from .report import FoldedOrder as FoldedOrder
from .report import FoldReport as FoldReport
from .shared import shared_orders as shared_orders
