"""Every client has a model, in the numbers that were asked for."""

from collections import Counter

import pytest

from lightning_pfl.data import assign_across, assign_in_turn, assign_shares

CLIENTS = [f"c{index}" for index in range(10)]


def test_one_model_is_everybodys():
    assert set(assign_in_turn(CLIENTS, ["1B"]).values()) == {"1B"}


def test_shares_are_met_and_the_seed_decides_who():
    """The published mixture of one-billion and three-billion models: four and six."""
    one, again, other = (assign_shares(CLIENTS, {"1B": 4, "3B": 6}, seed=seed) for seed in (0, 0, 1))

    assert Counter(one.values()) == {"1B": 4, "3B": 6}
    assert list(one) == CLIENTS
    assert one == again != other


def test_relatives_are_on_different_models():
    groups = {client: index // 2 for index, client in enumerate(CLIENTS)}  # five pairs
    models = assign_across(groups, ["1B", "3B"])

    assert all(models[CLIENTS[index]] != models[CLIENTS[index + 1]] for index in range(0, 10, 2))
    assert models["c0"] != models["c2"]  # groups begin with different models


def test_what_cannot_be_dealt_out_is_refused():
    with pytest.raises(ValueError, match=r"10 clients, but is \{'1B': 4\}, which is 4"):
        assign_shares(CLIENTS, {"1B": 4})
    with pytest.raises(ValueError, match="at least one model"):
        assign_in_turn(CLIENTS, [])
    with pytest.raises(ValueError, match=r"but \['a'\] are named more often"):
        assign_in_turn(["a", "a"], ["1B"])
    with pytest.raises(ValueError, match="at least one model"):
        assign_across({"a": 1}, [])
