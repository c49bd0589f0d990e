"""What clients share by name, and beside a callback's tensors."""

import pytest
import torch
from torch import nn

from lightning_pfl.callbacks.federated import Exchange
from lightning_pfl.federation.sharing import JointExchange, NamedTensors, exchange_of
from lightning_pfl.types import FlatTensors, Personalized, SharedTensors
from tests.federation.tiny import Tiny


class Heads(Exchange):
    """Shares the head, among clients of one architecture."""

    def architecture(self, module):
        return "heads"

    def upload(self, module):
        return SharedTensors(same_architecture=FlatTensors.pack({"head": module.head.weight}))

    def receive(self, module, personalized):
        assert set(personalized.start.common.layout.names) == set()
        with torch.no_grad():
            module.head.weight.copy_(personalized.start.same_architecture.unpack()["head"])


def start(**tensors):
    return Personalized(start=SharedTensors(FlatTensors.pack(tensors)))


def test_only_named_tensors_are_shared_and_overwritten():
    module, exchange = Tiny(), NamedTensors(["encoder.w*"])
    head = module.head.weight.clone()
    assert exchange.upload(module).common.layout.names == ("encoder.weight",)

    exchange.receive(module, start(**{"encoder.weight": torch.ones(8, 4)}))

    assert torch.equal(module.encoder.weight, torch.ones(8, 4))
    assert torch.equal(module.head.weight, head)
    assert module.encoder.weight.requires_grad


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"head.weight": torch.ones(1, 8)}, "`head.weight` of shape .1, 8., but this client has nothing of that name"),
        ({"encoder.weight": torch.ones(9, 4)}, r"`encoder.weight` of shape \(9, 4\), but this client has \(8, 4\)"),
    ],
)
def test_a_tensor_that_was_not_agreed_on_is_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        NamedTensors(["encoder"]).receive(Tiny(), start(**tensors))


def test_integers_are_not_averaged():
    module = nn.Module()
    module.norm = nn.BatchNorm1d(2)

    names = NamedTensors(["norm"]).upload(module).common.layout.names

    assert "norm.num_batches_tracked" not in names
    assert "norm.running_mean" in names


def test_architectures_differ_with_names_and_shapes():
    wider = Tiny()
    wider.head = nn.Linear(9, 1)

    exchange = NamedTensors(["encoder"])

    assert exchange.architecture(Tiny()) == exchange.architecture(Tiny())
    assert exchange.architecture(Tiny()) != exchange.architecture(wider)


def test_each_exchange_receives_what_is_its_own():
    joint, source, target = exchange_of([Heads()], ["encoder"]), Tiny(), Tiny()
    assert isinstance(joint, JointExchange)
    nn.init.ones_(source.encoder.weight)
    nn.init.ones_(source.head.weight)

    joint.receive(target, Personalized(start=joint.upload(source)))

    assert torch.equal(target.encoder.weight, source.encoder.weight)
    assert torch.equal(target.head.weight, source.head.weight)


def test_two_exchanges_of_one_tensor_are_refused():
    with pytest.raises(ValueError, match=r"share tensors of one name: \['encoder.bias'"):
        JointExchange([NamedTensors(["encoder"]), NamedTensors(["encoder"])]).upload(Tiny())
