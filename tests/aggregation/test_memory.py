"""Promises of `lightning_pfl.aggregation.memory`."""

import torch

from lightning_pfl.aggregation.memory import dump, load, remember
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors


def update(round, sketch):
    tensors = SharedTensors(FlatTensors.pack({"P": torch.tensor([float(round)])}))
    return ClientUpdate("a", round, 5, "one", tensors, None if sketch is None else torch.tensor(sketch))


def test_sketches_are_averaged_over_rounds():
    """By hand with ema 0.25: 4, then 0.25 * 4 + 0.75 * 8 = 7; the tensors are the last ones."""
    known = remember({}, [update(0, [4.0])], ema=0.25)
    known = remember(known, [update(1, [8.0])], ema=0.25)

    assert known["a"].sketch.tolist() == [7.0]
    assert known["a"].shared.common.vector.tolist() == [1.0]
    assert known["a"].round == 1


def test_a_client_that_sends_no_sketch_keeps_its_last():
    """A turn too short to reach the probe's next step must not forget the task."""
    known = remember({}, [update(0, [4.0])], ema=0.5)

    assert remember(known, [update(1, None)], ema=0.5)["a"].sketch.tolist() == [4.0]


def test_what_was_known_is_left_alone():
    """The state of the last round may still be needed to run a round again."""
    known = remember({}, [update(0, [4.0])], ema=0.5)
    remember(known, [update(1, [8.0])], ema=0.5)

    assert known["a"].sketch.tolist() == [4.0]
    assert known["a"].round == 0


def test_dump_and_load_are_inverse():
    """Shapes of no, one and two dimensions come back as they were."""
    tensors = {"scalar": torch.tensor(1.0), "row": torch.ones(3), "matrix": torch.ones(2, 2)}
    item = ClientUpdate("a", 2, 5, "one", SharedTensors(FlatTensors.pack(tensors)), torch.ones(4))
    known = remember({}, [item], ema=0.5)

    again = load(dump(known))["a"]

    assert again.shared.common.layout == item.shared.common.layout
    assert torch.equal(again.shared.common.vector, item.shared.common.vector)
    assert (again.round, again.num_examples, again.architecture) == (2, 5, "one")
