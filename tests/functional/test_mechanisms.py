"""Promises of `lightning_pfl.functional.mechanisms`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_pfl.functional.mechanisms import (
    ClientNoise,
    ExampleNoise,
    NoiseStream,
    SketchBound,
    UpdateNoise,
    noised_sketch,
    noised_update,
)
from lightning_pfl.functional.privacy import clip_rows
from lightning_pfl.types import FlatTensors, SharedTensors

STREAM = NoiseStream(bytes(range(32)), "ward-3", 4)
FAINT = 1e-12
numbers = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)


def rows_of(count, size=3):
    return arrays("float32", (count, size), elements=numbers).map(torch.from_numpy)


def shared(common, bound=(0.0, 0.0)):
    return SharedTensors(FlatTensors.pack({"P": torch.tensor(common)}), FlatTensors.pack({"A": torch.tensor(bound)}))


@settings(max_examples=200, deadline=None)
@given(rows_of(6), rows_of(1), st.integers(0, 5), st.integers(1, 3), st.floats(1e-3, 1e3))
def test_replacing_an_example_moves_a_mean_no_further_than_the_sensitivity(rows, other, place, repeats, max_norm):
    """By brute force, for an example that is sketched up to three times in a turn."""
    neighbour = rows.clone()
    neighbour[[(place + step) % 6 for step in range(repeats)]] = other
    noise, bound = ExampleNoise(1.0), SketchBound(max_norm, 6, repeats)

    means = [noise.bounded(clip_rows(each, max_norm).double().mean(dim=0)) for each in (rows, neighbour)]

    assert (means[0] - means[1]).norm().item() <= noise.sensitivity(bound)


def test_the_sensitivity_of_examples_is_reached():
    """A bound that is never met wastes noise: opposite vectors of full length, one of four examples."""
    rows = torch.tensor([[5.0, 0.0]] * 4)
    neighbour = rows * torch.tensor([[-1.0], [1], [1], [1]])
    means = [clip_rows(each, 2.0).double().mean(dim=0) for each in (rows, neighbour)]

    bound = SketchBound(2.0, 4)
    assert (means[0] - means[1]).norm().item() == pytest.approx(ExampleNoise(1.0).sensitivity(bound), rel=1e-5)
    assert ExampleNoise(1.0).sensitivity(SketchBound(2.0, 4, 9)) == 4.0  # all four may be one example, and no more


@settings(max_examples=200, deadline=None)
@given(rows_of(2))
def test_no_two_clients_sketches_are_further_apart_than_the_sensitivity(pair):
    """Whatever a client has."""
    noise = ClientNoise(1.0)

    one, other = (noise.bounded(each) for each in pair)

    assert (one - other).norm().item() <= noise.sensitivity(None)
    assert one.norm().item() == pytest.approx(1.0, rel=1e-5) or not pair[0].any()


@settings(max_examples=100, deadline=None)
@given(rows_of(3, 4), st.floats(1e-3, 1e3))
def test_no_two_updates_from_one_known_point_are_further_apart_than_the_sensitivity(rows, max_norm):
    """All shared tensors together are one step."""
    known, *trained = (shared(row[:2].tolist(), row[2:].tolist()) for row in rows)
    steps = []
    for each in trained:
        before, after = (torch.cat([one.common.vector, one.same_architecture.vector]) for one in (known, each))
        steps.append(clip_rows((after.double() - before.double())[None], max_norm)[0])

    assert (steps[0] - steps[1]).norm().item() <= UpdateNoise(1.0, max_norm).sensitivity


def test_the_noise_is_as_strong_as_multiplier_times_sensitivity():
    """On 100,000 numbers, before the scaling to length one: a sketch of known length tells the scale."""
    size = 100_000
    sketch = torch.zeros(size)
    sketch[0] = 10.0
    bound = SketchBound(max_norm=10.0, num_examples=50, repeats=2)  # 2 * 10 * 2 / 50 = 0.8, times 3

    for noise, signal, deviation in ((ExampleNoise(3.0), 10.0, 2.4), (ClientNoise(3.0), 1.0, 6.0)):
        draw = STREAM.draw("sketch", noise.bounded(sketch))
        expected = deviation * draw
        expected[0] += signal
        sent = noised_sketch(sketch, noise, STREAM, bound=bound)

        torch.testing.assert_close(sent.double(), expected / expected.norm(), rtol=1e-5, atol=1e-9)
        assert sent.dtype == torch.float32
        assert abs(draw.std() - 1) < 0.01


def test_without_noise_worth_the_name_a_sketch_keeps_its_direction():
    for noise in (ExampleNoise(FAINT), ClientNoise(FAINT)):
        sent = noised_sketch(torch.tensor([30.0, 40.0]), noise, STREAM, bound=SketchBound(50.0, 10))
        torch.testing.assert_close(sent, torch.tensor([0.6, 0.8]))


def test_an_update_is_a_bounded_step_from_what_the_server_has():
    """By hand: (3, 0, 4, 0) has norm 5; a bound of 1 leaves (.6, 0, .8, 0), over both kinds of tensors."""
    sent = noised_update(
        shared((4.0, 1.0), (5.0, 1.0)), shared((1.0, 1.0), (1.0, 1.0)), UpdateNoise(FAINT, 1.0), STREAM
    )

    torch.testing.assert_close(sent.common.vector, torch.tensor([1.6, 1.0]))
    torch.testing.assert_close(sent.same_architecture.vector, torch.tensor([1.8, 1.0]))


def test_a_short_step_is_sent_whole_and_every_number_gets_its_noise():
    """Also the numbers that have not moved."""
    known, trained = shared((1.0, 1.0)), shared((1.5, 1.0))
    whole = noised_update(trained, known, UpdateNoise(FAINT, 1.0), STREAM)
    noised = noised_update(trained, known, UpdateNoise(2.0, 1.0), STREAM)

    torch.testing.assert_close(whole.common.vector, trained.common.vector)
    step = torch.tensor([0.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    expected = torch.tensor([1.5, 1.0, 0.0, 0.0]) + 4.0 * STREAM.draw("update", step)  # 2 * (2 * 1)
    got = torch.cat([noised.common.vector, noised.same_architecture.vector])
    torch.testing.assert_close(got, expected.float())


def test_the_key_is_not_shown():
    assert "ward-3" in repr(STREAM)
    assert str(STREAM.key) not in repr(STREAM)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_cannot_be_bounded_is_not_sent(value):
    with pytest.raises(ValueError, match="sketch holds NaN or infinity"):
        noised_sketch(torch.tensor([value, 1.0]), ClientNoise(1.0), STREAM, bound=None)
    with pytest.raises(ValueError, match="update holds NaN or infinity"):
        noised_update(shared((value, 1.0)), shared((1.0, 1.0)), UpdateNoise(1.0, 1.0), STREAM)


def test_noise_on_examples_without_a_bound_is_refused():
    with pytest.raises(ValueError, match="needs a bound on each example's part"):
        noised_sketch(torch.ones(2), ExampleNoise(1.0), STREAM, bound=None)


def test_a_step_needs_two_ends_of_one_shape():
    with pytest.raises(ValueError, match="has changed its names or shapes"):
        noised_update(shared((1.0, 2.0, 3.0)), shared((1.0, 2.0)), UpdateNoise(1.0, 1.0), STREAM)


@pytest.mark.parametrize("make", [ExampleNoise, ClientNoise, lambda value: UpdateNoise(value, 1.0)])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_multiplier_out_of_range_is_refused(make, value):
    with pytest.raises(ValueError, match="`multiplier` must be positive"):
        make(value)


def test_a_bound_on_updates_out_of_range_is_refused():
    with pytest.raises(ValueError, match="`max_norm` must be positive"):
        UpdateNoise(1.0, 0.0)
