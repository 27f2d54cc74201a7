"""What a model would gain by becoming sparse, layer by layer, before anything is changed."""

from .model import analyze as analyze
from .report import AnalysisReport as AnalysisReport
from .report import Choice as Choice
from .report import LayerAnalysis as LayerAnalysis

__all__ = ["AnalysisReport", "Choice", "LayerAnalysis", "analyze"]
