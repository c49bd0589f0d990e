"""Stop and resume equals no stop, bit for bit; a checkpoint of another run is refused before anything starts."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint

from lightning_pfl.aggregation import LocalOnly
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.errors import CheckpointMismatchError, ClientFailedError
from lightning_pfl.federation import Client, ClientStore
from lightning_pfl.federation.checkpoint_files import CheckpointFiles
from tests.federation.runs import assert_equal_states, strategy_of, trainer_of
from tests.federation.test_strategy import FixedSketch, colora
from tests.federation.tiny import Blocks, ClientsOwnData, Tiny, WideBlocks


def checkpoint_every_round(path):
    return ModelCheckpoint(path, filename="{epoch}", save_top_k=-1, save_last=True)


def fit(tmp_path, strategy, rounds, *, ckpt_path=None, module=None, callbacks=(), horizon=4, **arguments):
    """Rounds up to a number, the clients' schedules sized for all of them."""
    callbacks = [checkpoint_every_round(tmp_path), *callbacks]
    trainer = trainer_of(
        tmp_path, strategy, max_epochs=horizon, callbacks=callbacks, enable_checkpointing=True, **arguments
    )
    if rounds < horizon:
        trainer.callbacks.append(StopAfter(rounds))
    trainer.fit(module, datamodule=ClientsOwnData(), ckpt_path=ckpt_path)
    return trainer


class StopAfter(L.Callback):
    federated_scope = "server"

    def __init__(self, rounds):
        self.rounds = rounds

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.rounds:
            trainer.should_stop = True


def outcome(path):
    saved = torch.load(path, weights_only=True)
    return {key: saved[key] for key in ("state_dict", "federated", "epoch", "global_step")}


@pytest.mark.parametrize("where", ["path", "last"])
@pytest.mark.parametrize("settings", [{}, {"fraction": 0.5}, {"local_steps": 2}], ids=["all", "fraction", "steps"])
def test_resuming_equals_not_stopping(tmp_path, settings, where):
    def run(folder, rounds, **arguments):
        callbacks = [colora(dropout=0.2), FixedSketch()]
        strategy = strategy_of(["a", "b", "c", Client("wide", model=WideBlocks)], share=(), **settings)
        trainer = fit(folder, strategy, rounds, module=Blocks(), callbacks=callbacks, **arguments)
        return trainer, strategy

    _, expected = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)

    path = "last" if where == "last" else tmp_path / "parts" / "epoch=1.ckpt"
    trainer, strategy = run(tmp_path / "parts", 4, ckpt_path=path)

    assert_equal_states(outcome(tmp_path / "parts" / "epoch=3.ckpt"), outcome(tmp_path / "whole" / "epoch=3.ckpt"))
    assert trainer.current_epoch == 4
    assert [record.round for record in strategy.relevance] == [0, 1, 2, 3]
    assert strategy.traffic == expected.traffic


def test_a_checkpoint_on_exception_has_the_last_whole_round(tmp_path):
    class Stumbles(Tiny):
        fails = True

        def training_step(self, batch, batch_idx):
            if self.fails and self.trainer.strategy.client_id == "b" and self.current_epoch == 2:
                raise RuntimeError("out of paper")
            return super().training_step(batch, batch_idx)

    callbacks = [OnExceptionCheckpoint(tmp_path, "broken")]
    with pytest.raises(ClientFailedError):
        fit(tmp_path / "one", strategy_of(), 4, module=Stumbles(), callbacks=callbacks)
    repaired = Stumbles()
    repaired.fails = False

    fit(tmp_path / "one", strategy_of(), 4, module=repaired, ckpt_path=tmp_path / "broken.ckpt")

    fit(tmp_path / "two", strategy_of(), 4, module=Tiny())
    assert_equal_states(outcome(tmp_path / "one" / "epoch=3.ckpt"), outcome(tmp_path / "two" / "epoch=3.ckpt"))


@pytest.mark.parametrize(
    ("strategy", "module", "callbacks", "message"),
    [
        (lambda: strategy_of(["a", "b", "d"], share=()), Blocks, [colora()], r"has \['c'\] and lacks \['d'\]"),
        (lambda: strategy_of(["b", "a", "c"], share=()), Blocks, [colora()], "in another order"),
        (
            lambda: strategy_of(share=()),
            Blocks,
            [CoLoRA(rank=3, alpha=4, num_blocks=1, target_modules=["fc"], train_also=["head"])],
            "the default model: it differs in what it shares .*another rank",
        ),
        (
            lambda: strategy_of(["a", "b", Client("c", model=WideBlocks)], share=()),
            Blocks,
            [colora()],
            "the model of client `c`",
        ),
        (lambda: strategy_of(share=(), aggregator=LocalOnly()), Blocks, [colora()], "LocalOnly"),
    ],
    ids=["clients", "order", "rank", "model", "aggregator"],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, strategy, module, callbacks, message):
    fit(tmp_path, strategy_of(share=()), 1, module=Blocks(), callbacks=[colora()])
    trainer = trainer_of(tmp_path, strategy(), max_epochs=4, callbacks=[*callbacks, Untouched()])

    with pytest.raises(CheckpointMismatchError, match=message):
        trainer.fit(module(), datamodule=ClientsOwnData(), ckpt_path=tmp_path / "epoch=0.ckpt")


class Untouched(L.Callback):
    def on_fit_start(self, trainer, pl_module):
        raise AssertionError("a client has started")


class Backbone(Blocks):
    """With a frozen tensor that is big enough to be left out of clients' states."""

    def __init__(self, value=1.0):
        super().__init__()
        self.table = torch.nn.Parameter(torch.full((200, 100), value), requires_grad=False)


def test_a_checkpoint_of_another_base_model_is_refused(tmp_path):
    fit(tmp_path, strategy_of(share=["head"]), 1, module=Backbone())

    with pytest.raises(CheckpointMismatchError, match="another base model"):
        fit(tmp_path, strategy_of(share=["head"]), 2, module=Backbone(2.0), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_a_checkpoint_of_a_plain_run_is_refused(tmp_path):
    plain = L.Trainer(max_epochs=1, default_root_dir=str(tmp_path), logger=False, accelerator="cpu")
    plain.strategy.client_id = "a"
    plain.fit(Tiny(), datamodule=ClientsOwnData())
    path = plain.checkpoint_callback.best_model_path

    with pytest.raises(CheckpointMismatchError, match="not written by a federated run"):
        fit(tmp_path, strategy_of(), 1, module=Tiny(), ckpt_path=path)


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    fit(tmp_path, strategy_of(), 1, module=Tiny())
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    saved["federated"]["version"] = 2
    CheckpointFiles().save_checkpoint(saved, tmp_path / "older.ckpt")

    with pytest.raises(
        CheckpointMismatchError, match=r"has version 2, but this release reads 3 and 4\. Resume with the release"
    ):
        fit(tmp_path, strategy_of(), 4, module=Tiny(), ckpt_path=tmp_path / "older.ckpt")


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_checkpoint_of_version_3_goes_on_with_the_bytes_of_every_round(tmp_path, rounds):
    """It had them in one list; the last one may go on, as clients are evaluated in the round that has ended."""
    whole = strategy_of()
    fit(tmp_path / "whole", whole, 4, module=Tiny())
    written = strategy_of()
    fit(tmp_path, written, rounds, module=Tiny())
    saved = torch.load(tmp_path / f"epoch={rounds - 1}.ckpt", weights_only=True)
    del saved["federated"]["traffic_of_round"]
    saved["federated"] |= {"version": 3, "traffic_by_round": [one.dump() for one in written.traffic_by_round]}
    CheckpointFiles().save_checkpoint(saved, tmp_path / "older.ckpt")

    resumed = strategy_of()
    fit(tmp_path, resumed, 4, module=Tiny(), ckpt_path=tmp_path / "older.ckpt")

    got, wanted = ([(one.round, one.by_client) for one in strategy.traffic_by_round] for strategy in (resumed, whole))
    assert got == wanted
    assert len(got) == 4


def test_states_in_a_store_with_a_url_are_found_again(tmp_path):
    fit(tmp_path / "ck", strategy_of(store=ClientStore(tmp_path / "states")), 2, module=Tiny())

    fit(tmp_path / "ck", strategy_of(store=ClientStore(tmp_path / "states")), 4, module=Tiny(), ckpt_path="last")

    fit(tmp_path / "whole", strategy_of(), 4, module=Tiny())
    got, expected = outcome(tmp_path / "ck" / "epoch=3.ckpt"), outcome(tmp_path / "whole" / "epoch=3.ckpt")
    assert "versions" in got["federated"].pop("store")
    assert "states" in expected["federated"].pop("store")
    assert_equal_states(got, expected)


def test_the_users_module_loads_from_the_drivers_checkpoint(tmp_path):
    module = Tiny(lr=0.03)
    trainer = fit(tmp_path, strategy_of(), 2, module=module, callbacks=[EarlyStopping("val_loss")])

    loaded = Tiny.load_from_checkpoint(trainer.checkpoint_callback.last_model_path)

    assert loaded.hparams.lr == 0.03
    assert torch.equal(loaded.encoder.weight, module.encoder.weight)
