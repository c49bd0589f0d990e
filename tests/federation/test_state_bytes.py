"""States come back bit for bit, and bytes from elsewhere run no code."""

import pickle
from collections import OrderedDict

import pytest
import torch

from lightning_pfl.federation.state_bytes import pack, unpack
from tests.federation.runs import assert_equal_states


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(3, 4).t(),
        torch.arange(5),
        torch.tensor(True),
        torch.tensor(float("nan")),
        torch.randn(6).bfloat16(),
        torch.zeros(0, 3),
        torch.view_as_complex(torch.randn(4, 2)).conj(),
    ],
    ids=["matrix", "transposed", "int", "bool scalar", "nan", "bf16", "empty", "conjugate"],
)
def test_tensors_come_back_bit_for_bit(tensor):
    again = unpack(pack({"value": tensor}))["value"]

    assert again.dtype == tensor.dtype
    assert again.shape == tensor.shape
    assert torch.equal(again.nan_to_num(7), tensor.nan_to_num(7))


def test_containers_come_back_as_they_were():
    state = {1: (2, [3.5, None, True]), "text": "é", "ordered": OrderedDict(a={"b": b"bytes"}), "dtype": torch.bfloat16}

    assert_equal_states(unpack(pack(state)), state)


def test_a_tensor_that_occurs_twice_is_packed_once():
    big = torch.zeros(1000)

    assert len(pack([big, big])) < len(pack([big, big.clone()])) - 3000


def test_unpacked_tensors_are_ones_own():
    packed = pack(torch.zeros(2))

    unpack(packed).add_(1)

    assert torch.equal(unpack(packed), torch.zeros(2))


RAN = []


class Runs:
    def __reduce__(self):
        return RAN.append, ("code",)


def test_bytes_that_would_run_code_are_refused():
    head = pickle.dumps({"state": Runs()})
    packed = pack({})
    start = packed.index(b"\n") + 1
    evil = packed[:start] + len(head).to_bytes(8, "little") + head

    with pytest.raises((TypeError, pickle.UnpicklingError)):
        unpack(evil)

    assert RAN == []
    with pytest.raises(ValueError, match="no client's state"):
        unpack(head)


class Odd:
    pass


def test_an_object_that_does_not_fit_is_named_with_its_place():
    with pytest.raises(TypeError, match=r"`checkpoint\['callbacks'\]\[0\]` is a Odd.*add_safe_globals"):
        pack({"fine": 1, "callbacks": [Odd()]}, check=True)


def test_a_type_that_the_user_allows_is_loaded():
    with torch.serialization.safe_globals([Odd]):
        assert isinstance(unpack(pack({"odd": Odd()}, check=True))["odd"], Odd)
