"""What came of it: scores of personalised models, and a picture of the relevance matrix."""

from lightning_pfl.metrics.drawing import draw_relevance
from lightning_pfl.metrics.scores import PersonalizationScores

__all__ = ["PersonalizationScores", "draw_relevance"]
