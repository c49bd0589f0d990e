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


def test_ours_trains_beside_what_the_others_have_sent(tmp_path):
    """With one other client its row is that client's, whatever the cosines; `uniform` does the same."""
    strategy, _ = run(tmp_path, methods.ours(NUMBER), callbacks=[FixedSketch()])

    assert trained(strategy) == near(0.05 + 0.05 * 0.8, 0.15 + 0.05 * 2.8)


def test_without_co_lora_only_clients_of_one_architecture_exchange(tmp_path):
    clients = [Client("a"), Client("b"), Client("c", model=OtherNumber)]
    strategy, _ = run(tmp_path, methods.no_colora(NUMBER), clients=clients, callbacks=[FixedSketch()])

    # A is the same for a and b, and half of h is L: B = .1 * .5 * y A. Then G is the other one's, h = (B_G + B_L) A / 2
    # and L steps by .05 (y - h) A. A itself has moved by .05 (y - h) B from its start.
    one, _ = run(tmp_path, methods.no_colora(NUMBER), clients=clients, callbacks=[FixedSketch()], rounds=1)
    (A, same), B = trained(one, "A.default"), trained(one, "B.default")
    assert same == A
    assert near(0.05 * A, 0.15 * A) == B
    h = (B[0] + B[1]) * A / 2
    assert trained(strategy, "B.default") == near(B[0] + 0.05 * (1 - h) * A, B[1] + 0.05 * (3 - h) * A)
    assert trained(strategy, "A.default") == near(A + 0.05 * (1 - h) * B[0], A + 0.05 * (3 - h) * B[1])
    # c is alone: G is its own last upload, so h = B A
    (A,), (B,) = trained(one, "A.default", "c"), trained(one, "B.default", "c")
    assert trained(strategy, "B.default", "c") == near(B + 0.05 * (1 - B * A) * A)
    assert methods.no_colora(partial(NUMBER, aligned="bases.safetensors")).callbacks[0].aligned is None


def update(client, p, sketch):
    return ClientUpdate(client, 0, 1, "one", SharedTensors(FlatTensors.pack({"P": torch.tensor([p])})), sketch)


SKETCHES = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0, 1.0]), "c": torch.tensor([0.0, 1.0])}
UPDATES = [update(client, p, SKETCHES[client]) for client, p in zip("abc", (1.0, 2.0, 4.0), strict=True)]


def frozen_of_a(method):
    return method.aggregator.aggregate(UPDATES, {}).personalized["a"].frozen.common.vector.item()


def test_ours_standardises_rows_and_the_papers_does_not():
    """The cosines of a with b and c are .7071 and 0."""
    ours, paper = (frozen_of_a(method(NUMBER)) for method in (methods.ours, methods.paper))

    # standardised they are 1 and -1, so exp(2) : exp(-2); plain exp(1.4142) : 1
    assert ours == pytest.approx((2 * exp(2) + 4 * exp(-2)) / (exp(2) + exp(-2)))
    assert paper == pytest.approx((2 * exp(2**0.5) + 4) / (exp(2**0.5) + 1))
    assert frozen_of_a(methods.unaligned(NUMBER)) == frozen_of_a(methods.no_colora(NUMBER)) == ours


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
    found = {round(frozen_of_a(methods.shuffled(NUMBER, seed=seed)), 5) for seed in range(8)}

    right, wrong = ((x * exp(2) + y * exp(-2)) / (exp(2) + exp(-2)) for x, y in ((2, 4), (4, 2)))
    assert found == {round(right, 5), round(wrong, 5)}  # of two others, a seed picks either


def test_the_oracle_counts_shared_tasks():
    tasks = {"a": ["x", "y"], "b": ["z"], "c": ["y"]}

    assert frozen_of_a(methods.oracle(NUMBER, tasks=tasks)) == 4.0


def test_an_unaligned_control_overrules_the_alignment():
    assert methods.unaligned(partial(NUMBER, aligned="bases.safetensors")).callbacks[0].aligned is None
