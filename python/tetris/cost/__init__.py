"""How long a layer takes on this machine, dense and sparse: a model with few coefficients.

:mod:`tetris.cost.features` explains the model, :func:`tetris.calibrate` fits it to this machine.
"""

from .calibration import calibrate as calibrate
from .features import Point as Point
from .model import CostModel as CostModel
from .problem import Problem as Problem
from .problem import Stored as Stored
from .store import default as default
from .store import load as load

__all__ = ["CostModel", "Point", "Problem", "Stored", "calibrate", "default", "load"]
