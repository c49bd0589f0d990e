"""Methods with two adapters against numbers worked out by hand; `numbers` says in which federation."""

import torch

from lightning_pfl import methods
from lightning_pfl.federation.turn import unpack_state
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.tiny import ClientsOwnData, Late
from tests.methods.numbers import NUMBER, WANTED, answers, half_square, near, run, sigmoid, trained
from tests.methods.test_runs import SMALL


def test_ditto_pulls_the_kept_adapter_to_the_received_mean_and_sends_the_other(tmp_path):
    strategy, module = run(tmp_path, methods.ditto(NUMBER, strength=1.0))

    assert trained(strategy, "P.shared") == near(0.3, 0.5)  # FedAvg's
    # from .1 and .3, towards .25: a: .1 - .1 ((.2 - 1) + (.1 - .25)); b: .3 - .1 ((.6 - 3) + (.3 - .25))
    assert trained(strategy) == near(0.195, 0.535)
    assert answers(strategy, module) == near(0.39, 1.07)


def test_fedsim_trains_the_sum_and_averages_one_part(tmp_path):
    strategy, module = run(tmp_path, methods.fedsim(NUMBER))

    # u = .25 and v = .1, .3: a errs by .5 + .2 - 1, b by .5 + .6 - 3, and both parts take a tenth of it
    assert trained(strategy, "P.shared") == near(0.28, 0.44)
    assert trained(strategy) == near(0.13, 0.49)
    assert answers(strategy, module) == near(0.8 + 0.26, 0.8 + 0.98)  # u: (.28 + 3 * .44) / 4 = .4


def test_feddpa_trains_the_kept_adapter_beside_the_received_mean_and_then_the_shared_one_alone(tmp_path):
    strategy, module = run(tmp_path, methods.feddpa(NUMBER, weight=0.5), steps=2)

    # Round 1 trains G alone: .1, then .18; .3, then .54. The mean is (.18 + 3 * .54) / 4 = .45.
    # Round 2: h = G + L, so L steps by .1 * .5 * (1 - .45) and .05 * (3 - .45);
    #          then G alone from .45: .45 - .1 (.9 - 1) and .45 - .1 (.9 - 3)
    assert trained(strategy) == near(0.0275, 0.1275)
    assert trained(strategy, "P.shared") == near(0.46, 0.66)
    assert answers(strategy, module) == near(0.61 + 0.0275, 0.61 + 0.1275)  # (.46 + 3 * .66) / 4 = .61


def test_feddpa_of_an_odd_turn_gives_the_kept_adapter_the_smaller_half(tmp_path):
    strategy, _ = run(tmp_path, methods.feddpa(NUMBER), steps=3)

    # Round 1, G: .1, .18, .244 and .3, .54, .732, mean .61. Round 2: one step of L, .05 * (y - .61), two of G.
    assert trained(strategy) == near(0.0195, 0.1195)
    assert trained(strategy, "P.shared") == near(0.5704, 0.9304)


def test_feddat_adds_each_others_predictions_to_the_labels(tmp_path):
    method = methods.feddat(NUMBER, outputs=half_square, alpha=3.0, beta=0.5, temperature=2.0)

    strategy, module = run(tmp_path, method)

    # Logits are (0, z). The divergence's gradient in z of the student is T (sigmoid(z / T) - sigmoid(t / T)).
    # Round 1: all z are 0: s = .1, .3; the dual model is h = G + L, so L takes half steps: .05, .15.
    # Round 2: s = G = .25, so z_s = .5, and z_d = .25 + L = .3 and .4.
    dual = {"a": 0.3, "b": 0.4}
    apart = {client: 2 * (sigmoid(0.5 / 2) - sigmoid(z / 2)) for client, z in dual.items()}
    shared = {client: 0.25 - 0.1 * ((0.5 - WANTED[client]) + 3.0 * apart[client]) for client in "ab"}
    kept = {
        client: dual[client] - 0.25 - 0.05 * ((z - WANTED[client]) - 0.5 * apart[client]) for client, z in dual.items()
    }
    assert trained(strategy, "P.shared") == near(*shared.values())
    assert trained(strategy) == near(*kept.values())
    mean = (shared["a"] + 3 * shared["b"]) / 4
    assert answers(strategy, module) == near(mean + kept["a"], mean + kept["b"])


def test_two_adapters_in_a_model_that_is_built_for_each_client(tmp_path):
    """`configure_model` builds by the client's id, so the second adapter must come in each turn before the restore."""
    method = methods.ditto(SMALL)
    strategy = strategy_of(["a", "wide"], share=(), aggregator=method.aggregator, local_steps=2)
    module = Late()

    trainer_of(tmp_path, strategy, max_epochs=2, callbacks=[*method.callbacks]).fit(module, datamodule=ClientsOwnData())

    for client, width in (("a", 8), ("wide", 12)):
        state = unpack_state(strategy.store.get(client))["state_dict"]
        kept, shared = (state[f"blocks.0.fc.colora_B.{name}"] for name in ("default", "shared"))
        assert kept.shape == shared.shape == (width, 2)
        assert kept.any()
        assert shared.any()
        assert not torch.equal(kept, shared)
