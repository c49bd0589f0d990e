"""Personalised federated learning inside PyTorch Lightning.

`CoLoRA` puts adapters into any LightningModule, `FederatedStrategy` turns epochs into federated rounds and lets clients
learn from each other. Importing this package registers the strategy ``"federated"`` with Lightning and the method
``"COLORA"`` with PEFT; nothing else happens.
"""

from lightning_pfl.__about__ import __version__
from lightning_pfl.adapters import Additive, CoLoraConfig, Convex, GatePolicy, InputGate, StaticGate, inject
from lightning_pfl.adapters.alignment import Alignment, Canonical, LeastSquares, align
from lightning_pfl.aggregation import (
    Aggregator,
    ClippedRelevance,
    CoordinateMedian,
    FedAvg,
    Krum,
    LocalOnly,
    MixtureAggregator,
    RelevanceAggregator,
    RobustAggregator,
    RobustRule,
    TrimmedMean,
    UniformAggregator,
    UpdateGuard,
    Welcome,
    WelcomingAggregator,
)
from lightning_pfl.callbacks.checkpoints import load_from_checkpoint
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.callbacks.relevance_probe import RelevanceProbe
from lightning_pfl.data import ClientDataModule, dirichlet_partition, even_partition, partition_by_key
from lightning_pfl.errors import (
    CheckpointMismatchError,
    ClientFailedError,
    FederationError,
    PrivacyBudgetError,
    RejectedUpdateError,
)
from lightning_pfl.federation import (
    BelowQuorum,
    Client,
    ClientPool,
    ClientStore,
    Decision,
    DropLate,
    FederatedStrategy,
    LateResults,
    LocalPool,
    Pace,
    Privacy,
    RayPool,
    RetryRound,
    RoundRules,
    Shortfall,
    SimulatedPool,
    SkipRound,
    StopRun,
    UseLate,
)
from lightning_pfl.functional.accounting import PrivacyBudget
from lightning_pfl.functional.mechanisms import ClientNoise, ExampleNoise, SketchNoise, UpdateNoise
from lightning_pfl.functional.relevance import FixedMatrix, SampleCount, Softmax, TaskGraph, TopK, Uniform, WeightPolicy
from lightning_pfl.functional.similarity import ColumnCosine, Cosine, Similarity
from lightning_pfl.functional.staleness import Fading
from lightning_pfl.metrics import PersonalizationScores, draw_relevance
from lightning_pfl.relevance import (
    CausalLMProbe,
    ColumnSketch,
    CountSketch,
    ExampleProbe,
    GradientProbe,
    Probe,
    Projection,
)
from lightning_pfl.types import Aggregation, ClientUpdate

__all__ = [
    "Additive",
    "Aggregation",
    "Aggregator",
    "Alignment",
    "BelowQuorum",
    "Canonical",
    "CausalLMProbe",
    "CheckpointMismatchError",
    "Client",
    "ClientDataModule",
    "ClientFailedError",
    "ClientNoise",
    "ClientPool",
    "ClientStore",
    "ClientUpdate",
    "ClippedRelevance",
    "CoLoRA",
    "CoLoraConfig",
    "ColumnCosine",
    "ColumnSketch",
    "Convex",
    "CoordinateMedian",
    "Cosine",
    "CountSketch",
    "Decision",
    "DropLate",
    "ExampleNoise",
    "ExampleProbe",
    "Fading",
    "FedAvg",
    "FederatedStrategy",
    "FederationError",
    "FixedMatrix",
    "GatePolicy",
    "GradientProbe",
    "InputGate",
    "Krum",
    "LateResults",
    "LeastSquares",
    "LocalOnly",
    "LocalPool",
    "MixtureAggregator",
    "Pace",
    "PersonalizationScores",
    "Privacy",
    "PrivacyBudget",
    "PrivacyBudgetError",
    "Probe",
    "Projection",
    "RayPool",
    "RejectedUpdateError",
    "RelevanceAggregator",
    "RelevanceProbe",
    "RetryRound",
    "RobustAggregator",
    "RobustRule",
    "RoundRules",
    "SampleCount",
    "Shortfall",
    "Similarity",
    "SimulatedPool",
    "SketchNoise",
    "SkipRound",
    "Softmax",
    "StaticGate",
    "StopRun",
    "TaskGraph",
    "TopK",
    "TrimmedMean",
    "Uniform",
    "UniformAggregator",
    "UpdateGuard",
    "UpdateNoise",
    "UseLate",
    "WeightPolicy",
    "Welcome",
    "WelcomingAggregator",
    "__version__",
    "align",
    "dirichlet_partition",
    "draw_relevance",
    "even_partition",
    "inject",
    "load_from_checkpoint",
    "partition_by_key",
]
