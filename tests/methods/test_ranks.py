"""Methods of products and ranks against numbers worked out by hand; `numbers` says in which federation."""

from functools import partial
from typing import ClassVar

import pytest
import torch

from lightning_pfl import methods
from lightning_pfl.callbacks.rank_limit import RankLimit
from lightning_pfl.federation import Client
from lightning_pfl.federation.turn import unpack_state
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.tiny import Blocks, ClientsOwnData
from tests.methods.numbers import NUMBER, PLAIN, WANTED, answers, near, run, trained
from tests.methods.test_runs import SMALL


def update(client, *, num_examples=1, A, B):
    bound = {"0.A": torch.tensor(A), "0.B": torch.tensor(B)}
    shared = SharedTensors(FlatTensors.pack({"P": torch.zeros(1)}), FlatTensors.pack(bound))
    return ClientUpdate(client, 0, num_examples, "one", shared)


UPDATES = [update("a", A=[[1.0]], B=[[2.0]]), update("b", num_examples=3, A=[[3.0]], B=[[4.0]])]


def test_flexlora_averages_what_factors_compute():
    """B A is 2 * 1 and 4 * 3; one to three gives (2 + 36) / 4, where factors would give 3.5 * 2.5."""
    sent = methods.flexlora(NUMBER).aggregator.aggregate(UPDATES, {}).personalized["a"].start

    tensors = sent.same_architecture.unpack()
    assert (tensors["0.B"] @ tensors["0.A"]).item() == pytest.approx(9.5)


def test_flexlora_of_unequal_ranks_sends_the_largest_singular_values_first():
    """B A is diag(1, 8) and diag(3, 0): the mean diag(2, 4) has its second direction first."""
    eye = [[1.0, 0.0], [0.0, 1.0]]
    updates = [
        update("a", A=eye, B=[[1.0, 0.0], [0.0, 8.0]]),
        update("b", A=eye, B=[[3.0, 0.0], [0.0, 0.0]]),
    ]

    method = methods.flexlora(NUMBER, ranks={"a": 1, "b": 2})
    sent = method.aggregator.aggregate(updates, {}).personalized["a"].start.same_architecture.unpack()

    cut = sent["0.B"][:, :1] @ sent["0.A"][:1]
    torch.testing.assert_close(cut, torch.tensor([[0.0, 0.0], [0.0, 4.0]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(sent["0.B"] @ sent["0.A"], torch.tensor([[2.0, 0.0], [0.0, 4.0]]), atol=1e-5, rtol=0)
    assert method.callbacks[1].ranks == {"a": 1, "b": 2}


def test_hetlora_weighs_by_the_norm_of_the_product():
    """B A is 2 * 1 and 4 * 3, P is 0, so the weights are 2 : 12 whatever the numbers of examples."""
    sent = methods.hetlora(NUMBER, ranks={"a": 1, "b": 1}).aggregator.aggregate(UPDATES, {}).personalized["a"].start

    tensors = sent.same_architecture.unpack()
    assert tensors["0.A"].item() == pytest.approx((2 * 1 + 12 * 3) / 14)
    assert tensors["0.B"].item() == pytest.approx((2 * 2 + 12 * 4) / 14)


def test_hetlora_clients_train_and_receive_no_more_than_their_rank(tmp_path):
    method = methods.hetlora(SMALL, ranks={"a": 1, "b": 2}, decay=1.0)
    strategy = strategy_of(list("ab"), share=(), aggregator=method.aggregator, local_steps=2)
    module = Blocks()

    trainer_of(tmp_path, strategy, max_epochs=2, callbacks=[*method.callbacks]).fit(module, datamodule=ClientsOwnData())

    cut = {"A": (slice(1, None),), "B": (slice(None), slice(1, None)), "P": (slice(1, None),), "Q": (slice(1, None),)}
    states = {client: strategy.personalize(module, client).state_dict() for client in "ab"}
    stored = {client: unpack_state(strategy.store.get(client))["state_dict"] for client in "ab"}
    for name, layer in (("A", 0), ("B", 0), ("P", 1), ("Q", 1)):
        key = f"blocks.{layer}.fc.colora_{name}.default"
        for found in (states, stored):
            assert not found["a"][key][cut[name]].any()
            assert found["b"][key][cut[name]].any()
            assert found["a"][key].any()
    assert not states["a"]["blocks.1.fc.colora_P.default"][:, 1:].any()


TWO_RANKS = partial(PLAIN, rank=2, alpha=2)  # h = B_1 A_1 + B_2 A_2


def one_client(tmp_path, *, rounds, penalty):
    """Client a alone: what it has of A and B after its last turn, and its rank."""
    method = methods.hetlora(TWO_RANKS, ranks={"a": 2}, decay=0.5, penalty=penalty)
    strategy, module = run(tmp_path, method, clients=[Client("a")], rounds=rounds)
    state = unpack_state(strategy.store.get("a"))["state_dict"]
    found = [state[f"blocks.0.fc.colora_{letter}.default"].flatten().tolist() for letter in "AB"]
    return found, int(state["colora_rank"]), answers(strategy, module, "a")


def by_hand(A, B, *, penalty):
    """One step towards 1 with the tail, the second rank, penalised by |B_2| |A_2|."""
    error = B[0] * A[0] + B[1] * A[1] - 1
    sign_A, sign_B = (1 if A[1] > 0 else -1), (1 if B[1] > 0 else -1) if B[1] else 0
    new_A = [A[0] - 0.1 * error * B[0], A[1] - 0.1 * (error * B[1] + penalty * sign_A * abs(B[1]))]
    new_B = [B[0] - 0.1 * error * A[0], B[1] - 0.1 * (error * A[1] + penalty * sign_B * abs(A[1]))]
    return new_A, new_B


def test_hetlora_clients_give_up_the_ranks_that_have_become_smaller_in_a_turn(tmp_path):
    (A, B), rank, _ = one_client(tmp_path / "one", rounds=1, penalty=2.0)
    start, _ = A, B  # B is 0 in the first step, so A does not move
    assert [near(*start), near(*(0.1 * a for a in start))] == [A, B]
    assert rank == 0  # the tail has grown from 0: nothing is given up

    new_A, new_B = by_hand(A, B, penalty=2.0)
    assert abs(new_A[1] * new_B[1]) < abs(A[1] * B[1])
    (A, B), rank, (h,) = one_client(tmp_path / "two", rounds=2, penalty=2.0)

    assert [near(new_A[0], 0.0), near(new_B[0], 0.0)] == [A, B]
    assert rank == 1
    assert h == pytest.approx(new_A[0] * new_B[0])


def test_hetlora_clients_keep_what_grows(tmp_path):
    (A, B), _, _ = one_client(tmp_path / "one", rounds=1, penalty=0.5)
    new_A, new_B = by_hand(A, B, penalty=0.5)
    assert abs(new_A[1] * new_B[1]) > abs(A[1] * B[1])

    found, rank, _ = one_client(tmp_path / "two", rounds=2, penalty=0.5)

    assert found == [near(*new_A), near(*new_B)]
    assert rank == 0


def test_ranks_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"must be at least 1, but is \{'a': 0\}"):
        RankLimit({"a": 0})
    with pytest.raises(ValueError, match=r"above 0 and at most 1.*they are 0 and 0"):
        RankLimit({"a": 1}, decay=0)
    with pytest.raises(ValueError, match="must not be negative, but they are 1 and -1"):
        RankLimit({"a": 1}, decay=1, penalty=-1)


def test_flora_adds_every_rounds_mean_and_begins_anew(tmp_path):
    strategy, module = run(tmp_path, methods.flora(NUMBER))

    # Round 1 is FedAvg's: .1, .3, so G = .25. Round 2, h = .5 + 2 L with L from 0: .1 (1 - .5), .1 (3 - .5)
    assert trained(strategy) == near(0.05, 0.25)
    assert answers(strategy, module) == near(0.9, 0.9)  # twice .25 + (.05 + 3 * .25) / 4


def test_flora_adds_products_of_factors_that_are_drawn_anew(tmp_path):
    one, _ = run(tmp_path / "one", methods.flora(PLAIN), rounds=1)
    strategy, module = run(tmp_path / "two", methods.flora(PLAIN))

    # Round 1: both have the same A, and B_k = .1 y_k A. G = (.1 A^2 + 3 * .3 A^2) / 4.
    (A, same), B = trained(one, "A.default"), trained(one, "B.default")
    assert same == A
    assert near(0.1 * A, 0.3 * A) == B
    G = 0.25 * A * A
    # Round 2: h = G, so B_k = .1 (y_k - G) A_k, with an A_k of their own
    new_A, new_B = trained(strategy, "A.default"), trained(strategy, "B.default")
    assert len({A, *new_A}) == 3
    assert new_B == near(*(0.1 * (WANTED[client] - G) * a for client, a in zip("ab", new_A, strict=True)))
    total = G + (new_B[0] * new_A[0] + 3 * new_B[1] * new_A[1]) / 4
    assert answers(strategy, module) == near(total, total)


class Counting(Blocks):
    """Says how many steps Adam believes it has taken."""

    seen: ClassVar = []

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(max((int(state["step"]) for state in optimizer.state.values()), default=0))


def test_flora_clients_begin_with_a_new_optimizer_and_a_sum_of_any_rank(tmp_path):
    method = methods.flora(SMALL, ranks={"a": 1, "b": 2})
    strategy = strategy_of(list("ab"), share=(), aggregator=method.aggregator, local_steps=2)
    module = Counting()
    Counting.seen.clear()

    trainer_of(tmp_path, strategy, max_epochs=3, callbacks=[*method.callbacks]).fit(module, datamodule=ClientsOwnData())

    assert Counting.seen == [0, 1] * 6
    state = unpack_state(strategy.store.get("b"))["state_dict"]
    assert state["blocks.0.fc.colora_global_A.default"].shape == (2 * 2 * 2, 8)  # two rounds, two clients, two ranks
    own = strategy.personalize(module, "a").blocks[0]["fc"]
    assert own.colora_global_A["default"].shape == (8, 8)  # twelve ranks of a square of eight
    assert not own.colora_B["default"].any()
    assert own.delta_weight("default")[0].any()
