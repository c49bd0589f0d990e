"""Numbers as bytes: how many bytes, how far off, and what bytes are refused."""

import pytest
import torch

from lightning_pfl.functional.wire import Bfloat16, Float32, Int8, LargestChanges

DENSE = [Float32(), Bfloat16(), Int8(), Int8(block=7), Int8(block=None)]


def vector(sizes, seed=0):
    """Tensors of very different sizes of numbers."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, generator=generator) * 10.0**index for index, size in enumerate(sizes)]
    return torch.cat(parts) if parts else torch.zeros(0)


def there_and_back(wire, numbers, sizes):
    return wire.decode(wire.encode(numbers, sizes), sizes)


@pytest.mark.parametrize("sizes", [[], [0], [1], [5, 0, 300], [256, 16, 256, 16]], ids=str)
@pytest.mark.parametrize("wire", DENSE, ids=repr)
def test_what_is_written_has_the_size_that_was_said(wire, sizes):
    data = wire.encode(vector(sizes), sizes)

    assert len(data) == wire.nbytes(sizes)
    assert wire.decode(data, sizes).shape == (sum(sizes),)


def test_the_sizes_are_these():
    """By hand: 544 numbers in four tensors; 544 / 128 = 4.25 blocks, 544 / 7 = 77.7."""
    sizes = [256, 16, 256, 16]
    assert [wire.nbytes(sizes) for wire in DENSE] == [2176, 1088, 544 + 20, 544 + 4 * 78, 544 + 16]


def test_float32_rounds_nothing_and_bfloat16_to_eight_digits():
    numbers = vector([50, 50])

    assert torch.equal(there_and_back(Float32(), numbers, [50, 50]), numbers)
    rounded = there_and_back(Bfloat16(), numbers, [50, 50])
    assert torch.equal(rounded, numbers.bfloat16().float())
    assert ((rounded - numbers).abs() <= numbers.abs() / 256).all()


@pytest.mark.parametrize(("block", "parts"), [(None, [5, 300]), (7, [7] * 43 + [4])], ids=["tensors", "blocks"])
def test_int8_is_off_by_half_a_step_of_its_own_block(block, parts):
    numbers = vector([5, 300])

    rounded = there_and_back(Int8(block=block), numbers, [5, 300])

    for got, wanted in zip(rounded.split(parts), numbers.split(parts), strict=True):
        step = wanted.abs().max() / 127
        assert ((got - wanted).abs() <= step * 0.5001).all()
        assert got.abs().max() == pytest.approx(wanted.abs().max().item())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("wire", DENSE, ids=repr)
def test_what_is_not_finite_arrives_as_something_that_is_not(wire, bad):
    """So that the server's guard sees it."""
    numbers = torch.ones(20)
    numbers[11] = bad

    assert not torch.isfinite(there_and_back(wire, numbers, [20])[11])


def test_zeros_stay_zeros():
    for wire in DENSE:
        assert not there_and_back(wire, torch.zeros(20), [20]).any()


def test_the_largest_changes_are_sent_and_of_equal_ones_the_first():
    wire = LargestChanges(0.3, values=Float32())
    change = torch.tensor([1.0, -5.0, 2.0, -2.0, 0.0, 2.0, 0.5, 4.0, 0.0, 0.0])

    got = wire.decode(wire.encode(change), 10)

    assert got.tolist() == [0.0, -5.0, 2.0, 0.0, 0.0, 0.0, 0.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("numel", "kept", "nbytes"), [(0, 0, 0), (3, 1, 4), (1000, 10, 40), (2**16, 656, 2624), (2**16 + 1, 656, 3936)]
)
def test_changes_take_a_place_and_a_value_each(numel, kept, nbytes):
    wire = LargestChanges(0.01)

    data = wire.encode(torch.randn(numel, generator=torch.Generator().manual_seed(0)))

    assert (wire.kept(numel), wire.nbytes(numel), len(data)) == (kept, nbytes, nbytes)
    assert wire.decode(data, numel).count_nonzero() == kept


def test_a_change_that_is_not_finite_is_sent():
    change = torch.full((100,), 7.0)
    change[60] = float("nan")

    assert LargestChanges(0.01).decode(LargestChanges(0.01).encode(change), 100)[60].isnan()


@pytest.mark.parametrize("wire", DENSE, ids=repr)
def test_too_few_or_too_many_bytes_are_refused(wire):
    data = wire.encode(vector([20]), [20])
    for wrong in (data[:-1], data + b"x", b""):
        with pytest.raises(ValueError, match=r"20 numbers as .* take .* bytes, but there are"):
            wire.decode(wrong, [20])


def test_a_size_that_nobody_has_is_refused_before_memory_is_taken():
    for wire in DENSE:
        with pytest.raises(ValueError, match=r"take .* bytes"):
            wire.decode(b"1234", [2**45])


@pytest.mark.parametrize("places", [[3, 3], [4, 1], [1, 10]], ids=["twice", "falling", "outside"])
def test_places_that_are_none_are_refused(places):
    wire = LargestChanges(0.2, values=Float32())
    data = torch.tensor(places, dtype=torch.int16).numpy().tobytes() + Float32().encode(torch.ones(2), [2])

    with pytest.raises(ValueError, match="must rise and lie below 10"):
        wire.decode(data, 10)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`block`"):
        Int8(block=0)
    for fraction in (0, 1.5, "all"):
        with pytest.raises(ValueError, match="`fraction`"):
            LargestChanges(fraction)
