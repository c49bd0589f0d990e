"""Gradient descent finds what least squares find, without their sums."""

from __future__ import annotations

import pytest
import torch

from lightning_pfl.adapters.alignment import GradientDescent, LeastSquares
from tests.adapters.test_alignment import align, pair, readings


def test_descent_finds_the_disguised_model_as_least_squares_do():
    found = {
        rule: align(pair(), readings(count=40), anchor="small", rule=rule)
        for rule in (
            LeastSquares(),
            GradientDescent(passes=20, lr=0.1),
        )
    }
    exact, descended = found.values()
    assert descended.anchor == exact.anchor
    for fit in descended.report:
        assert fit.before.missed_A > 1
        assert fit.after.missed_A < 0.05
        assert fit.after.missed_B < 0.05
        assert fit.after.missed_P < 0.1
    for base, layers in descended.bases.items():
        for layer, (A, B) in layers.items():
            if base == exact.anchor:  # stays
                assert torch.equal(A, exact.bases[base][layer][0])
                assert torch.equal(B, exact.bases[base][layer][1])


def test_a_record_that_is_held_out_teaches_nothing():
    """Only the fifth record differs, which is held out, so the bases are the same."""
    data = readings(count=10)
    other = [*data[:4], readings(count=11)[10], *data[5:]]
    one, two = (align(pair(), records, anchor="small", rule=GradientDescent(passes=1)) for records in (data, other))
    for base, layers in one.bases.items():
        for layer, tensors in layers.items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, two.bases[base][layer], strict=True))
    assert one.report != two.report


def test_descent_keeps_the_students_B_or_orthonormal_rows_if_asked():
    models = pair()
    rule = GradientDescent(passes=1, learn_B=False, orthonormal_only=True)
    alignment = align(models, readings(count=10), anchor="small", rule=rule)
    own = {
        str(layer.colora_address["default"]): layer
        for layer in models["large"].modules()
        if hasattr(layer, "is_colora")
    }
    for layer, (A, B) in alignment.bases[alignment.report[0].model].items():
        torch.testing.assert_close(A @ A.T, torch.eye(4), atol=1e-5, rtol=0)
        assert torch.equal(B, own[layer].colora_basis_B["default"])


def test_the_penalty_makes_rows_orthogonal():
    """Rows of the anchor's z that are nearly the same: without a penalty the student's A follows."""
    models = pair()
    for layer in models["small"].modules():
        if hasattr(layer, "is_colora"):
            layer.colora_basis_A["default"][1] = layer.colora_basis_A["default"][0] + 0.05

    def cosine(penalty):
        rule = GradientDescent(passes=4, lr=0.1, penalty=penalty)
        alignment = align(models, readings(count=20), anchor="small", rule=rule)
        A = alignment.bases[alignment.report[0].model]["main/0/fc1"][0]
        return float(torch.nn.functional.cosine_similarity(A[0], A[1], dim=0).abs())

    assert cosine(0.0) > 0.7
    assert cosine(10.0) < 0.3


def test_settings_and_data_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="`passes` must be at least 1"):
        GradientDescent(passes=0)
    with pytest.raises(ValueError, match=r"GradientDescent .* needs 4 passes"):
        align(pair(), iter(readings()), anchor="small", rule=GradientDescent())
