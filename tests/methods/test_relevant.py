"""Ours, the paper's setting, and ours with one part off, against numbers worked out by hand; see `numbers`."""

from functools import partial
from math import exp

import pytest
import torch

from lightning_pfl import methods
from lightning_pfl.adapters import Additive, InputGate, StaticGate
from lightning_pfl.federation import Client
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors
from tests.federation.test_strategy import FixedSketch
from tests.methods.numbers import NUMBER, OtherNumber, answers, near, run, trained


def test_the_control_without_exchange_has_its_own_last_upload_as_global_branch(tmp_path):
    strategy, module = run(tmp_path, methods.no_exchange(NUMBER))

    # the gate starts at a half: h = G + L. L: .05, .15; then G = L, so h = .1, .3
    assert trained(strategy) == near(0.05 + 0.05 * (1 - 0.1), 0.15 + 0.05 * (3 - 0.3))
    assert answers(strategy, module) == near(2 * 0.095, 2 * 0.285)  # G is L again, so the gate has no say


def test_the_control_with_an_empty_global_branch_sends_nothing_and_keeps_the_gate(tmp_path):
    strategy, _ = run(tmp_path, methods.zero_global(NUMBER))

    # h = L: .05, .15; then steps by .05 * (1 - .05) and .05 * (3 - .15)
    assert trained(strategy) == near(0.0975, 0.2925)
    # the gate's gradient is beta (1 - beta) (2 G - 2 L) (h - y), with G = 0
    assert trained(strategy, "gate.default") == near(-0.1 * 0.25 * 0.1 * 0.95, -0.1 * 0.25 * 0.3 * 2.85)
    assert strategy.traffic["a"].down == 0


def test_an_additive_gate_leaves_the_own_adapter_at_full_scale(tmp_path):
    strategy, _ = run(tmp_path, methods.zero_global(NUMBER, gate=StaticGate(Additive())))

    assert trained(strategy) == near(0.18, 0.54)  # local training's


def test_a_gate_that_reads_its_input_starts_as_the_static_one_and_moves_with_the_input(tmp_path):
    strategy, _ = run(tmp_path, methods.zero_global(NUMBER, gate=InputGate()))

    assert trained(strategy) == near(0.0975, 0.2925)
    # of the same gradient times the layer's input, which is 1
    assert trained(strategy, "gate.default") == near(-0.1 * 0.25 * 0.1 * 0.95, -0.1 * 0.25 * 0.3 * 2.85)


def test_uniform_relevance_gives_each_the_other_ones_upload(tmp_path):
    strategy, _ = run(tmp_path, methods.uniform(NUMBER))

    # G = .15 for a and .05 for b: h = .2 for both
    assert trained(strategy) == near(0.05 + 0.05 * 0.8, 0.15 + 0.05 * 2.8)


def test_a_uniform_warm_start_moves_the_own_adapter_too(tmp_path):
    strategy, _ = run(tmp_path, methods.uniform(NUMBER, warm_start=True))

    # L starts at .1 for both, G is .15 and .05: h = .25, .15
    assert trained(strategy) == near(0.1 + 0.05 * 0.75, 0.1 + 0.05 * 2.85)


def test_a_frozen_mixture_is_trained_beside(tmp_path):
    """With one other client its row is that client's, whatever the cosines; `uniform` does the same."""
    strategy, _ = run(tmp_path, methods.frozen_mixture(NUMBER), callbacks=[FixedSketch()])

    assert trained(strategy) == near(0.05 + 0.05 * 0.8, 0.15 + 0.05 * 2.8)


def test_ours_starts_half_way_to_what_the_other_has_sent(tmp_path):
    strategy, _ = run(tmp_path, methods.ours(NUMBER), callbacks=[FixedSketch()])

    # L: .1, .3, both pulled to .2, so h = 2 L = .4; then steps by .1 * (y - h), at full scale
    assert trained(strategy) == near(0.2 + 0.1 * 0.6, 0.2 + 0.1 * 2.6)


def test_a_pull_to_all_goes_to_the_mean_of_the_others(tmp_path):
    strategy, _ = run(tmp_path, methods.pulled_to_all(NUMBER, pull=0.25))

    # .1 and .3 a quarter of the way to each other: .15, .25, so h = .3, .5
    assert trained(strategy) == near(0.15 + 0.1 * 0.7, 0.25 + 0.1 * 2.5)


def test_without_co_lora_only_clients_of_one_architecture_exchange(tmp_path):
    clients = [Client("a"), Client("b"), Client("c", model=OtherNumber)]
    strategy, _ = run(tmp_path, methods.no_colora(NUMBER), clients=clients, callbacks=[FixedSketch()])

    # A is the same for a and b, and stays while B = 0: B = .1 y A. Then a's row gives itself a half and b a half, but
    # for the little that c has, whose B is of another architecture: what is left is scaled up
    one, _ = run(tmp_path, methods.no_colora(NUMBER), clients=clients, callbacks=[FixedSketch()], rounds=1)
    (A, same), B = trained(one, "A.default"), trained(one, "B.default")
    assert same == A
    assert near(0.1 * A, 0.3 * A) == B
    w = exp(4) / (exp(4) + exp(-4))
    mixed = [(own + w * other) / (1 + w) for own, other in ((B[0], B[1]), (B[1], B[0]))]
    errors = [y - start * A for y, start in zip((1, 3), mixed, strict=True)]
    assert trained(strategy, "B.default") == near(*(s + 0.1 * e * A for s, e in zip(mixed, errors, strict=True)))
    assert trained(strategy, "A.default") == near(*(A + 0.1 * e * s for s, e in zip(mixed, errors, strict=True)))
    # c is alone: nothing pulls it
    (A,), (B,) = trained(one, "A.default", "c"), trained(one, "B.default", "c")
    assert trained(strategy, "B.default", "c") == near(B + 0.1 * (1 - B * A) * A)
    assert methods.no_colora(partial(NUMBER, aligned="bases.safetensors")).callbacks[0].aligned is None


def update(client, p, sketch):
    return ClientUpdate(client, 0, 1, "one", SharedTensors(FlatTensors.pack({"P": torch.tensor([p])})), sketch)


SKETCHES = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0, 1.0]), "c": torch.tensor([0.0, 1.0])}
UPDATES = [update(client, p, SKETCHES[client]) for client, p in zip("abc", (1.0, 2.0, 4.0), strict=True)]


def frozen_of_a(method):
    return method.aggregator.aggregate(UPDATES, {}).personalized["a"].frozen.common.vector.item()


def start_of_a(method):
    return method.aggregator.aggregate(UPDATES, {}).personalized["a"].start.common.vector.item()


def half_way(first, second):
    """From a's 1 half of the way to a mixture of 2 and 4."""
    return 0.5 + 0.5 * (2 * first + 4 * second) / (first + second)


def test_ours_standardises_rows_and_the_papers_does_not():
    """The cosines of a with b and c are .7071 and 0."""
    # standardised they are 1 and -1, so exp(4) : exp(-4) at a quarter; plain exp(1.4142) : 1 at a half
    ours = half_way(exp(4), exp(-4))
    for method in (methods.ours, methods.unaligned):
        assert start_of_a(method(NUMBER)) == pytest.approx(ours)
    frozen = frozen_of_a(methods.frozen_mixture(NUMBER))
    assert frozen == pytest.approx((2 * exp(4) + 4 * exp(-4)) / (exp(4) + exp(-4)))
    assert frozen_of_a(methods.paper(NUMBER)) == pytest.approx((2 * exp(2**0.5) + 4) / (exp(2**0.5) + 1))


def test_the_papers_setting_can_count_the_client_itself_and_keeps_half_of_the_last_sketch():
    """With itself a's cosines are 1, .7071 and 0. Its second sketch turns it half of the way to c."""
    with_itself = frozen_of_a(methods.paper(NUMBER, include_self=True))

    assert with_itself == pytest.approx((exp(2) + 2 * exp(2**0.5) + 4) / (exp(2) + exp(2**0.5) + 1))
    method = methods.paper(NUMBER)
    state = method.aggregator.aggregate(UPDATES, {}).state
    later = method.aggregator.aggregate([update("a", 1.0, SKETCHES["c"])], state)
    row = later.similarity[0].tolist()  # of (.5, .5) with itself, (1, 1) and (0, 1)
    assert row == pytest.approx([1.0, 1.0, 0.5**0.5])
    sent = later.personalized["a"]
    assert sent.start is None
    assert method.aggregator.uses_global_branch


def test_random_relevance_is_as_concentrated_and_somebody_elses():
    found = {round(start_of_a(methods.shuffled(NUMBER, seed=seed)), 5) for seed in range(8)}

    right, wrong = half_way(exp(4), exp(-4)), half_way(exp(-4), exp(4))
    assert found == {round(right, 5), round(wrong, 5)}  # of two others, a seed picks either


def test_the_oracle_counts_shared_tasks():
    tasks = {"a": ["x", "y"], "b": ["z"], "c": ["y"]}

    assert start_of_a(methods.oracle(NUMBER, tasks=tasks)) == 0.5 + 0.5 * 4.0


def test_an_unaligned_control_overrules_the_alignment():
    assert methods.unaligned(partial(NUMBER, aligned="bases.safetensors")).callbacks[0].aligned is None
