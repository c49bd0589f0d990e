"""Rounds by files are the rounds that a `FederatedStrategy` runs, bit for bit."""

import contextlib

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pfl import (
    Client,
    FedAvg,
    FederatedStrategy,
    FederationError,
    LocalPool,
    RelevanceAggregator,
    UniformAggregator,
    load_from_checkpoint,
)
from lightning_pfl.parties import RemoteServer
from tests.federation.runs import assert_equal_states
from tests.federation.tiny import Blocks, ClientsOwnData
from tests.parties.wards import MODELS, OwnData, Run, callbacks, clients, colora, trainer

ROUNDS = 2


@pytest.mark.parametrize(
    ("rule", "sketches"),
    [(UniformAggregator, False), (RelevanceAggregator, True), (FedAvg, False)],
    ids=["uniform", "relevance", "fedavg"],
)
def test_rounds_by_files_equal_rounds_in_one_place(tmp_path, rule, sketches):
    """Three parties of two widths train by plain `trainer.fit`; nothing but files passes between them."""
    strategy = FederatedStrategy(clients(), aggregator=rule(), pool=LocalPool())
    there = trainer(tmp_path, max_epochs=ROUNDS, callbacks=callbacks(sketches=sketches), strategy=strategy)
    there.fit(module := Blocks(), OwnData("a"))
    run = Run(tmp_path, aggregator=rule(), global_branch=rule().uses_global_branch)

    for index in range(ROUNDS):
        for party in MODELS:
            run.train(party, index + 1, sketches=sketches)
            run.export(party)
        assert run.server().round().counted == tuple(MODELS)
        for party in MODELS:
            assert run.apply(party).round == index

    for party, model in MODELS.items():
        mine = load_from_checkpoint(model, run.checkpoint(party)).state_dict()
        expected = strategy.personalize(module, party).state_dict()
        assert_equal_states(dict(mine), dict(expected))
        assert any("colora_global" in name for name in mine) is rule().uses_global_branch


class Drawing(Blocks):
    """Dropout, so that the random stream shows; OneCycle, so that the horizon does."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout(0.3)

    def forward(self, x):
        return super().forward(self.dropout(x))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_parties_with_a_strategy_of_one_client_equal_one_federation(tmp_path):
    """With dropout, shuffling and a schedule over all rounds; and each party gives up waiting once a round."""

    def fit(name, strategy, module, *, again):
        folder = tmp_path / name
        keeps = ModelCheckpoint(dirpath=folder, save_last=True)
        mine = L.Trainer(
            max_epochs=ROUNDS,
            callbacks=[colora(), keeps],
            strategy=strategy,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
        )
        last = folder / "last.ckpt"
        mine.fit(module, ClientsOwnData(), ckpt_path=str(last) if again and last.exists() else None)
        return mine

    whole = FederatedStrategy([Client(party) for party in MODELS], aggregator=UniformAggregator(), pool=LocalPool())
    fit("whole", whole, module := Drawing(), again=False)
    run = Run(tmp_path, aggregator=UniformAggregator())
    waited = {party: 0 for party in MODELS}
    ended = {}

    for _ in range(ROUNDS + 1):
        for party in MODELS:
            remote = RemoteServer(run.mailbox, party, run.signer(party), timeout=0)
            strategy = FederatedStrategy([Client(party)], aggregator=remote, pool=LocalPool())
            with contextlib.suppress(FederationError):  # the server has not mixed this round yet
                waited[party] += 1
                ended[party] = fit(party, strategy, mine := Drawing(), again=True), mine
                waited[party] -= 1
        if not ended:
            run.server().round()

    assert waited == {party: ROUNDS for party in MODELS}
    for party, (mine, own) in ended.items():
        expected = whole.personalize(module, party).state_dict()
        assert_equal_states(dict(mine.strategy.personalize(own, party).state_dict()), dict(expected))
