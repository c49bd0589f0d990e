"""Probes: what a client's data looks like to a small frozen model, as a short vector. Start at `relevance/base.py`."""

from lightning_pfl.relevance.base import ExampleProbe, Probe, Reader
from lightning_pfl.relevance.causal_lm import CausalLMProbe
from lightning_pfl.relevance.gradient import GradientProbe
from lightning_pfl.relevance.sketches import ColumnSketch, CountSketch, Projection

__all__ = [
    "CausalLMProbe",
    "ColumnSketch",
    "CountSketch",
    "ExampleProbe",
    "GradientProbe",
    "Probe",
    "Projection",
    "Reader",
]
