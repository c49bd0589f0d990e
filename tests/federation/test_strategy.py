"""`FederatedStrategy` in a real Trainer: what ends up where."""

import logging

import lightning as L
import pytest
import torch

from lightning_pfl.aggregation import FedAvg, LocalOnly, RelevanceAggregator, UniformAggregator
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.callbacks.federated import SketchSource
from lightning_pfl.errors import ClientFailedError, FederationError
from lightning_pfl.federation import Client, ClientStore, FederatedStrategy
from lightning_pfl.federation.turn import unpack_state
from lightning_pfl.types import FlatTensors
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.tiny import Blocks, ClientsOwnData, InSetup, Late, Tiny, WideBlocks


def colora(**arguments):
    return CoLoRA(rank=2, alpha=4, num_blocks=1, target_modules=["fc"], train_also=["head"], **arguments)


class FixedSketch(SketchSource):
    """Clients `a` and `b` have one task, the others another."""

    def on_train_start(self, trainer, pl_module):
        alike = trainer.strategy.client_id in ("a", "b")
        self.sketch = torch.tensor([1.0, 0.0]) if alike else torch.tensor([0.0, 1.0])

    def take_sketch(self):
        return self.sketch


def test_the_drivers_module_ends_as_the_sample_weighted_mean_of_what_clients_trained(tmp_path):
    strategy = strategy_of([Client("a", num_examples=1), Client("b", num_examples=3)], aggregator=LocalOnly())
    module = Tiny()

    trainer_of(tmp_path, strategy).fit(module, datamodule=ClientsOwnData())

    a, b = (unpack_state(strategy.store.get(name))["state_dict"] for name in "ab")
    assert not torch.equal(a["encoder.weight"], b["encoder.weight"])
    torch.testing.assert_close(module.encoder.weight, (a["encoder.weight"] + 3 * b["encoder.weight"]) / 4)
    assert torch.equal(module.head.weight, Tiny().head.weight)  # not shared, so not the driver's to know


def test_without_a_count_clients_weigh_as_many_examples_as_an_epoch_holds(tmp_path):
    seen = {}

    class Watch(FedAvg.__base__):
        uses_global_branch = needs_sketches = False

        def aggregate(self, updates, state):
            seen.update({update.client_id: update.num_examples for update in updates})
            return FedAvg().aggregate(updates, state)

    clients = [
        Client("a", datamodule=lambda: ClientsOwnData(num_examples=12)),
        Client("b", datamodule=ClientsOwnData(num_examples=7)),
        Client("c"),
    ]
    trainer = trainer_of(tmp_path, strategy_of(clients, aggregator=Watch()), max_epochs=1, limit_train_batches=2)

    trainer.fit(Tiny(), datamodule=ClientsOwnData(num_examples=4))

    assert seen == {"a": 8, "b": 7, "c": 4}  # batches of 4, two at most


@pytest.mark.parametrize("model", [Blocks, Late, InSetup], ids=["init", "configure_model", "setup"])
def test_the_drivers_module_has_the_adapters_of_its_architecture(tmp_path, model):
    """Layers may be built anywhere; on the driver they are built with `client_id` None."""
    module = model()
    clients = ["a", "b", "wide"] if model is not Blocks else ["a", "b", Client("wide", model=WideBlocks)]
    strategy = strategy_of(clients, share=())

    trainer_of(tmp_path, strategy, callbacks=[colora()]).fit(module, datamodule=ClientsOwnData())

    states = {name: unpack_state(strategy.store.get(name))["state_dict"] for name in ("a", "b", "wide")}
    trained = [name for name in states["a"] if "colora" in name and name in dict(module.named_parameters())]
    assert len(trained) >= 2
    for name in trained:
        if not name.endswith(("gate", "gates.default")) and "gate" not in name:
            torch.testing.assert_close(
                dict(module.named_parameters())[name], (states["a"][name] + states["b"][name]) / 2
            )
    assert states["wide"]["head.weight"].shape == (1, 12)
    assert module.head.weight.shape == (1, 8)


@pytest.mark.parametrize(
    ("callbacks", "share", "expected"),
    [
        ([], ["encoder"], FedAvg),
        ([colora()], (), UniformAggregator),
        ([colora(), FixedSketch()], (), RelevanceAggregator),
    ],
)
def test_the_default_aggregator_fits_the_callbacks_and_the_log_says_which(callbacks, share, expected, caplog):
    strategy = FederatedStrategy(2, share=share)

    with caplog.at_level(logging.INFO, logger="lightning_pfl"):
        chosen = strategy.aggregator_for(callbacks)

    assert type(chosen) is expected
    assert f"`{expected.__name__}`" in caplog.text


def test_relevance_is_remembered_for_every_round(tmp_path):
    strategy = strategy_of(["a", "b", "c", "d"], share=())

    trainer_of(tmp_path, strategy, max_epochs=2, callbacks=[colora(), FixedSketch()]).fit(
        Blocks(), datamodule=ClientsOwnData()
    )

    assert [record.round for record in strategy.relevance] == [0, 1]
    last = strategy.relevance[-1]
    assert last.client_ids == ("a", "b", "c", "d")
    assert last.similarity[0, 1] == 1
    assert last.similarity[0, 2] == 0
    assert last.weights[0, 1] > last.weights[0, 2]


STARTS = {}


class Starts(L.Callback):
    """Notes in this process with which weights each client starts each round."""

    def on_train_start(self, trainer, pl_module):
        key = (trainer.strategy.client_id, trainer.strategy.round)
        STARTS[key] = {name: value.clone() for name, value in pl_module.state_dict().items()}


def test_a_client_receives_its_mixture_and_keeps_its_head(tmp_path):
    """Under FedAvg all clients start a round from one encoder and from heads of their own."""
    strategy = strategy_of(["a", "b"])

    trainer_of(tmp_path, strategy, max_epochs=2, callbacks=[Starts()]).fit(Tiny(), datamodule=ClientsOwnData())

    assert torch.equal(STARTS["a", 1]["encoder.weight"], STARTS["b", 1]["encoder.weight"])
    assert not torch.equal(STARTS["a", 1]["head.weight"], STARTS["b", 1]["head.weight"])
    assert not torch.equal(STARTS["a", 1]["encoder.weight"], STARTS["a", 0]["encoder.weight"])


def test_traffic_counts_bytes_in_both_directions(tmp_path):
    """The encoder has 4 * 8 + 8 numbers of four bytes. What the last round sends is used to evaluate."""
    strategy = strategy_of(["a", "b"])
    assert FlatTensors.pack(dict(Tiny().encoder.named_parameters())).nbytes == 160

    trainer_of(tmp_path, strategy, max_epochs=3).fit(Tiny(), datamodule=ClientsOwnData())

    assert {name: (one.up, one.down) for name, one in strategy.traffic.items()} == {"a": (480, 480), "b": (480, 480)}


def test_a_fraction_of_the_clients_takes_part_and_the_rest_keep_their_state(tmp_path):
    strategy = strategy_of(5, fraction=0.4)
    seen = []

    class Watch(L.Callback):
        federated_scope = "server"

        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(pl_module.rounds.participants)

    trainer_of(tmp_path, strategy, max_epochs=4, callbacks=[Watch()]).fit(Tiny(), datamodule=ClientsOwnData())

    assert [len(names) for names in seen] == [2, 2, 2, 2]
    assert len(set(seen)) > 1
    took_part = {name for names in seen for name in names}
    assert strategy.store.ids() == sorted(took_part)
    for name in took_part:
        turns = sum(name in names for names in seen)
        assert unpack_state(strategy.store.get(name))["global_step"] == 3 * turns


def test_a_second_fit_goes_on_with_the_clients_as_they_were(tmp_path):
    strategy = strategy_of(["a", "b"], share=["head"])
    trainer, module = trainer_of(tmp_path, strategy, max_epochs=2), Blocks()
    trainer.fit(module, datamodule=ClientsOwnData())

    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=ClientsOwnData())

    assert unpack_state(strategy.store.get("a"))["global_step"] == 3 * 3
    assert trainer.current_epoch == 3


def test_a_new_trainer_starts_the_clients_anew(tmp_path):
    strategy = strategy_of(["a", "b"])
    trainer_of(tmp_path, strategy, max_epochs=2).fit(Tiny(), datamodule=ClientsOwnData())

    trainer_of(tmp_path, strategy, max_epochs=1).fit(Tiny(), datamodule=ClientsOwnData())

    assert unpack_state(strategy.store.get("a"))["global_step"] == 3
    assert [record.round for record in strategy.relevance] == [0]
    assert strategy.traffic["a"].up == 160


class Breaks(Tiny):
    def training_step(self, batch, batch_idx):
        if self.trainer.strategy.client_id == "b" and self.current_epoch == 1:
            raise ZeroDivisionError("ward b has no data today")
        return super().training_step(batch, batch_idx)


def test_a_client_that_raises_ends_the_run_with_its_own_traceback(tmp_path):
    strategy = strategy_of(["a", "b"])
    trainer, module = trainer_of(tmp_path, strategy), Breaks()

    with pytest.raises(ClientFailedError, match="ward b has no data today") as caught:
        trainer.fit(module, datamodule=ClientsOwnData())

    assert (caught.value.client_id, caught.value.round) == ("b", 1)
    assert "in training_step" in caught.value.trace
    assert trainer.state.status == "interrupted"
    assert trainer.lightning_module is module
    # the round in which it failed has not happened, for nobody
    assert unpack_state(strategy.store.get("a"))["global_step"] == 3


def test_the_trainer_is_left_as_a_user_expects_it(tmp_path):
    module, data, watch = Tiny(), ClientsOwnData(), FixedSketch()
    trainer = trainer_of(tmp_path, accumulate_grad_batches=2, limit_val_batches=1, callbacks=[watch])

    trainer.fit(module, datamodule=data)

    assert trainer.lightning_module is module
    assert module.trainer is trainer
    assert trainer.datamodule is data
    assert trainer.callbacks == [watch]
    assert (trainer.accumulate_grad_batches, trainer.limit_val_batches) == (2, 1)
    assert trainer.current_epoch == 3
    assert trainer.global_step == 3
    assert trainer.state.finished


def test_personalize_and_export_give_one_clients_model(tmp_path):
    strategy = strategy_of(["a", "b", Client("wide", model=WideBlocks)], share=())
    module = Blocks()
    with pytest.raises(FederationError, match=r"trainer\.fit"):
        strategy.personalize(module, "a")
    trainer = trainer_of(tmp_path, strategy, callbacks=[colora()])
    data = ClientsOwnData()
    trainer.fit(module, datamodule=data)
    traffic = strategy.traffic

    personal = strategy.personalize(module, "a")

    # what `trainer.predict` says for the client is what its model says
    predicted = trainer.predict(module, datamodule=data)
    assert set(predicted) == {"a", "b", "wide"}
    data.trainer = trainer
    strategy.client_id = "a"
    batches = [personal(x) for x, _ in data.val_dataloader()]
    strategy.client_id = None
    torch.testing.assert_close(torch.cat(predicted["a"]), torch.cat(batches), rtol=0, atol=0)
    assert not personal.training
    assert strategy.personalize(module, "wide").head.in_features == 12
    assert strategy.traffic == traffic
    folder = strategy.export("a", tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in folder.iterdir()}
    with pytest.raises(ValueError, match=r"no client `x`.*'a', 'b', 'wide'"):
        strategy.export("x", tmp_path)


def test_clients_that_share_by_name_export_what_they_share(tmp_path):
    from safetensors.torch import load_file

    strategy = strategy_of(["a", "b"], aggregator=LocalOnly())
    trainer_of(tmp_path, strategy).fit(Tiny(), datamodule=ClientsOwnData())

    folder = strategy.export("a", tmp_path / "out")

    state = unpack_state(strategy.store.get("a"))["state_dict"]
    exported = load_file(folder / "shared_tensors.safetensors")
    assert set(exported) == {"encoder.weight", "encoder.bias"}
    assert torch.equal(exported["encoder.weight"], state["encoder.weight"])


def test_a_store_is_used(tmp_path):
    store = ClientStore(tmp_path / "states", max_memory=0)

    trainer_of(tmp_path, strategy_of(store=store)).fit(Tiny(), datamodule=ClientsOwnData())

    assert store.ids() == ["a", "b", "c"]
    assert (tmp_path / "states" / "a").is_dir()


def test_two_clients_by_name(tmp_path):
    strategy = L.Trainer(strategy="federated", logger=False, default_root_dir=str(tmp_path)).strategy

    assert isinstance(strategy, FederatedStrategy)
    assert strategy.num_clients == 2


def test_looking_at_a_clients_model_is_no_traffic(tmp_path):
    """Nothing was evaluated, so the last round's mixture has not been sent yet: two of three rounds' have."""
    strategy = strategy_of(["a", "b"])
    trainer_of(tmp_path, strategy, limit_val_batches=0).fit(Tiny(), datamodule=ClientsOwnData())

    strategy.personalize(Tiny(), "a")

    assert (strategy.traffic["a"].up, strategy.traffic["a"].down) == (480, 320)
