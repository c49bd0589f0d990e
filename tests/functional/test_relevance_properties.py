"""What holds for the weights of any clients: properties, over drawn numbers of clients, sketches and settings."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pfl.functional.relevance import FixedMatrix, Peers, SampleCount, Softmax, TaskGraph, TopK, Uniform
from lightning_pfl.functional.similarity import ColumnCosine, Cosine
from lightning_pfl.functional.staleness import Fading

IDS = [f"client-{index}" for index in range(7)]
NUMBERS = st.floats(-4, 4, width=32).map(lambda value: round(value, 2))


@st.composite
def peers(draw):
    """One to seven clients; some without a sketch, some with an upload that is old or too old, perhaps a newcomer."""
    count = draw(st.integers(1, 7))
    ids = tuple(IDS[:count])
    flags = st.lists(st.booleans(), min_size=count, max_size=count).map(tuple)
    sketches = torch.tensor(
        draw(st.lists(st.lists(NUMBERS, min_size=4, max_size=4), min_size=count, max_size=count)), dtype=torch.float32
    )
    sketched = tuple(flag and bool(row.any()) for flag, row in zip(draw(flags), sketches, strict=True))
    return Peers(
        client_ids=ids,
        num_examples=tuple(draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count))),
        sources=draw(flags),
        similarity=draw(st.sampled_from([Cosine(), ColumnCosine(2)])).matrix(sketches) if any(sketched) else None,
        sketched=sketched,
        newcomers=frozenset(draw(st.lists(st.sampled_from(ids), max_size=1))),
        ages=tuple(draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))),
    )


SIMPLE = st.one_of(
    st.builds(
        Softmax, st.floats(0.01, 5.0), standardize=st.booleans(), include_self=st.booleans(), min_spread=st.just(1e-3)
    ),
    st.builds(Uniform, include_self=st.booleans()),
    st.builds(SampleCount, include_self=st.booleans()),
    st.just(TaskGraph({client: [str(index % 3)] for index, client in enumerate(IDS)})),
    st.builds(
        FixedMatrix,
        st.fixed_dictionaries({one: st.dictionaries(st.sampled_from(IDS), NUMBERS.map(abs)) for one in IDS}),
    ),
)
POLICIES = st.one_of(SIMPLE, st.builds(Fading, SIMPLE, st.floats(0, 4)))
RANKINGS = st.permutations(range(1, len(IDS) + 1)).map(lambda weights: dict(zip(IDS, weights, strict=True)))
WITHOUT_TIES = st.builds(FixedMatrix, st.fixed_dictionaries(dict.fromkeys(IDS, RANKINGS)))


def permuted(known, order):
    """The same clients, told in another order."""
    ids = [known.client_ids[index] for index in order]
    return Peers(
        client_ids=tuple(ids),
        num_examples=tuple(known.num_examples[index] for index in order),
        sources=tuple(known.sources[index] for index in order),
        similarity=None if known.similarity is None else known.similarity[order][:, order],
        sketched=tuple(known.sketched[index] for index in order),
        newcomers=known.newcomers,
        ages=tuple(known.ages[index] for index in order),
    )


@settings(max_examples=150, deadline=None)
@given(peers(), st.one_of(POLICIES, st.builds(TopK, st.integers(1, 4), POLICIES)))
def test_rows_sum_to_one_and_hold_only_who_may_be_mixed(known, policy):
    """A row is a mean over sources and, perhaps, the client itself; never over a newcomer, unless it is alone."""
    rows = policy.rows(known)

    torch.testing.assert_close(rows.sum(dim=1), torch.ones(len(known.client_ids), dtype=torch.float64))
    assert (rows >= 0).all()
    for row, client in enumerate(known.client_ids):
        own = rows[row, row].item()
        assert client not in known.newcomers or own in (0.0, 1.0)
        for column, other in enumerate(known.client_ids):
            if row != column and (not known.sources[column] or other in known.newcomers):
                assert rows[row, column] == 0.0


@settings(max_examples=150, deadline=None)
@given(peers(), POLICIES, st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(known, policy, random):
    """Permuting the clients permutes rows and columns, and nothing else."""
    order = list(range(len(known.client_ids)))
    random.shuffle(order)

    rows = policy.rows(known)

    torch.testing.assert_close(policy.rows(permuted(known, order)), rows[order][:, order], atol=1e-9, rtol=1e-7)


@settings(max_examples=100, deadline=None)
@given(peers(), st.builds(TopK, st.integers(1, 4), WITHOUT_TIES), st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter_to_the_k_largest_weights(known, policy, random):
    """Unless two are equal: of those `TopK` keeps the first."""
    order = list(range(len(known.client_ids)))
    random.shuffle(order)

    rows = policy.rows(known)

    torch.testing.assert_close(policy.rows(permuted(known, order)), rows[order][:, order], atol=1e-9, rtol=1e-7)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(NUMBERS, min_size=6, max_size=6), min_size=1, max_size=6),
    st.sampled_from([Cosine(), ColumnCosine(2), ColumnCosine(3)]),
    st.randoms(use_true_random=False),
)
def test_cosines_of_clients_in_another_order_are_the_same_cosines(rows, similarity, random):
    """Also symmetric, within -1 and 1, and 1 on the diagonal."""
    sketches = torch.tensor(rows, dtype=torch.float32)
    order = list(range(len(rows)))
    random.shuffle(order)

    cosines = similarity.matrix(sketches)

    assert torch.equal(cosines, cosines.T)
    assert torch.equal(cosines.diagonal(), torch.ones(len(rows)))
    assert cosines.abs().max() <= 1.0
    torch.testing.assert_close(similarity.matrix(sketches[order]), cosines[order][:, order], atol=1e-6, rtol=0)
