"""Server rules: clients' updates in, what every client receives next out. Start at `aggregation/base.py`."""

from lightning_pfl.aggregation.base import Aggregator, Welcome, WelcomingAggregator
from lightning_pfl.aggregation.conventional import ConventionalMean, FactorMean, ProductMean
from lightning_pfl.aggregation.distilled import Distilled
from lightning_pfl.aggregation.ensembles import Ensemble, LowestLoss, MeanPredictions, Predictions, PrototypeMeans
from lightning_pfl.aggregation.fedavg import FedAvg
from lightning_pfl.aggregation.guard import UpdateGuard, check_mixable
from lightning_pfl.aggregation.local_only import LocalOnly
from lightning_pfl.aggregation.mixture import MixtureAggregator
from lightning_pfl.aggregation.relevance import RelevanceAggregator
from lightning_pfl.aggregation.robust import RobustAggregator
from lightning_pfl.aggregation.robust_rules import ClippedRelevance, CoordinateMedian, Krum, RobustRule, TrimmedMean
from lightning_pfl.aggregation.stacking import Stacking
from lightning_pfl.aggregation.uniform import UniformAggregator

__all__ = [
    "Aggregator",
    "ClippedRelevance",
    "ConventionalMean",
    "CoordinateMedian",
    "Distilled",
    "Ensemble",
    "FactorMean",
    "FedAvg",
    "Krum",
    "LocalOnly",
    "LowestLoss",
    "MeanPredictions",
    "MixtureAggregator",
    "Predictions",
    "ProductMean",
    "PrototypeMeans",
    "RelevanceAggregator",
    "RobustAggregator",
    "RobustRule",
    "Stacking",
    "TrimmedMean",
    "UniformAggregator",
    "UpdateGuard",
    "Welcome",
    "WelcomingAggregator",
    "check_mixable",
]
