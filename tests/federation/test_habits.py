"""What a Lightning user does with a Trainer, out of habit, does under a federation what it does elsewhere."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from lightning_pfl.federation import FederatedStrategy, LocalPool
from lightning_pfl.federation.turn import unpack_state
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.test_strategy import colora
from tests.federation.tiny import Blocks, ClientsOwnData, Tiny


class ByHand(Blocks):
    """Manual optimization, two optimizers: one for adapters, one for the head."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        adapters = [p for name, p in trained if not name.startswith("head")]
        return torch.optim.Adam(adapters, lr=0.02), torch.optim.SGD(self.head.parameters(), lr=0.02)


def trained(strategy, client_id):
    return unpack_state(strategy.store.get(client_id))


def test_several_optimizers_by_hand_train_adapters_and_head(tmp_path):
    strategy = strategy_of(["a", "b"], share=())
    trainer_of(tmp_path, strategy, max_epochs=2, callbacks=[colora()]).fit(ByHand(), datamodule=ClientsOwnData())

    state = trained(strategy, "a")
    assert len(state["optimizer_states"]) == 2
    assert state["global_step"] == 2 * 3 * 2  # Lightning counts both optimizers' steps
    assert not torch.equal(state["state_dict"]["head.weight"], Blocks().head.weight)
    assert state["state_dict"]["blocks.1.fc.colora_P.default"].any()


def test_local_steps_count_optimizer_steps_of_several_batches(tmp_path):
    """20 examples are 5 batches: with two batches a step, the third step of an epoch has the last batch alone."""
    strategy = strategy_of(["a"], local_steps=2)
    trainer_of(tmp_path, strategy, accumulate_grad_batches=2).fit(Tiny(), datamodule=ClientsOwnData(num_examples=20))

    state = trained(strategy, "a")
    batches = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"]
    assert (state["global_step"], batches) == (6, 10)


@pytest.mark.parametrize(
    ("precision", "head"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)]
)  # fmt: skip
def test_adapters_train_in_low_precision_and_are_exchanged_in_float32(tmp_path, precision, head):
    strategy = strategy_of(["a", "b"], share=())
    module = Blocks()
    trainer_of(tmp_path, strategy, precision=precision, callbacks=[colora()]).fit(module, datamodule=ClientsOwnData())

    state = trained(strategy, "a")["state_dict"]
    assert state["head.weight"].dtype == head
    uploads = strategy._state.aggregator["uploads"]
    assert {numbers["common"]["vector"].dtype for numbers in uploads.values()} == {torch.float32}
    assert all(numbers["common"]["vector"].any() for numbers in uploads.values())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_evaluation_may_come_before_fit_after_it_and_between_two_of_them(tmp_path):
    strategy = strategy_of(["a", "b"], share=())
    trainer, module, data = trainer_of(tmp_path, strategy, callbacks=[colora()]), Blocks(), ClientsOwnData()

    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    predicted = trainer.predict(module, datamodule=data)
    trainer.fit(module, datamodule=data)
    (after,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, datamodule=data)

    assert tested["client/b/test_loss"] == before["client/b/val_loss"]
    assert list(predicted) == ["a", "b"]
    assert after["val_loss"] < before["val_loss"]
    # evaluating in between changes nothing: the same five rounds in one go
    whole = strategy_of(["a", "b"], share=())
    trainer_of(tmp_path, whole, max_epochs=5, callbacks=[colora()]).fit(Blocks(), datamodule=ClientsOwnData())
    for name, value in trained(whole, "a")["state_dict"].items():
        assert torch.equal(trained(strategy, "a")["state_dict"][name], value), name
    assert trainer.current_epoch == 5
    assert [record.round for record in strategy.relevance] == [0, 1, 2, 3, 4]


class Worst(Blocks):
    """`val_loss` is lowest in round 1."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float([3, 1, 2, 4][self.trainer.strategy.round]))
        self.log("distance", self(batch[0]).mean())


def test_best_and_last_name_checkpoints_of_the_whole_federation(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, save_last=True, filename="{epoch}")
    strategy = strategy_of(["a", "b"], share=["head"])
    trainer = trainer_of(tmp_path, strategy, max_epochs=4, enable_checkpointing=True, callbacks=[keep])
    module, data, distances = Worst(), ClientsOwnData(), []

    class Remember(L.Callback):
        federated_scope = "server"

        def on_train_epoch_end(self, trainer, pl_module):
            distances.append(float(trainer.callback_metrics["client/a/distance"]))

    trainer.callbacks.insert(0, Remember())
    trainer.fit(module, datamodule=data)

    at = {}
    for name in ("best", "last"):
        at[name] = torch.cat(trainer.predict(module, datamodule=data, ckpt_path=name)["a"]).mean()
    assert keep.best_model_path.endswith("epoch=1.ckpt")
    assert float(at["best"]) == pytest.approx(distances[1])
    assert float(at["last"]) == pytest.approx(distances[3])
    (tested,) = trainer.test(module, datamodule=data, ckpt_path="last", verbose=False)
    (as_it_stands,) = trainer.test(module, datamodule=data, verbose=False)
    assert tested == as_it_stands

    trainer.fit(module, datamodule=data, ckpt_path="best")  # rounds 2 and 3 once more

    assert trainer.current_epoch == 4
    assert distances[4:] == distances[2:4]
    assert [record.round for record in strategy.relevance] == [0, 1, 2, 3]


@pytest.mark.parametrize("monitor", ["val_loss", "val_loss_local", "client/a/val_loss"])
def test_monitors_read_the_round_that_has_just_ended(tmp_path, monitor):
    keep = ModelCheckpoint(tmp_path, monitor=monitor, save_top_k=-1, filename="{epoch}")
    stop = EarlyStopping(monitor, patience=2)
    strategy = strategy_of(share=["head"])
    trainer = trainer_of(tmp_path, strategy, max_epochs=4, enable_checkpointing=True, callbacks=[keep, stop])

    trainer.fit(Worst(), datamodule=ClientsOwnData())

    kept = {path.rpartition("/")[2]: float(score) for path, score in keep.best_k_models.items()}
    assert kept == {"epoch=0.ckpt": 3, "epoch=1.ckpt": 1, "epoch=2.ckpt": 2, "epoch=3.ckpt": 4}
    assert (float(stop.best_score), stop.stopped_epoch) == (1, 3)


def test_a_monitor_that_nobody_logs_is_refused_and_says_what_there_is(tmp_path):
    trainer = trainer_of(tmp_path, callbacks=[EarlyStopping("val_acc")])

    with pytest.raises(RuntimeError, match=r"`val_acc` which is not available.*`val_loss`.*`val_loss_local`"):
        trainer.fit(Tiny(), datamodule=ClientsOwnData())


def test_the_strategy_by_its_name_runs(tmp_path):
    trainer = trainer_of(tmp_path, "federated", callbacks=[colora()])
    assert isinstance(trainer.strategy, FederatedStrategy)
    trainer.strategy.pool = LocalPool()

    trainer.fit(Blocks(), datamodule=ClientsOwnData())

    assert trainer.strategy.store.ids() == ["client-0", "client-1"]
    assert {"client/client-0/val_loss", "client/client-1/val_loss"} <= trainer.callback_metrics.keys()
