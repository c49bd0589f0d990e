"""Losses of several models in one pass."""

import pytest
import torch
from torch import nn

from lightning_pfl.functional.stacking import (
    ImpureLossError,
    Inventory,
    Part,
    hand_over,
    losses_and_gradients,
    meeting,
    stackable,
)


class Net(nn.Module):
    """A frozen base, a trained factor, a parameter that no loss needs, and a buffer."""

    def __init__(self, factor=1.0, shift=0.0):
        super().__init__()
        self.base = nn.Linear(3, 2).requires_grad_(False)
        self.factor = nn.Parameter(torch.full((2,), factor))
        self.idle = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.tensor(shift))

    def loss_of(self, batch):
        return (self.factor * self.base(batch["x"]) + self.shift - batch["y"]).square().mean()

    def writes(self, batch):
        self.shift += 1
        return self.loss_of(batch)

    def replaces(self, batch):
        self.shift = self.shift + 1
        return self.loss_of(batch)

    def rows(self, batch):
        return (self.factor * self.base(batch["x"])).square()


def nets(count=3):
    torch.manual_seed(0)
    base = nn.Linear(3, 2)
    made = [Net(factor=1.0 + index, shift=float(index)) for index in range(count)]
    for net in made:
        net.base.load_state_dict(base.state_dict())
    return made


def batch_of(index, size=4):
    generator = torch.Generator().manual_seed(index)
    return {
        "x": torch.randn(size, 3, generator=generator),
        "y": torch.randn(size, 2, generator=generator),
        "unit": "mm",
    }


def parts_of(models, method="loss_of"):
    return [Part.of(getattr(net, method), (batch_of(index),)) for index, net in enumerate(models)]


def test_losses_and_gradients_are_those_of_each_model_by_itself():
    models = nets()

    losses, gradients = losses_and_gradients(parts_of(models), own=["shift"])

    for index, net in enumerate(models):
        loss = net.loss_of(batch_of(index))
        loss.backward()
        torch.testing.assert_close(losses[index], loss.detach())
        torch.testing.assert_close(gradients[index][0], net.factor.grad)
        assert gradients[index][1] is None  # of what the loss does not depend on, as in `backward`


def test_what_is_handed_over_is_added_up_and_scaled_as_any_gradient():
    (net,) = nets(1)
    part = parts_of([net])[0]
    net.factor.grad = torch.ones(2)

    loss = hand_over(part, torch.tensor(5.0), [torch.tensor([1.0, 2.0]), None])
    (3 * loss + net.factor.sum()).backward()

    # by hand: 1 that was there, 3 times what was handed over, 1 of the sum
    torch.testing.assert_close(net.factor.grad, torch.tensor([5.0, 8.0]))
    assert net.idle.grad is None
    assert loss.item() == 5.0


def test_a_weight_with_two_names_has_the_gradient_of_both():
    class Tied(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.one = nn.Linear(2, 2, bias=False)
            self.two = nn.Linear(2, 2, bias=False)
            self.one.weight = self.two.weight = nn.Parameter(torch.full((2, 2), value))

        def loss_of(self, x):
            return self.two(self.one(x)).sum()

    models, xs = [Tied(0.5), Tied(2.0)], [torch.ones(1, 2), torch.ones(1, 2)]
    parts = [Part.of(model.loss_of, (x,)) for model, x in zip(models, xs, strict=True)]

    _, gradients = losses_and_gradients(parts, own=())

    for model, x, (gradient,) in zip(models, xs, gradients, strict=True):
        model.loss_of(x).backward()
        torch.testing.assert_close(gradient, model.one.weight.grad)


def test_bfloat16_is_as_far_from_float32_stacked_as_apart():
    models = nets()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, gradients = losses_and_gradients(parts_of(models), own=["shift"])
    for index, net in enumerate(models):
        loss = net.loss_of(batch_of(index))
        loss.backward()
        torch.testing.assert_close(losses[index], loss.detach(), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(gradients[index][0], net.factor.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("own", [(), ("shift",)], ids=["read from the first", "stacked"])
@pytest.mark.parametrize("method", ["writes", "replaces"])
def test_a_loss_that_writes_to_the_module_is_refused_by_name(own, method):
    with pytest.raises(ImpureLossError, match=rf"`Net.{method}` .* changes (\['shift'\]|which there are)"):
        losses_and_gradients(parts_of(nets(), method), own=own)


def test_a_loss_of_several_numbers_is_refused():
    with pytest.raises(RuntimeError, match=r"must be one number, but has the shape \(4, 2\)"):
        losses_and_gradients(parts_of(nets(), "rows"), own=())


def test_a_loss_that_belongs_to_no_module_is_refused_where_it_is_to_be_stacked():
    with (
        meeting(lambda loss, batch: Part.of(loss, batch)),
        pytest.raises(TypeError, match="takes a method of a module"),
    ):
        stackable(lambda x: x.sum(), torch.ones(2))
    assert stackable(lambda x: x.sum(), torch.ones(2)) == 2


def test_nothing_is_met_where_no_gradients_are_wanted():
    (net,) = nets(1)
    with meeting(lambda loss, batch: pytest.fail("met")), torch.no_grad():
        assert stackable(net.loss_of, batch_of(0)) == net.loss_of(batch_of(0))


def changed(change):
    net = nets(1)[0]
    change(net)
    return Inventory(net)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.base.requires_grad_(True),
        lambda net: net.base.eval(),
        lambda net: setattr(net, "factor", nn.Parameter(torch.ones(3))),
        lambda net: net.double(),
        lambda net: net.register_buffer("more", torch.ones(1)),
    ],
    ids=["trained", "mode", "shape", "dtype", "more"],
)
def test_modules_that_differ_in_form_are_told_apart(change):
    assert changed(lambda net: None).form == Inventory(nets(1)[0]).form
    assert changed(change).form != changed(lambda net: None).form


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.base.requires_grad_(True),
        lambda net: net.base.eval(),
        lambda net: setattr(net, "factor", nn.Parameter(torch.ones(2))),
        lambda net: setattr(net, "shift", torch.ones(())),
        lambda net: setattr(net, "base", nn.Linear(3, 2)),
        lambda net: net.base.register_buffer("more", torch.ones(1)),
    ],
    ids=["trained", "mode", "parameter", "buffer", "child", "more"],
)
def test_an_inventory_notices_that_its_module_has_changed(change):
    net = nets(1)[0]
    inventory = Inventory(net)
    assert inventory.is_current()
    change(net)
    assert not inventory.is_current()
    assert Part.of(net.loss_of, (batch_of(0),), known=inventory).inventory is not inventory


def test_parts_differ_by_method_shapes_and_what_else_lies_in_the_batch():
    net = nets(1)[0]
    batches = [batch_of(0), batch_of(1), batch_of(0, size=3), {**batch_of(0), "unit": "cm"}, {**batch_of(0), "z": 1}]
    forms = [Part.of(net.loss_of, (batch,)).form() for batch in batches]
    assert forms[0] == forms[1]
    assert len({forms[0], *forms[2:], Part.of(net.rows, (batches[0],)).form()}) == 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Part.of(net.loss_of, (batches[0],)).form() != forms[0]


def test_what_would_go_wrong_unseen_is_an_obstacle():
    (net,) = nets(1)
    assert Part.of(net.loss_of, (batch_of(0),)).obstacle() is None
    assert "holds a object" in Part.of(net.loss_of, ({"x": object()},)).obstacle()
    with torch.autocast("cpu", dtype=torch.float16):
        assert "float16" in Part.of(net.loss_of, (batch_of(0),)).obstacle()
    net.norm = nn.BatchNorm1d(2)
    assert "`norm` (BatchNorm1d) keeps running statistics" in Part.of(net.loss_of, (batch_of(0),)).obstacle()
    net.norm.eval()
    assert Part.of(net.loss_of, (batch_of(0),)).obstacle() is None
