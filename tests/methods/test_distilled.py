"""Methods with a public set against numbers worked out by hand; `numbers` says in which federation.

On the public example x = 1 a model's logits are (0, z), z = h = 2 p, and dz/dP = dz/dQ = 1.
"""

import pytest
import torch

from lightning_pfl import methods
from lightning_pfl.callbacks.prototype_distillation import PrototypeDistillation
from lightning_pfl.callbacks.public_distillation import PublicDistillation
from lightning_pfl.callbacks.selective_transfer import SelectiveTransfer
from lightning_pfl.federation import Client
from lightning_pfl.types import FlatTensors, Personalized, SharedTensors
from tests.methods.numbers import (
    NUMBER,
    AtTheFirstStep,
    Number,
    OtherNumber,
    adam,
    near,
    public_batches,
    public_logits,
    run,
    sigmoid,
    trained,
)

SEEN = AtTheFirstStep.seen


def test_perada_teaches_the_mean_the_mean_of_predictions_and_pulls_to_what_it_has_become(tmp_path):
    method = methods.perada(NUMBER, batches=public_batches, logits=public_logits, strength=1.0, lr=0.02, epochs=3)

    strategy, _ = run(tmp_path, method, callbacks=[AtTheFirstStep("shared")])

    # Round 1 is Ditto's: w = v = .1, .3. The mean adapter by examples is .25, whose logit is .5; the mean of the
    # logits .2 and .6, which counts clients alike, is .4.
    w = adam(0.25, lambda p: sigmoid(2 * p) - sigmoid(0.4), steps=3, lr=0.02)
    assert [SEEN["shared", client, 1] for client in "ab"] == near(w, w)
    # w steps on, and v from .1 and .3 with a pull towards w as it had become
    assert trained(strategy, "P.shared") == near(w - 0.1 * (2 * w - 1), w - 0.1 * (2 * w - 3))
    assert trained(strategy) == near(0.1 - 0.1 * (0.2 - 1 + 0.1 - w), 0.3 - 0.1 * (0.6 - 3 + 0.3 - w))


def teach(callbacks, tensors, *, shared, default=0.0):
    """A module whose adapters are set and that has learned what has come."""
    module = Number()
    for callback in callbacks:
        callback.prepare_server(module, global_branch=False)
    fc = module.blocks[0]["fc"]
    for name, value in (("shared", shared), ("default", default)):
        for letter in "PQ":
            if name in getattr(fc, f"colora_{letter}"):
                getattr(fc, f"colora_{letter}")[name].data.fill_(value)
    public = callbacks[1]
    public.receive(module, Personalized(start=SharedTensors(FlatTensors.pack(tensors))))
    public.on_train_start(None, module)
    return {
        f"{letter}.{name}": value.item() for letter in "PQ" for name, value in getattr(fc, f"colora_{letter}").items()
    }, module


@pytest.mark.parametrize(("target", "temperature"), [(0.9, 1.0), (0.1, 1.0), (0.1, 3.0)])
def test_distillation_steps_towards_the_mean_logits_and_trains_nothing_else(target, temperature):
    method = methods.perada(
        NUMBER, batches=public_batches, logits=public_logits, lr=0.05, epochs=3, temperature=temperature
    )

    found, module = teach(method.callbacks, {"public/2/logits": torch.tensor([[0.0, target]])}, shared=0.25)

    def gradient(p):  # of the divergence in z, times dz/dP
        return temperature * (sigmoid(2 * p / temperature) - sigmoid(target / temperature))

    expected = adam(0.25, gradient, steps=3, lr=0.05)
    assert [found["P.shared"], found["Q.shared"]] == near(expected, expected)
    assert found["P.default"] == found["Q.default"] == 0.0
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("rows", [0, 3])
def test_logits_of_another_public_set_are_refused(rows):
    method = methods.perada(NUMBER, batches=public_batches, logits=public_logits)

    with pytest.raises(ValueError, match=f"have {rows} rows, but this client's public set gives 1"):
        teach(method.callbacks, {"public/2/logits": torch.zeros(rows, 2)}, shared=0.0)


def test_takfl_adds_the_mean_of_what_each_architecture_teaches(tmp_path):
    clients = [
        Client("a", num_examples=1),
        Client("b", num_examples=3),
        Client("c", model=OtherNumber, num_examples=1),
    ]
    method = methods.takfl(
        NUMBER,
        batches=public_batches,
        logits=public_logits,
        lr=0.05,
        epochs=3,
        temperature=3.0,
        self_weight=0.5,
        self_temperature=20.0,
    )

    run(tmp_path, method, clients=clients, callbacks=[AtTheFirstStep("default")])

    # Round 1: p = .1, .3 and .1; the mean by examples is (.1 + 3 * .3 + .1) / 5 = .22, whose logit is .44.
    # The teachers are a and b together, (.2 + .6) / 2 = .4, and c, .2. Each is learned from .22 anew.
    def towards(teacher):
        def gradient(p):
            learned = 3 * (sigmoid(2 * p / 3) - sigmoid(teacher / 3))
            return learned + 0.5 * 20 * (sigmoid(2 * p / 20) - sigmoid(0.44 / 20))

        return adam(0.22, gradient, steps=3, lr=0.05) - 0.22

    expected = 0.22 + (towards(0.4) + towards(0.2)) / 2
    assert abs(towards(0.4) - towards(0.2)) > 0.01  # the order of learning and adding matters
    assert [SEEN["default", client, 1] for client in "abc"] == near(*[expected] * 3)


def graded(module, batch):
    """Of the public example the truth is 2."""
    h = module(batch)
    return (h - 2.0).square()[:, 0] / 2, public_logits(module, batch)


def test_fedmkt_learns_only_from_who_knows_better_by_way_of_a_model_of_all(tmp_path):
    method = methods.fedmkt(NUMBER, batches=public_batches, outputs=graded, lr=0.1, epochs=2, label_weight=0.75)

    strategy, _ = run(tmp_path, method, callbacks=[AtTheFirstStep("default"), AtTheFirstStep("shared")])

    # Round 1: p = .1 and .3, whose losses are (2 - .2)^2 / 2 = 1.62 and (2 - .6)^2 / 2 = .98: b teaches.
    # The model of all is at 0, loss 2, and learns from b, whose logit is .6; a learns from it, b does not.
    def gradient(teacher):
        return lambda p: 0.75 * (2 * p - 2) + 0.25 * (sigmoid(2 * p) - sigmoid(teacher))

    everybodys = adam(0.0, gradient(0.6), steps=2, lr=0.1)
    assert 0.98 < (2 - 2 * everybodys) ** 2 / 2 < 1.62
    a = adam(0.1, gradient(2 * everybodys), steps=2, lr=0.1)
    assert [SEEN["shared", client, 1] for client in "ab"] == near(everybodys, everybodys)
    assert [SEEN["default", client, 1] for client in "ab"] == near(a, 0.3)
    assert trained(strategy) == near(a - 0.1 * (2 * a - 1), 0.3 - 0.1 * (0.6 - 3))
    assert strategy.traffic["a"].up == 2 * 3 * 4  # two logits and a loss a round, and nothing of an adapter


def test_fedmkt_of_clients_that_know_no_better_changes_nothing():
    method = methods.fedmkt(NUMBER, batches=public_batches, outputs=graded)
    lesson = {"public/2/logits": torch.tensor([[0.0, 5.0]]), "public/2/losses": torch.tensor([1.0])}

    found, _ = teach(method.callbacks, lesson, shared=0.9, default=0.95)  # losses .02 and .005

    assert (found["P.shared"], found["P.default"]) == pytest.approx((0.9, 0.95))


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="at least one epoch and a learning rate above 0, but got epochs=0"):
        PublicDistillation(public_batches, public_logits, epochs=0)
    with pytest.raises(ValueError, match="temperature of distillation must be above 0, but is 0"):
        PublicDistillation(public_batches, public_logits, temperature=0)
    with pytest.raises(ValueError, match=r"`self_weight` at least 0, but got .*self_weight=-1"):
        PrototypeDistillation(public_batches, public_logits, self_weight=-1)
    with pytest.raises(ValueError, match="0 to 1, but is 2"):
        SelectiveTransfer(public_batches, graded, label_weight=2)
