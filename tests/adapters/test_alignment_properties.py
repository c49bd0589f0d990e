"""Properties of an alignment, for any planted models."""

from __future__ import annotations

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_pfl.adapters import inject
from lightning_pfl.adapters.alignment import Canonical
from lightning_pfl.adapters.transfer import fit_pq, transfer
from lightning_pfl.functional.alignment import PairedSums, fit_A, fit_B_from_gradients
from lightning_pfl.functional.canonical import agreement, common_directions
from tests.adapters.test_alignment import VOCABULARY, TinyLM, align, config, disguised, readings

seeds = st.integers(0, 10_000)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated(d, extra, seed):
    """Vectors, and the same turned into a wider space."""
    x = randn(400, d, seed=seed) * torch.logspace(0, -1, d, dtype=torch.float64)
    turn = torch.linalg.qr(randn(d + extra, d, seed=seed + 1))[0]
    sums = PairedSums(d + extra, d)
    sums.add(x @ turn.T, x)
    return turn, sums


@settings(max_examples=25, deadline=None)
@given(d=st.integers(3, 12), extra=st.integers(0, 6), rank=st.integers(1, 3), seed=seeds)
def test_least_squares_recover_a_planted_rotation(d, extra, rank, seed):
    """A of the student is the anchor's A turned as the student's space is; B likewise."""
    turn, _ = rotated(d, extra, seed)
    A = torch.linalg.qr(randn(d, rank, seed=seed + 2))[0].T
    projected = PairedSums(d + extra, rank)
    x = randn(400, d, seed=seed + 3)
    projected.add(x @ turn.T, x @ A.T)
    torch.testing.assert_close(fit_A(projected, ridge=1e-8).A, A @ turn.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(fit_B_from_gradients(projected, ridge=1e-8), turn @ A.T, atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(d=st.integers(3, 12), extra=st.integers(0, 6), rank=st.integers(1, 3), seed=seeds)
def test_canonical_directions_recover_a_planted_rotation(d, extra, rank, seed):
    turn, sums = rotated(d, extra, seed)
    found = common_directions([sums], rank, ridge=1e-9)
    torch.testing.assert_close(found.students[0] @ turn, found.anchor, atol=1e-4, rtol=1e-4)
    assert agreement(found.students[0], found.anchor, sums).min() > 0.999


@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(width=st.integers(14, 22), hidden=st.integers(18, 28), seed=seeds)
def test_an_aligned_P_beats_no_adapter_in_a_planted_pair_of_models(width, hidden, seed):
    models = {"small": TinyLM(12, 16, seed=seed)}
    models["large"] = disguised(models["small"], width, hidden)
    for model in models.values():
        inject(model, config())
    alignment = align(models, readings(count=40), anchor="small", rule=Canonical(ridge=1e-4))
    for model in models.values():
        alignment.apply(model)
    answers = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))

    def batch(number):
        ids = torch.randint(VOCABULARY, (32, 5), generator=torch.Generator().manual_seed(number))
        return {"ids": ids, "answers": answers[ids[:, -1]]}

    def loss(model, given_batch):
        return nn.functional.cross_entropy(model(given_batch["ids"]).logits[:, -1], given_batch["answers"])

    found = transfer(
        models["small"],
        models["large"],
        fit=lambda model: fit_pq(model, map(batch, range(15)), loss=loss, lr=0.1),
        score=lambda model: float(loss(model, batch(999))),
    )
    assert found.own < found.zero
    assert found.transferred < found.zero
