"""Letters: how large they are, and what is not one."""

import json
import struct
import zlib

import pytest
import torch

from lightning_pfl.federation.letters import (
    layouts_of,
    read_personalized,
    read_shared,
    read_sketch,
    write_personalized,
    write_shared,
    write_sketch,
)
from lightning_pfl.functional.wire import Bfloat16, Float32, Int8, LargestChanges
from lightning_pfl.types import FlatTensors, Letter, Personalized, SharedTensors

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def adapters(rank=16, blocks=4, seed=0):
    """P and Q as a language model of seven roles shares them."""
    generator = torch.Generator().manual_seed(seed)
    return SharedTensors(
        FlatTensors.pack(
            {
                f"main/{block}/{role}/{name}": torch.randn(*shape, generator=generator)
                for block in range(blocks)
                for role in ROLES
                for name, shape in (("P", (rank, rank)), ("Q", (rank,)))
            }
        )
    )


@pytest.mark.parametrize(
    ("wire", "per_number"),
    [(Float32(), 4.0), (Bfloat16(), 2.0), (Int8(block=128), 1 + 4 / 128), (LargestChanges(0.1), 0.1 * (2 + 2))],
    ids=["float32", "bfloat16", "int8", "changes"],
)
def test_a_letter_of_p_and_q_is_within_a_percent_of_its_numbers(wire, per_number):
    """Of 28 layers of rank 16; at most so many bytes more as a header takes. What is counted is what travels."""
    mine, numbers = adapters(), 28 * (16 * 16 + 16)

    letter = write_shared(mine, wire, known=layouts_of(mine), copy=adapters(seed=1))

    assert letter.nbytes == len(letter.common) + len(letter.same_architecture)
    assert per_number * numbers <= letter.nbytes <= 1.01 * per_number * numbers


def test_a_layout_that_is_not_known_is_spelled_out_once():
    mine = adapters()

    letter = write_shared(mine, Bfloat16(), known=())

    assert read_shared(letter, Bfloat16(), layouts={}).common.layout == mine.common.layout
    assert 0 < letter.nbytes - write_shared(mine, Bfloat16(), known=layouts_of(mine)).nbytes < 400
    short = write_shared(mine, Bfloat16(), known=layouts_of(mine))
    with pytest.raises(ValueError, match="names a layout of tensors that is not known here"):
        read_shared(short, Bfloat16(), layouts={})


def test_what_is_frozen_and_a_start_at_once_travels_once():
    shared, again, other = adapters(), adapters(), adapters(seed=1)

    twice, different = Personalized(shared, again), Personalized(shared, other)

    assert (
        write_personalized(twice, Float32(), known=()).nbytes * 2
        == write_personalized(different, Float32(), known=()).nbytes
    )
    for sent in (twice, different, Personalized(None, shared), Personalized(shared, None), Personalized()):
        got = read_personalized(write_personalized(sent, Float32(), known=()), Float32(), layouts={})
        for one, wanted in ((got.frozen, sent.frozen), (got.start, sent.start)):
            assert (one is None) == (wanted is None)
            assert one is None or torch.equal(one.common.vector, wanted.common.vector)


def test_changes_of_another_copy_are_refused():
    wire, mine = LargestChanges(0.1), adapters()
    letter = write_shared(mine, wire, known=layouts_of(mine), copy=adapters(seed=1))

    for copy in (None, adapters(seed=2), adapters(rank=8)):
        with pytest.raises(ValueError, match="changes of a copy that is not the one kept here"):
            read_shared(letter, wire, layouts=layouts_of(mine), copy=copy)
    with pytest.raises(ValueError, match=r"this run sends everything, as Bfloat16\(\)"):
        read_shared(letter, Bfloat16(), layouts=layouts_of(mine), copy=adapters(seed=1))


def spelled(layout, payload=b""):
    packed = zlib.compress(layout)
    return struct.pack("<4sB8sII", b"PFL1", 0, b"12345678", 0, len(packed)) + packed + payload


@pytest.mark.parametrize(
    "data",
    [
        b"PFL",
        b"\x80\x05" + bytes(40),
        spelled(b"no JSON"),
        spelled(json.dumps([["P"], [[-1]]]).encode()),
        spelled(json.dumps([["P"], [[2**60]]]).encode()),
        spelled(json.dumps([["P", "P"], [[1], [1]]]).encode()),
        spelled(json.dumps([["P"], [[2**39]]]).encode()),
        spelled(json.dumps([["P"], [[2]]]).encode(), bytes(3)),
        spelled(b"[" * 100_000),
        spelled(b" " * 2**25),
    ],
    ids=["short", "pickle", "text", "negative", "huge", "twice", "large", "cut off", "deep", "a bomb"],
)
def test_bytes_that_are_no_letter_are_refused(data):
    with pytest.raises(ValueError, match=r"letter|take \d+ bytes"):
        read_shared(Letter(data), Bfloat16(), layouts={})


def test_a_sketch_is_written_in_the_dense_format():
    sketch = torch.linspace(-1, 1, 4096)

    data = write_sketch(sketch, LargestChanges(0.1, values=Int8()))

    assert len(data) == 4 + 4096 + 4 * 32
    assert (read_sketch(data, LargestChanges(0.1, values=Int8())) - sketch).abs().max() < 0.005
    for wrong in (b"", b"123", data[:-1], struct.pack("<I", 2**32 - 1)):
        with pytest.raises(ValueError, match="bytes"):
            read_sketch(wrong, Int8())
