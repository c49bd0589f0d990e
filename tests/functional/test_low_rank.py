"""What holds for means of products: properties over drawn numbers of clients, ranks and widths, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pfl.functional.low_rank import Factors, product_mean, product_means

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def product(factors):
    return factors.B @ factors.A


@st.composite
def clients(draw, *, one_rank=False, most=5):
    """One to five clients with factors of one pair of widths, some of them without any weight."""
    count, d_in, d_out = draw(st.integers(1, most)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    widest = min(d_in, d_out)
    ranks = (
        [draw(st.integers(1, widest))] * count
        if one_rank
        else draw(st.lists(st.integers(1, widest), min_size=count, max_size=count))
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    factors = [
        Factors(
            torch.randn(rank, d_in, dtype=torch.float64, generator=generator),
            torch.randn(d_out, rank, dtype=torch.float64, generator=generator),
        )
        for rank in ranks
    ]
    weights = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count).filter(any))
    return factors, [float(weight) for weight in weights]


def dense_mean(factors, weights):
    return sum(weight * product(one) for one, weight in zip(factors, weights, strict=True)) / sum(weights)


@settings(max_examples=100, deadline=None)
@given(clients(), st.integers(1, 6), st.booleans())
def test_the_mean_is_the_truncated_svd_of_the_dense_mean_and_its_error_is_known(drawn, rank, gauged):
    """Against the d x d matrix that the function never forms; ranks of the clients are mixed."""
    factors, weights = drawn
    dense = dense_mean(factors, weights)
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    like = torch.randn(rank, dense.shape[1], dtype=torch.float64) if gauged else None

    mean = product_mean(factors, weights, rank=rank, like=like)

    assert mean.factors.A.shape == (rank, dense.shape[1])
    assert mean.factors.B.shape == (dense.shape[0], rank)
    assert mean.norm == pytest.approx(dense.norm().item(), rel=1e-9)
    assert mean.error == pytest.approx(values[rank:].norm().item(), abs=1e-9)
    assert (product(mean.factors) - dense).norm().item() == pytest.approx(mean.error, abs=1e-9)
    if rank >= len(values) or values[rank - 1] - values[rank] > 1e-3:  # else the best of that rank is not unique
        torch.testing.assert_close(
            product(mean.factors), (left[:, :rank] * values[:rank]) @ right[:rank], rtol=0, atol=1e-7
        )


@settings(max_examples=50, deadline=None)
@given(clients(most=1), st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_the_mean_of_equal_clients_is_that_client(drawn, weights):
    (only,), _ = drawn

    mean = product_mean([only] * len(weights), weights)

    torch.testing.assert_close(product(mean.factors), product(only), **EXACT)
    assert mean.lost < 1e-9


@settings(max_examples=50, deadline=None)
@given(clients(), st.randoms(use_true_random=False))
def test_the_order_of_clients_and_the_scale_of_weights_change_nothing(drawn, random):
    factors, weights = drawn
    order = random.sample(range(len(factors)), len(factors))

    mean = product_mean(factors, weights, rank=9)
    other = product_mean([factors[i] for i in order], [7.5 * weights[i] for i in order], rank=9)

    torch.testing.assert_close(product(other.factors), product(mean.factors), **EXACT)


@settings(max_examples=50, deadline=None)
@given(clients(), st.integers(0, 2**31))
def test_factors_of_the_same_product_give_the_same_mean(drawn, seed):
    """A to R A and B to B R^-1 changes no client's product; a mean of factors it would change."""
    factors, weights = drawn
    generator = torch.Generator().manual_seed(seed)
    told_otherwise = []
    for one in factors:
        skew = torch.randn(one.rank, one.rank, dtype=torch.float64, generator=generator)
        R = torch.eye(one.rank, dtype=torch.float64) + 0.4 * skew / skew.norm()
        told_otherwise.append(Factors(R @ one.A, one.B @ torch.linalg.inv(R)))

    mean, other = (product_mean(told, weights, rank=9) for told in (factors, told_otherwise))

    torch.testing.assert_close(product(other.factors), product(mean.factors), **EXACT)


@settings(max_examples=50, deadline=None)
@given(clients(), st.integers(0, 2**31))
def test_everybodys_means_are_what_one_mean_each_would_be(drawn, seed):
    """Rows share the QRs; each is of its own client's rank."""
    factors, _ = drawn
    rows = torch.rand(len(factors), len(factors), generator=torch.Generator().manual_seed(seed))

    for mean, own, row in zip(product_means(factors, rows), factors, rows, strict=True):
        alone = product_mean(factors, row, rank=own.rank)
        assert mean.factors.A.shape == own.A.shape
        assert mean.error == pytest.approx(alone.error, abs=1e-9)
        assert mean.norm == pytest.approx(alone.norm, rel=1e-9)
        assert (product(mean.factors) - dense_mean(factors, row.double())).norm().item() == pytest.approx(
            mean.error, abs=1e-9
        )


def test_by_hand_the_factor_mean_is_wrong_and_the_product_mean_right():
    """Products diag(2, 0) and diag(0, 2): their mean is the identity, of rank 2; factors average to a half of ones."""
    one = Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]]))
    two = Factors(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [2.0]]))

    mean = product_mean([one, two], [1, 1], rank=2)

    torch.testing.assert_close(product(mean.factors), torch.eye(2))
    assert (mean.error, mean.norm) == pytest.approx((0.0, math.sqrt(2)), abs=1e-6)
    assert product_mean([one, two], [1, 1]).lost == pytest.approx(math.sqrt(0.5), rel=1e-6)
    torch.testing.assert_close((one.B + two.B) / 2 @ (one.A + two.A) / 2, torch.full((2, 2), 0.5))


def test_a_client_gets_its_own_factors_back_where_nothing_is_mixed_in():
    """Bit for bit if the row weighs it alone; to rounding if its equals are weighed too."""
    torch.manual_seed(0)
    A = 3 * torch.linalg.qr(torch.randn(8, 4))[0].T
    own = Factors(A, torch.randn(6, 4))
    other = Factors(torch.randn(4, 8), torch.randn(6, 4))

    alone, _, nobody = product_means([own, other, own], torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]]))
    equals, *_ = product_means([own, other, own], torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 1]]))

    assert torch.equal(alone.factors.A, own.A)
    assert torch.equal(alone.factors.B, own.B)
    assert alone.norm == pytest.approx(product(own).norm().item(), rel=1e-6)
    assert nobody is None
    torch.testing.assert_close(equals.factors.A, own.A, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(equals.factors.B, own.B, rtol=1e-5, atol=1e-5)


def test_adapters_that_have_learned_nothing_can_still_be_trained_on_after_a_mean():
    """At B = 0 both factors of an evenly split mean would be 0, where no gradient flows; A must not be."""
    torch.manual_seed(0)
    factors = [Factors(torch.randn(3, 8), torch.zeros(6, 3)) for _ in range(4)]

    for own, mean in zip(factors, product_means(factors, torch.ones(4, 4)), strict=True):
        assert not mean.factors.B.any()
        values = torch.linalg.svdvals(mean.factors.A)
        torch.testing.assert_close(values, torch.full((3,), own.A.norm().item() / math.sqrt(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_comes_back_as_it_was(dtype):
    """Computed in float32 at least: in float32 to a few of its last bits."""
    torch.manual_seed(0)
    factors = [Factors(torch.randn(16, 64).to(dtype), torch.randn(48, 16).to(dtype)) for _ in range(5)]

    mean = product_mean(factors, [1, 2, 3, 4, 5], rank=80)

    assert mean.factors.A.dtype == mean.factors.B.dtype == dtype
    dense = dense_mean([Factors(one.A.double(), one.B.double()) for one in factors], [1, 2, 3, 4, 5])
    off = (mean.factors.B.double() @ mean.factors.A.double() - dense).norm() / dense.norm()
    assert off < {torch.float32: 5e-6, torch.bfloat16: 1e-2}[dtype]


def test_the_number_of_threads_changes_no_bit():
    torch.manual_seed(0)
    factors = [Factors(torch.randn(16, 256), torch.randn(256, 16)) for _ in range(4)]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(product_mean(factors, [1, 2, 3, 4]).factors)
    finally:
        torch.set_num_threads(before)

    assert torch.equal(found[0].A, found[1].A)
    assert torch.equal(found[0].B, found[1].B)


ONE = Factors(torch.ones(2, 4), torch.ones(3, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: product_mean([], []), "at least one client"),
        (lambda: product_mean([ONE, Factors(torch.ones(2, 5), torch.ones(3, 2))], [1, 1]), r"\(4, 3\), \(5, 3\)"),
        (lambda: product_mean([ONE], [0]), "positive weight"),
        (lambda: product_mean([ONE], [-1]), "not negative"),
        (lambda: product_mean([ONE], [float("nan")]), "finite"),
        (lambda: product_mean([ONE], [1, 2]), "one weight per client"),
        (lambda: product_means([ONE], torch.ones(1, 2)), "one weight per client"),
        (lambda: product_mean([ONE], [1], rank=0), "at least 1, but is 0"),
        (lambda: product_mean([ONE], [1], like=torch.ones(3, 4)), r"\(2, 4\), but has \(3, 4\)"),
        (lambda: Factors(torch.ones(2, 4), torch.ones(3, 3)), r"\(2, 4\) and \(3, 3\)"),
    ],
)
def test_what_makes_no_mean_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
