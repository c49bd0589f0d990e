"""What cannot work is refused before anything starts, with the reason and the way out."""

import threading

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging

from lightning_pfl.adapters import CoLoraConfig, inject
from lightning_pfl.aggregation import RelevanceAggregator, UniformAggregator
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.errors import ClientFailedError
from lightning_pfl.federation import Client, FederatedStrategy, LocalPool
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.test_strategy import FixedSketch, colora
from tests.federation.tiny import Blocks, ClientsOwnData, Tiny, WideBlocks


class NothingRuns(LocalPool.__base__):
    """A pool in which nothing may run."""

    def start(self, clients, snapshots):
        raise AssertionError("a pool was started")

    def submit(self, jobs):
        raise AssertionError("a job was run")

    next = cancel = submit

    def close(self):
        pass


def refused(tmp_path, error, message, *, module=None, callbacks=(), trainer=None, data=None, **arguments):
    strategy = strategy_of(**{"clients": ["a", "b"], "pool": NothingRuns(), **arguments})
    subject = trainer_of(tmp_path, strategy, callbacks=list(callbacks), **(trainer or {}))
    with pytest.raises(error, match=message):
        subject.fit(module or Tiny(), datamodule=data or ClientsOwnData())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"clients": 0}, ValueError, "at least one client"),
        ({"clients": [Client("a"), Client("A")]}, ValueError, "an id of its own"),
        ({"clients": ["a", "b"]}, TypeError, r"one is a str: 'a'. Write `Client\('a'\)`"),
        ({"clients": "ab"}, TypeError, "a number, or a sequence of `Client` objects, but is 'ab'"),
        ({"clients": None}, TypeError, "a number, or a sequence of `Client` objects, but is None"),
        ({"clients": 2, "fraction": 0.0}, ValueError, "`fraction` of clients per round must be above 0"),
        ({"clients": 2, "local_epochs": 0}, ValueError, "`local_epochs` must be at least 1, but is 0"),
        ({"clients": 2, "local_steps": 0}, ValueError, "`local_steps` must be at least 1, but is 0"),
        ({"clients": 2, "share": "encoder"}, TypeError, r"Write `share=\['encoder'\]`"),
        ({"clients": 2, "aggregator": "fedavg"}, TypeError, "`aggregator` must be a Aggregator"),
        ({"clients": 2, "pool": "local"}, TypeError, "`pool` must be a ClientPool"),
        ({"clients": 2, "rules": 0.8}, TypeError, "`rules` must be a RoundRules"),
    ],
)
def test_arguments_are_checked_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        FederatedStrategy(**arguments)


@pytest.mark.parametrize("client_id", ["a/b", "..", "", "ward 3", "ward.", "a" * 129, 7])
def test_ids_unfit_for_a_path(client_id):
    with pytest.raises(ValueError, match=r"names folders and metrics.*but is"):
        Client(client_id)


def test_nothing_shared(tmp_path):
    refused(tmp_path, ValueError, "Clients share nothing.*CoLoRA.*share=", share=())


def test_names_that_match_nothing(tmp_path):
    refused(
        tmp_path, ValueError, "'decoder', but no floating-point tensor of Tiny matches.*encoder.bias", share=["decoder"]
    )


def test_plain_tensors_under_a_rule_that_sends_a_second_copy(tmp_path):
    refused(tmp_path, ValueError, r"room for one value only.*`FedAvg\(\)`", aggregator=UniformAggregator())


def test_a_relevance_aggregator_without_a_probe(tmp_path):
    refused(tmp_path, ValueError, "`RelevanceProbe", aggregator=RelevanceAggregator(), callbacks=[colora()], share=())


def test_two_probes(tmp_path):
    refused(tmp_path, ValueError, "Keep one of them", callbacks=[FixedSketch(), FixedSketch()])


def test_steps_as_the_length_of_a_run(tmp_path):
    refused(tmp_path, ValueError, r"`max_epochs` for the number of rounds.*local_steps", trainer={"max_steps": 9})


def test_callbacks_that_search(tmp_path):
    refused(tmp_path, ValueError, "Search once", callbacks=[LearningRateFinder()])


def test_models_that_cannot_be_mixed(tmp_path):
    """A tensor shared by name has one shape in all models; the message names the clients and the tensor."""
    clients = [Client("a"), Client("wide", model=WideBlocks)]

    refused(tmp_path, ValueError, "blocks.0.fc.bias.*(a|wide)", clients=clients, share=["blocks"], module=Blocks())


class ThreeRanks(Blocks):
    """Brings adapters of its own, of another rank and over both blocks."""

    def __init__(self):
        super().__init__()
        inject(self, CoLoraConfig(r=3, alpha=4, num_blocks=2, target_modules=["fc"], global_branch=True))


class Shallow(Blocks):
    def __init__(self):
        super().__init__()
        self.blocks = self.blocks[:1]


@pytest.mark.parametrize(
    ("model", "num_blocks", "message"),
    [
        (ThreeRanks, 1, r"the model of client `c`.*r: 3 there, 2 asked for, num_blocks: 2 there, 1 asked for"),
        (Shallow, 2, r"the model of client `c`.*number of blocks of the model, 1, but is 2"),
    ],
    ids=["rank", "blocks"],
)
def test_adapters_that_cannot_be_mixed_say_whose_they_are(tmp_path, model, num_blocks, message):
    callback = CoLoRA(rank=2, alpha=4, num_blocks=num_blocks, target_modules=["fc"])
    clients = [Client("a"), Client("b"), Client("c", model=model)]

    refused(tmp_path, ValueError, message, clients=clients, callbacks=[callback], share=(), module=Blocks())


def test_no_layer_for_adapters(tmp_path):
    """The message says what was there."""
    callback = CoLoRA(rank=2, num_blocks=1, target_modules=["nowhere"])

    refused(
        tmp_path, ValueError, "nowhere.*'embed', 'blocks.0.fc'", callbacks=[callback], share=(), module=Blocks()
    )  # fmt: skip


def test_several_nodes(tmp_path):
    refused(tmp_path, ValueError, r"one program that hands clients out.*RayPool\(address", trainer={"num_nodes": 2})


def test_several_devices_are_no_silent_matter(tmp_path, caplog):
    trainer_of(tmp_path, strategy_of(["a"]), max_epochs=1, devices=2).fit(Tiny(), datamodule=ClientsOwnData())

    assert caplog.text.count("has 2 devices, but each client trains on one") == 1


@pytest.mark.parametrize("what", ["model", "datamodule"])
def test_a_client_brings_something_else(tmp_path, what):
    clients = [Client("a", **{what: lambda: torch.nn.Linear(1, 1)}), Client("b")]

    refused(tmp_path, TypeError, f"`{what}` of client `a` must be a Lightning", clients=clients)


def test_objects_of_the_other_package(tmp_path):
    other = pytest.importorskip("pytorch_lightning")

    class Module(other.LightningModule):
        pass

    class Callback(other.Callback):
        pass

    class Data(other.LightningDataModule):
        pass

    clients = [Client("a", model=Module), Client("b")]
    refused(tmp_path, TypeError, "`model` of client `a`.*pytorch_lightning", clients=clients)
    clients = [Client("a", datamodule=Data), Client("b")]
    refused(tmp_path, TypeError, "`datamodule` of client `a`.*pytorch_lightning", clients=clients)
    refused(tmp_path, TypeError, "datamodule is a Data.*pytorch_lightning", data=Data())
    logger = other.loggers.CSVLogger(tmp_path)
    refused(tmp_path, TypeError, "logger CSVLogger.*pytorch_lightning", trainer={"logger": logger})
    with pytest.raises(TypeError, match=r"datamodule is a Data.*pytorch_lightning"):
        trainer_of(tmp_path, strategy_of(pool=NothingRuns())).fit(Tiny(), Data())
    trainer = trainer_of(tmp_path, strategy_of(pool=NothingRuns()))
    trainer.callbacks.append(Callback())
    with pytest.raises(TypeError, match="pytorch_lightning"):
        trainer.fit(Tiny(), datamodule=ClientsOwnData())


class Unpicklable(ClientsOwnData):
    def __init__(self):
        super().__init__()
        self.handle = threading.Lock()


def test_data_that_cannot_be_pickled(tmp_path):
    refused(tmp_path, TypeError, r"datamodule\.?.*handle", data=Unpicklable())


def test_a_scope_that_does_not_exist(tmp_path):
    callback = StochasticWeightAveraging(0.1)
    callback.federated_scope = "everywhere"

    refused(tmp_path, ValueError, '"server" or "client"', callbacks=[callback])


class Odd(L.Callback):
    def state_dict(self):
        return {"kept": [1, {"inner": Odd}]}


def test_a_state_that_would_run_code_when_loaded_is_refused_in_the_first_round(tmp_path):
    trainer = trainer_of(tmp_path, strategy_of(["a", "b"]), callbacks=[Odd()])

    with pytest.raises(
        ClientFailedError, match=r"checkpoint\['callbacks'\]\['Odd'\]\['kept'\]\[1\]\['inner'\]"
    ) as error:
        trainer.fit(Tiny(), datamodule=ClientsOwnData())

    assert error.value.round == 0


def test_frozen_weights_that_differ_from_turn_to_turn_are_refused(tmp_path):
    class Draws(Blocks):
        def configure_model(self):
            turn = self.trainer.strategy.round or 0
            self.table = torch.nn.Parameter(torch.full((200, 100), float(turn)), requires_grad=False)

    trainer = trainer_of(tmp_path, strategy_of(["a", "b"], share=["head"]))

    with pytest.raises(ClientFailedError, match=r"frozen part of client `a`.*\['table'\]") as error:
        trainer.fit(Draws(), datamodule=ClientsOwnData())

    assert error.value.round == 1


class TwoOptimizers(Tiny):
    def configure_optimizers(self):
        return torch.optim.Adam(self.encoder.parameters()), torch.optim.SGD(self.head.parameters(), lr=0.1)


class ByHand(Blocks):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class HoldsAList(Blocks):
    def __init__(self):
        super().__init__()
        self.held = list(self.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.held, lr=0.1)


@pytest.mark.parametrize(
    ("module", "trainer", "message"),
    [
        (TwoOptimizers, {}, "multiple optimizers is only supported with manual optimization"),
        (ByHand, {"accumulate_grad_batches": 2}, "gradient accumulation is not supported for manual optimization"),
        (HoldsAList, {}, r"adapter parameters are in no optimizer.*param_groups"),
    ],
    ids=["several optimizers", "accumulation by hand", "parameters in no optimizer"],
)
def test_what_lightning_refuses_in_training_is_refused_with_its_reason_and_the_clients_id(
    tmp_path, module, trainer, message
):
    adapters = {"share": ()} if module is HoldsAList else {"share": ["head"]}
    callbacks = [colora()] if module is HoldsAList else []
    trainer = trainer_of(tmp_path, strategy_of(["a", "b"], **adapters), callbacks=callbacks, **trainer)

    with pytest.raises(ClientFailedError, match=rf"(?s)Client `a` failed in round 0.*{message}"):
        trainer.fit(module(), datamodule=ClientsOwnData())
