"""What the server remembers of clients between rounds, and for how long."""

import weakref

import torch

from lightning_pfl.federation import ClientStore
from lightning_pfl.federation.server_state import ServerState
from lightning_pfl.types import Aggregation, FlatTensors, Personalized, SharedTensors


def answer_to(*clients):
    sent = Personalized(start=SharedTensors(FlatTensors.pack({"P": torch.ones(4)})))
    weights = torch.full((len(clients), len(clients)), 1 / len(clients))
    return Aggregation(dict.fromkeys(clients, sent), Personalized(), {}, clients, weights), weakref.ref(sent)


def test_what_a_client_received_long_ago_is_not_kept_for_it():
    """Clients that sit out must not cost the server a model each."""
    state = ServerState(["a", "b"], ClientStore())
    first, old = answer_to("a", "b")
    state.accept(0, first)
    state.next_for("a", round=1)
    state.next_for("b", round=1)
    del first

    second, current = answer_to("a", "b")
    state.accept(1, second)
    state.next_for("a", round=2)
    del second

    assert old() is None  # though `b` has received nothing since
    assert current() is not None
    state.store.close()


def test_what_a_client_has_already_is_not_sent_again():
    state = ServerState(["a", "b"], ClientStore())
    state.accept(0, answer_to("a", "b")[0])
    for _ in range(2):
        state.next_for("a", round=1)
    assert (state.traffic["a"].down, state.traffic["b"].down) == (16, 0)
    state.accept(1, answer_to("a", "b")[0])
    state.next_for("a", round=2)
    assert state.traffic["a"].down == 32
    state.store.close()
