"""What came of it: scores of answers and of personalised models, tidy tables, and a picture of the relevance matrix."""

from lightning_pfl.metrics.answers import named_choice, token_f1
from lightning_pfl.metrics.drawing import draw_relevance
from lightning_pfl.metrics.questions import ChoiceScores, GeneratedChoices, OpenAnswers
from lightning_pfl.metrics.scores import PersonalizationScores
from lightning_pfl.metrics.table import ScoreRow, SummaryRow, idle_rows, summary_rows, tidy_rows, to_csv, to_frame

__all__ = [
    "ChoiceScores",
    "GeneratedChoices",
    "OpenAnswers",
    "PersonalizationScores",
    "ScoreRow",
    "SummaryRow",
    "draw_relevance",
    "idle_rows",
    "named_choice",
    "summary_rows",
    "tidy_rows",
    "to_csv",
    "to_frame",
    "token_f1",
]
