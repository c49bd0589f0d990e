"""A client that took no part gets a model from the others by the sketch of its task; others come late, or leave."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pfl.adapters import adapter_state
from lightning_pfl.aggregation import FedAvg, LocalOnly, RelevanceAggregator
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.callbacks.federated import SketchSource
from lightning_pfl.callbacks.relevance_probe import RelevanceProbe
from lightning_pfl.errors import FederationError
from lightning_pfl.federation import Client
from lightning_pfl.federation.privacy import Privacy, PrivacyBudget
from lightning_pfl.federation.schedule import participants
from lightning_pfl.federation.turn import unpack_state
from lightning_pfl.functional.mechanisms import ClientNoise
from lightning_pfl.functional.relevance import Uniform
from lightning_pfl.relevance import GradientProbe
from tests.federation.runs import assert_equal_states, strategy_of, trainer_of
from tests.federation.tiny import Blocks, Late, Tiny, WideBlocks


class TwoTasks(L.LightningDataModule):
    """Clients `one-*` regress on one sum of the inputs, `two-*` on another; batches in a fixed order."""

    def loader(self, seed):
        client_id = self.trainer.strategy.client_id
        x = torch.randn(24, 4, generator=torch.Generator().manual_seed(seed + sum(map(ord, client_id))))
        y = x[:, :1] + x[:, 1:2] if client_id.startswith("one") else x[:, 2:3] - x[:, 3:]
        return DataLoader(TensorDataset(x, y), batch_size=4)

    def train_dataloader(self):
        return self.loader(0)

    def val_dataloader(self):
        return self.loader(10_000)


def loss(module, batch):
    return nn.functional.mse_loss(module(batch[0]), batch[1])


def probe(**arguments):
    torch.manual_seed(0)
    return RelevanceProbe(GradientProbe(nn.Linear(4, 1), loss, parameters=["weight"], size=64), **arguments)


def callbacks(**arguments):
    colora = CoLoRA(rank=2, alpha=4, num_blocks=1, target_modules=["fc"], train_also=["head"])
    return [colora, probe(every_n_steps=2, **arguments)]


def beside(**arguments):
    """Mixtures go into the frozen adapter, unless told otherwise."""
    return RelevanceAggregator(**{"pull": 0, "global_branch": True, **arguments})


def federation(**arguments):
    clients = [Client("one-a"), Client("one-b", model=WideBlocks), Client("two-a"), Client("two-b", model=WideBlocks)]
    return strategy_of(clients, share=(), aggregator=beside(**arguments))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two tasks, each on a narrow and on a wide model; three rounds."""
    strategy, folder = federation(), tmp_path_factory.mktemp("run")
    keep = ModelCheckpoint(folder, save_last=True)
    trainer = trainer_of(folder, strategy, enable_checkpointing=True, callbacks=[*callbacks(), keep])
    trainer.fit(Blocks(), datamodule=TwoTasks())
    return strategy, keep.last_model_path


def trained(strategy, client_id, name):
    return unpack_state(strategy.store.get(client_id))["state_dict"][name]


def test_a_clients_model_can_be_had_as_its_own_training_left_it(run):
    """Before the last round's answer G is what the client trained beside; after it, the mixture of what all sent."""
    strategy, _ = run
    name = "blocks.1.fc.colora_global_P.default"

    left = strategy.personalize(Blocks(), "one-a", aggregated=False).state_dict()
    answered = strategy.personalize(Blocks(), "one-a").state_dict()

    torch.testing.assert_close(left[name], trained(strategy, "one-a", name), rtol=0, atol=0)
    assert not torch.equal(answered[name], left[name])
    own = "blocks.1.fc.colora_P.default"
    torch.testing.assert_close(answered[own], left[own], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("client", "width"),
    [(Client("one-new"), 8), (Client("two-new", model=WideBlocks), 12), (Client("two-late", model=Late), 8)],
    ids=["default model", "own model", "built by configure_model"],
)
def test_a_newcomer_starts_from_the_clients_of_its_task_whatever_their_model(run, client, width):
    """G is the mixture of what the others have trained, by hand; L and the head are as at a first turn."""
    strategy, _ = run
    before = copy.deepcopy(strategy._state.aggregator)

    newcomer = strategy.personalize_new(client)

    relatives = {known: weight for known, weight in newcomer.weights.items() if known[:3] == client.id[:3]}
    assert sum(newcomer.weights.values()) == pytest.approx(1)
    assert sum(relatives.values()) > 0.8
    layer = newcomer.module.blocks[-1]["fc"]
    expected = sum(
        w * trained(strategy, known, "blocks.1.fc.colora_P.default") for known, w in newcomer.weights.items()
    )
    torch.testing.assert_close(layer.colora_global_P["default"], expected)
    assert layer.colora_global_P["default"].any()
    assert not layer.colora_P["default"].any()
    assert newcomer.module.head.weight.shape == (1, width)
    assert not newcomer.module.training
    alike = [known for known in newcomer.weights if known.endswith("a" if width == 8 else "b")]
    mass = sum(newcomer.weights[known] for known in alike)
    own = sum(
        newcomer.weights[known] / mass * trained(strategy, known, "blocks.0.fc.colora_B.default") for known in alike
    )
    torch.testing.assert_close(newcomer.module.blocks[0]["fc"].colora_global_B["default"], own)
    assert_equal_states(strategy._state.aggregator, before)


def test_its_sketch_is_the_one_that_its_first_turn_would_have_sent(run, tmp_path):
    """Six batches, every second of them sketched, nothing trained; the same bits as from a real turn."""
    strategy, _ = run
    sent = []
    strategy._rounds.welcome, welcome = lambda update: sent.append(update) or welcome(update), strategy._rounds.welcome
    try:
        strategy.personalize_new(Client("one-new", num_examples=7))
    finally:
        del strategy._rounds.welcome

    real = strategy_of([Client("one-new")], share=(), aggregator=beside())
    trainer_of(tmp_path, real, max_epochs=1, callbacks=callbacks()).fit(Blocks(), datamodule=TwoTasks())

    upload = real._state.aggregator["uploads"]["one-new"]
    assert torch.equal(sent[0].sketch, upload["sketch"])
    assert sent[0].architecture == upload["architecture"]
    assert (sent[0].num_examples, upload["num_examples"]) == (7, 24)
    assert sent[0].shared.common.layout.names == tuple(upload["common"]["names"])
    assert not sent[0].shared.common.vector.any()


def test_a_newcomer_of_ones_own_data_needs_no_client_id(run):
    """A datamodule of its own, as an instance, that knows nothing of federations."""

    class Own(L.LightningDataModule):
        def train_dataloader(self):
            x = torch.randn(24, 4, generator=torch.Generator().manual_seed(5))
            return DataLoader(TensorDataset(x, x[:, 2:3] - x[:, 3:]), batch_size=4)

    newcomer = run[0].personalize_new(Client("somebody", model=WideBlocks(), datamodule=Own()))

    assert newcomer.weights["two-a"] + newcomer.weights["two-b"] > 0.8


def test_a_newcomer_of_a_resumed_run_is_the_same_to_the_last_bit(run, tmp_path):
    """Evaluation from a checkpoint is enough to know what the others have learned."""
    strategy, path = run
    first = strategy.personalize_new(Client("two-new", model=WideBlocks)).module

    again = federation()
    trainer_of(tmp_path, again, callbacks=callbacks()).validate(
        Blocks(), datamodule=TwoTasks(), ckpt_path=path, verbose=False
    )
    second = again.personalize_new(Client("two-new", model=WideBlocks)).module

    assert_equal_states(adapter_state(second), adapter_state(first))


def test_an_ordinary_trainer_goes_on_with_a_newcomers_model(run, tmp_path):
    """The paper's protocol for unseen tasks: start from the mixture, then train on few steps; G stays as it came."""
    strategy, _ = run

    class Alone(TwoTasks):
        def loader(self, seed):
            x = torch.randn(24, 4, generator=torch.Generator().manual_seed(seed + 1))
            return DataLoader(TensorDataset(x, x[:, :1] + x[:, 1:2]), batch_size=4)

    module = strategy.personalize_new(Client("one-new")).module.train()
    before = {name: tensor.clone() for name, tensor in adapter_state(module).items()}
    trainer = L.Trainer(
        max_epochs=5, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks()[:1],
    )  # fmt: skip
    start = trainer.validate(module, Alone(), verbose=False)[0]["val_loss"]
    trainer.fit(module, Alone())
    end = trainer.validate(module, Alone(), verbose=False)[0]["val_loss"]

    assert end < 0.9 * start
    for name, tensor in adapter_state(module).items():
        assert torch.equal(tensor, before[name]) == ("global" in name or "basis" in name), name


def test_a_warm_start_fills_the_newcomers_own_adapter(tmp_path):
    strategy = federation(warm_start=Uniform(include_self=True), global_branch=False)
    trainer_of(tmp_path, strategy, callbacks=callbacks()).fit(Blocks(), datamodule=TwoTasks())

    layer = strategy.personalize_new(Client("one-new")).module.blocks[1]["fc"]

    names = ("one-a", "one-b", "two-a", "two-b")
    expected = sum(trained(strategy, known, "blocks.1.fc.colora_P.default") for known in names) / 4
    torch.testing.assert_close(layer.colora_P["default"].data, expected)
    assert not layer.has_global_branch("default")


def test_a_rule_without_mixtures_sends_what_it_has_for_everybody_and_says_so(tmp_path):
    """FedAvg's newcomer has the mean encoder; under LocalOnly it keeps its own."""
    for aggregator in (FedAvg(), LocalOnly()):
        strategy = strategy_of(["one-a", "two-a"], aggregator=aggregator)
        module = Tiny()
        trainer_of(tmp_path, strategy).fit(module, datamodule=TwoTasks())

        newcomer = strategy.personalize_new(Client("one-new"))

        expected = module if isinstance(aggregator, FedAvg) else Tiny()
        torch.testing.assert_close(newcomer.module.encoder.weight, expected.encoder.weight)
        assert torch.equal(newcomer.module.head.weight, Tiny().head.weight)
        assert newcomer.weights == {}
        assert newcomer.notes == (
            f"`{type(aggregator).__name__}` sends the same to every newcomer, whatever its task.",
        )


def test_a_newcomer_that_cannot_be_is_told_why(run, tmp_path):
    strategy, _ = run
    with pytest.raises(ValueError, match=r"`One-A` is a client of this run.*personalize\(module, 'One-A'\)"):
        strategy.personalize_new(Client("One-A"))
    with pytest.raises(FederationError, match="not known yet"):
        federation().personalize_new(Client("new"))
    narrow = strategy_of([Client("one-b", model=WideBlocks), Client("two-b", model=WideBlocks)], share=())
    trainer_of(tmp_path, narrow, max_epochs=1, callbacks=callbacks()).fit(Blocks(), datamodule=TwoTasks())
    with pytest.raises(ValueError, match=r"names no model.*Client\(..., model=...\)"):
        narrow.personalize_new(Client("new"))


class Silent(SketchSource):
    """Sketches of two tasks; clients called `...-silent` send none."""

    def take_sketch(self):
        return self.sketch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        client_id = trainer.strategy.client_id
        alike = torch.tensor([1.0, 0.0]) if client_id.startswith("one") else torch.tensor([0.0, 1.0])
        self.sketch = None if client_id.endswith("silent") else alike


def test_clients_that_come_late_leave_or_are_silent_through_a_whole_run(tmp_path):
    """A schedule in which one client is there in round 0 only and one from round 2 on, and a third never sketches."""
    ids = ("one-a", "one-left", "one-late", "two-a", "two-silent")

    def fits(seed):
        drawn = [participants(ids, fraction=0.6, seed=seed, round=index) for index in range(4)]
        return (
            ["one-left" in one for one in drawn] == [True, False, False, False]
            and ["one-late" in one for one in drawn] == [False, False, True, True]
            and "two-silent" in drawn[0]
            and "one-a" in drawn[3]
        )

    seed = next(seed for seed in range(10_000) if fits(seed))
    aggregator = beside(max_staleness=2)
    strategy = strategy_of(ids, share=(), aggregator=aggregator, fraction=0.6, seed=seed)
    colora = callbacks()[0]
    trainer_of(tmp_path, strategy, max_epochs=4, callbacks=[colora, Silent()]).fit(Blocks(), datamodule=TwoTasks())

    rounds = strategy.relevance
    assert "one-late" not in rounds[1].client_ids
    rows = [
        {
            one: dict(zip(record.client_ids, row, strict=True))
            for one, row in zip(record.client_ids, record.weights.tolist(), strict=True)
        }
        for record in rounds
    ]
    assert rows[2]["one-late"]["one-left"] > 0.2  # not yet too old, and of its task
    assert rows[3]["one-late"]["one-left"] == rows[3]["one-a"]["one-left"] == 0  # too old
    assert sum(rows[3]["one-left"].values()) == pytest.approx(1)  # should it come back, its mixture is there
    assert rows[3]["one-late"]["one-a"] > rows[3]["one-late"]["two-a"]
    others = {weight for one, weight in rows[3]["two-silent"].items() if weight}
    assert max(others) - min(others) < 1e-6  # uniform over those that are mixed
    assert strategy.personalize_new(Client("one-new-silent")).notes[0].startswith("No sketch yet from")


def test_a_run_that_hides_what_clients_send_takes_no_newcomers_sketch(run):
    strategy = run[0]
    strategy.privacy = Privacy(budget=PrivacyBudget(8, 1e-5), sketches=ClientNoise(4.0))

    try:
        with pytest.raises(FederationError, match="newcomer's sketch would leave `one-new` as it is"):
            strategy.personalize_new(Client("one-new"))
    finally:
        strategy.privacy = None
