"""Two models that share planted coordinates: they are found, told apart from what is not shared, and honest."""

import pytest
import torch

from lightning_pfl.functional.alignment import PairedSums
from lightning_pfl.functional.canonical import agreement, common_directions


def planted(num_tokens, seed, *, shared=3, widths=(12, 9), noise=0.3):
    """Vectors of a student and of an anchor that mix the same `shared` latent variables into noise of their own."""
    world = torch.Generator().manual_seed(7)
    mixers = [torch.randn(shared, width, generator=world) for width in widths]
    offsets = [3 * torch.randn(width, generator=world) for width in widths]
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(num_tokens, shared, generator=generator)
    return [
        latent @ mixer + noise * torch.randn(num_tokens, mixer.shape[1], generator=generator) + offset
        for mixer, offset in zip(mixers, offsets, strict=True)
    ]


def sums_of(student, anchor):
    sums = PairedSums(student.shape[1], anchor.shape[1])
    sums.add(student, anchor)
    return sums


def test_shared_coordinates_are_found_and_agree_on_unseen_tokens():
    found = common_directions([sums_of(*planted(2000, 1))], rank=5, ridge=1e-3)
    seen = agreement(found.students[0], found.anchor, sums_of(*planted(2000, 2)))
    assert (seen[:3] > 0.9).all()
    assert (seen[3:].abs() < 0.15).all(), "only three coordinates are shared"


def test_one_student_gives_the_canonical_directions():
    """By hand: correlations of canonical directions are the singular values of the whitened cross-covariance."""
    sums = sums_of(*planted(500, 3))
    xx, xz, zz = (product / sums.count for product in sums.products(centred=True))

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return (vectors * values.rsqrt()) @ vectors.T

    expected = torch.linalg.svdvals(root(xx) @ xz @ root(zz))[:4]
    found = common_directions([sums], rank=4, ridge=0.0)
    torch.testing.assert_close(agreement(found.students[0], found.anchor, sums), expected)


def test_two_students_share_the_anchors_coordinates():
    student, anchor = planted(1500, 4)
    other = student.flip(1) * 2 + 1
    found = common_directions([sums_of(student, anchor), sums_of(other, anchor)], rank=3, ridge=1e-6)
    z = [(x - x.mean(0)).double() @ w.T for x, w in ((student, found.students[0]), (other, found.students[1]))]
    torch.testing.assert_close(z[0], z[1], atol=1e-2, rtol=1e-2)


def test_unrelated_models_look_alike_only_on_what_was_fitted():
    generator = torch.Generator().manual_seed(5)
    fit, unseen = (sums_of(*(torch.randn(60, 20, generator=generator) for _ in range(2))) for _ in range(2))
    found = common_directions([fit], rank=2, ridge=1e-3)
    assert agreement(found.students[0], found.anchor, fit).min() > 0.7
    assert agreement(found.students[0], found.anchor, unseen).abs().max() < 0.4


def test_equal_sums_give_equal_bytes():
    first, second = (common_directions([sums_of(*planted(300, 6))], rank=3) for _ in range(2))
    assert torch.equal(first.anchor, second.anchor)
    assert torch.equal(first.students[0], second.students[0])


def test_too_little_data_is_refused():
    with pytest.raises(ValueError, match="needs at least 5 tokens"):
        common_directions([sums_of(*planted(4, 1))], rank=5)
    with pytest.raises(ValueError, match="more than a width"):
        common_directions([sums_of(*planted(400, 1))], rank=10)
    constant = sums_of(torch.ones(50, 12), torch.ones(50, 9))
    with pytest.raises(ValueError, match="all the same"):
        common_directions([constant], rank=2)
    with pytest.raises(ValueError, match="at least one student"):
        common_directions([], rank=2)
