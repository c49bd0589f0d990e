"""Promises of `lightning_pfl.aggregation.mixable`."""

import pytest
import torch

from lightning_pfl.aggregation.mixable import check_mixable
from lightning_pfl.types import FlatTensors, SharedTensors


def shared(rank=4, blocks=2, roles=("q",), width=None):
    """What a client with these adapter settings shares."""
    common = {}
    for block in range(blocks):
        for role in roles:
            common[f"language/{block}/{role}/P"] = torch.zeros(rank, rank)
            common[f"language/{block}/{role}/Q"] = torch.zeros(rank)
    bound = {} if width is None else {"layers.0.q/A": torch.zeros(rank, width)}
    return SharedTensors(FlatTensors.pack(common), FlatTensors.pack(bound))


def refusal(clients, architectures=None, sketches=None):
    """The message of the error, as one line."""
    with pytest.raises(ValueError, match=r".") as caught:
        check_mixable(clients, architectures or dict.fromkeys(clients, "one"), sketches)
    return str(caught.value)


def test_ranks_that_differ_are_named_by_client():
    """The user wants to know who, not which matrix product failed."""
    message = refusal({"a": shared(rank=4), "b": shared(rank=8), "c": shared(rank=4)})

    assert "rank 4 on `a`, `c`; 8 on `b`" in message
    assert "CoLoRA(rank=" in message


def test_numbers_of_blocks_that_differ_are_named_by_client():
    """Block 1 of 2 and block 1 of 4 lie at different depths; their shapes alone would fit."""
    message = refusal({"a": shared(blocks=4), "b": shared(blocks=2)})

    assert "tower `language`" in message
    assert "4 on `a`; 2 on `b`" in message
    assert "num_blocks=2" in message


def test_roles_that_only_some_models_have_are_fine():
    """They are mixed over those that hold them."""
    check_mixable({"a": shared(roles=("q", "gate")), "b": shared(roles=("q",))}, {"a": "one", "b": "two"})


def test_towers_that_only_some_models_have_are_fine():
    """A client without a vision tower has no blocks there, which is no other number of blocks."""
    both = {**shared().common.unpack(), "vision/0/q/P": torch.zeros(4, 4)}

    check_mixable({"a": SharedTensors(FlatTensors.pack(both)), "b": shared()}, {"a": "one", "b": "two"})


def test_names_of_the_users_own_need_only_agree_in_shape():
    """`share=` allows any tensor; a name such as `head.weight` counts no blocks."""
    small = SharedTensors(FlatTensors.pack({"head.weight": torch.zeros(2, 3)}))
    large = SharedTensors(FlatTensors.pack({"head.weight": torch.zeros(2, 5)}))

    check_mixable({"a": small, "b": small}, {"a": "one", "b": "two"})
    message = refusal({"a": small, "b": large}, {"a": "one", "b": "two"})
    assert "`head.weight`" in message
    assert "(2, 3) on `a`; (2, 5) on `b`" in message


def test_clients_of_one_architecture_must_share_the_same_tensors():
    """Two widths under one architecture, or a tensor that one of them lacks."""
    message = refusal({"a": shared(width=8), "b": shared(width=6)})
    assert "`layers.0.q/A`" in message
    assert "`a` ((4, 8))" in message
    assert "`b` ((4, 6))" in message

    assert "absent" in refusal({"a": shared(width=8), "b": shared()})


def test_clients_of_two_architectures_may_differ_in_width():
    """That is what architectures are for."""
    check_mixable({"a": shared(width=8), "b": shared(width=6)}, {"a": "wide", "b": "narrow"})


def test_sketches_of_two_lengths_are_named_by_client():
    """Their cosine does not exist."""
    message = refusal(
        {"a": shared(), "b": shared(), "c": shared()}, sketches={"a": torch.ones(8), "b": torch.ones(16), "c": None}
    )

    assert "8 on `a`; 16 on `b`" in message
