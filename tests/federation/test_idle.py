"""A client that has nothing to train on in a round does not count in it, whatever the rule."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_pfl import methods
from lightning_pfl.errors import FederationError
from lightning_pfl.federation import Client
from tests.federation.test_strategy import FixedSketch
from tests.methods.numbers import NUMBER, WANTED, near, run, trained

CLIENTS = [Client("a", num_examples=1), Client("b", num_examples=3), Client("c")]


class Streams(L.LightningDataModule):
    """Two examples per client and round, and none from a round on for those that are named."""

    def __init__(self, **ends):
        super().__init__()
        self.ends = ends

    def train_dataloader(self):
        strategy = self.trainer.strategy
        count = 0 if strategy.round >= self.ends.get(strategy.client_id, 99) else 2
        wanted = torch.full((count, 1), WANTED[strategy.client_id])
        return DataLoader(TensorDataset(torch.ones(count, 1), wanted), batch_size=1)


def test_a_client_without_data_does_not_move_the_average(tmp_path):
    strategy, _ = run(tmp_path, methods.fedavg(NUMBER), clients=CLIENTS, data=Streams(c=0))

    assert trained(strategy) == near(0.3, 0.5)  # as of a and b alone, whose mean is .25
    assert [(one.round, one.client_id) for one in strategy.left_out] == [(0, "c"), (1, "c")]
    assert "had nothing to train on" in strategy.left_out[0].reason


def test_a_client_that_runs_out_of_data_leaves_the_mean_of_those_that_train(tmp_path):
    """In round 1 c is at 1 too, so that it would be seen if it sent what it had received."""
    strategy, _ = run(tmp_path, methods.fedavg(NUMBER), clients=CLIENTS, data=Streams(c=1), rounds=3)

    # Round 1, c counts 2 examples: (.1 + 3 * .3 + 2 * .1) / 6 = .2. Round 2: a .26, b .46, mean .41 without c
    # Round 3: .41 - .1 (.82 - 1), .41 - .1 (.82 - 3)
    assert trained(strategy) == near(0.428, 0.628)


def test_a_number_that_the_user_has_given_does_not_make_a_client_count_that_has_not_trained(tmp_path):
    clients = [*CLIENTS[:2], Client("c", num_examples=100)]
    strategy, _ = run(tmp_path, methods.fedavg(NUMBER), clients=clients, data=Streams(c=0))

    assert trained(strategy) == near(0.3, 0.5)


def test_a_mixture_does_not_hold_who_has_never_trained_and_holds_the_last_of_who_has(tmp_path):
    never, _ = run(tmp_path / "0", methods.uniform(NUMBER), clients=CLIENTS, data=Streams(c=0))
    # L = .05, .15; G is the other one's
    assert trained(never) == near(0.05 + 0.05 * 0.8, 0.15 + 0.05 * 2.8)

    once, _ = run(
        tmp_path / "1", methods.ours(NUMBER), clients=CLIENTS, data=Streams(c=1), rounds=3, callbacks=[FixedSketch()]
    )
    assert [one.round for one in once.left_out] == [1, 2]
    assert once.relevance[-1].client_ids == ("a", "b", "c")


def test_a_round_in_which_nobody_has_data_ends_the_run_and_says_why(tmp_path):
    everybody = Streams(a=1, b=1, c=1)

    with pytest.raises(FederationError, match=r"`a`.*had nothing to train on"):
        run(tmp_path, methods.fedavg(NUMBER), clients=CLIENTS, data=everybody)
