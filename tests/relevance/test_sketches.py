"""Promises of `lightning_pfl.relevance.sketches`."""

import pickle

import pytest
import torch

from lightning_pfl.functional.similarity import ColumnCosine
from lightning_pfl.relevance.sketches import ColumnSketch, CountSketch


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_inner_products_are_right_on_average_with_the_variance_that_is_promised():
    """400 seeds, k = 64, two vectors at cosine .6: mean .6 within 4 standard errors, variance up to 1.36 / 64."""
    x, y = randn(5000, seed=1).abs(), randn(5000, seed=2)  # one sign: without random signs the mean would be far off
    x = x / x.norm()
    y = y - (y @ x) * x
    y = 0.6 * x + 0.8 * y / y.norm()

    products = torch.stack([project(x) @ project(y) for project in (CountSketch(64, seed=seed) for seed in range(400))])

    bound = (1 + 0.6**2) / 64
    assert abs(products.mean() - 0.6) < 4 * (bound / 400) ** 0.5
    # the sample variance of 400 draws scatters by about 7 %
    assert bound / 2 < products.var() < 1.3 * bound


def test_cosines_of_many_vectors_survive_the_projection():
    """At k = 16,384 the bound's standard deviation is .011: four of them for the worst of 45 pairs."""
    common = randn(100_000, seed=3)
    vectors = [common * index / 10 + randn(100_000, seed=10 + index) for index in range(10)]
    project = CountSketch(16_384, seed=0)

    exact = torch.nn.functional.normalize(torch.stack(vectors), dim=1)
    sketched = torch.nn.functional.normalize(torch.stack([project(vector) for vector in vectors]), dim=1)

    assert (exact @ exact.T - sketched @ sketched.T).abs().max() < 0.044


def test_the_projection_is_linear():
    """The mean of sketches is the sketch of the mean, so averaging may come before or after."""
    project = CountSketch(128, seed=0)
    x, y = randn(1000, seed=1), randn(1000, seed=2)

    torch.testing.assert_close(project(2 * x - y), 2 * project(x) - project(y), rtol=1e-4, atol=1e-4)


def test_equal_seeds_give_equal_bits_in_every_copy():
    """On a client, after a pickle, whatever was projected before and whatever the global seed."""
    x = randn(3000)
    first = CountSketch(256, seed=9)(x)
    torch.manual_seed(123)
    again = CountSketch(256, seed=9)
    again(randn(500))

    assert torch.equal(again(x), first)
    assert torch.equal(pickle.loads(pickle.dumps(again))(x), first)
    assert not torch.equal(CountSketch(256, seed=8)(x), first)
    assert len(pickle.dumps(again)) < 500


def test_global_random_numbers_are_left_alone():
    """Hashes come from a generator of their own."""
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    CountSketch(16, seed=0)(torch.ones(100))

    assert torch.equal(torch.rand(2), expected)


def test_hashes_take_five_bytes_per_number():
    """Not k of them."""
    project = CountSketch(16_384, seed=0)
    project(torch.ones(1000))

    (hashes,) = project._buckets._drawn.values()
    assert sum(tensor.numel() * tensor.element_size() for tensor in hashes) == 5 * 1000


def test_any_shape_and_dtype_is_read_as_a_float32_vector():
    """A bfloat16 matrix is its flattened float32 copy."""
    matrix = randn(20, 30).bfloat16()
    project = CountSketch(64, seed=0)

    assert project(matrix).dtype == torch.float32
    assert torch.equal(project(matrix), project(matrix.float().flatten()))


def test_column_sketches_keep_the_columns_cosines():
    """Two gradients of 3 columns with cosines .9, 0 and -.5; at 4,096 rows the standard deviation is .02 at most."""
    one, noise = randn(20_000, 3, seed=4).abs(), randn(20_000, 3, seed=5)  # one sign: signs must be random
    one = one / one.norm(dim=0)
    noise = noise - (noise * one).sum(dim=0) * one
    noise = noise / noise.norm(dim=0)
    cosines = torch.tensor([0.9, 0.0, -0.5])
    two = (cosines * one + (1 - cosines**2).sqrt() * noise) * torch.tensor([1.0, 100.0, 0.01])
    project = ColumnSketch(4096, 3)

    x, y = (project(gradient).reshape(-1, 3) for gradient in (one, two))
    got = torch.nn.functional.cosine_similarity(x, y, dim=0)
    assert (got - cosines).abs().max() < 0.08
    whole = ColumnCosine(3).matrix(torch.stack([project(one), project(two)]))[0, 1]
    torch.testing.assert_close(whole, got.mean(), atol=1e-6, rtol=0)


def test_a_column_sketch_refuses_a_gradient_of_another_width():
    """It names the two widths."""
    with pytest.raises(ValueError, match=r"3 columns.*\(5, 4\)"):
        ColumnSketch(8, 3)(torch.ones(5, 4))
    with pytest.raises(ValueError, match="columns"):
        ColumnSketch(8, 0)


def test_a_sketch_without_buckets_is_refused():
    """Size 0."""
    with pytest.raises(ValueError, match="at least 1"):
        CountSketch(0)
