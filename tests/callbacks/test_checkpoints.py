"""Promises of `lightning_pfl.callbacks.checkpoints`, with real Trainers and files."""

from __future__ import annotations

import copy
from collections.abc import Callable

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_pfl.adapters import CoLoraConfig, adapter_parameters, bases_of, config_of, inject
from lightning_pfl.adapters.alignment import Alignment
from lightning_pfl.callbacks.checkpoints import describe, load_from_checkpoint
from lightning_pfl.errors import CheckpointMismatchError
from tests.callbacks.modules import InConfigureModel, InSetup, Plain, colora, loader, trainer
from tests.federation.tiny import Blocks
from tests.parties.wards import checkpoint_of

WAYS = pytest.mark.parametrize("kind", [Plain, InSetup, InConfigureModel])
SIZES = pytest.mark.parametrize("small", [False, True], ids=["full", "adapters only"])


def saved(path, *, kind=Plain, epochs=2, weights_only=False, callbacks=(), **kwargs):
    """A module fitted and its checkpoint."""
    module = kind()
    run = trainer(colora(**kwargs), *callbacks, epochs=epochs)
    run.fit(module, loader())
    run.save_checkpoint(path, weights_only=weights_only)
    return module


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@WAYS
@SIZES
def test_stop_and_resume_equals_no_stop(kind, small, tmp_path):
    """Four epochs, against two and then two more in another process's place: equal bits."""
    whole, first, second = kind(), kind(), kind()
    options = {"adapters_only_checkpoints": small, "train_also": ["net.head"]}
    trainer(colora(**options), epochs=4).fit(whole, loader())
    run = trainer(colora(**options), epochs=2)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "stop.ckpt")

    trainer(colora(**options), epochs=4).fit(second, loader(), ckpt_path=tmp_path / "stop.ckpt")

    assert_same(state(second), state(whole))


@WAYS
@SIZES
def test_validate_test_and_predict_from_a_checkpoint_see_the_trained_adapters(kind, small, tmp_path):
    path = tmp_path / "best.ckpt"
    module = saved(path, kind=kind, adapters_only_checkpoints=small)
    wanted = trainer().validate(module, loader(), verbose=False)[0]["val_loss"]
    untrained = trainer(colora()).validate(kind(), loader(), verbose=False)[0]["val_loss"]

    for method in ("validate", "test"):
        run = trainer(colora(adapters_only_checkpoints=small))
        assert getattr(run, method)(kind(), loader(), ckpt_path=path, verbose=False)[0]["val_loss"] == wanted
    predictions = trainer(colora()).predict(kind(), loader(), ckpt_path=path)
    x = torch.cat([batch[0] for batch in loader()])
    torch.testing.assert_close(torch.cat(predictions), module(x))
    assert wanted != untrained


@pytest.mark.parametrize("weights_only", [False, True])
def test_small_checkpoints_hold_what_was_trained_and_nothing_frozen(weights_only, tmp_path):
    """The trap: callbacks are not asked about a checkpoint of weights only."""
    module = saved(
        tmp_path / "small.ckpt", weights_only=weights_only, adapters_only_checkpoints=True, train_also=["net.head"]
    )

    names = set(torch.load(tmp_path / "small.ckpt")["state_dict"])

    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert names == trained
    assert "net.head.weight" in names
    assert not any("base_layer" in name or "basis" in name for name in names)


def test_a_full_checkpoint_holds_everything():
    module = Plain()
    run = trainer(colora())
    run.fit(module, loader())
    checkpoint = run._checkpoint_connector.dump_checkpoint(weights_only=False)
    assert set(checkpoint["state_dict"]) == set(module.state_dict())


def test_buffers_that_training_changes_are_kept_in_small_checkpoints(tmp_path):
    class Normed(Plain):
        def __init__(self):
            super().__init__()
            self.net["head"] = nn.Sequential(nn.BatchNorm1d(6), self.net["head"])

    trained = {"train_also": ["net.head"]}  # else its statistics are frozen with its weights
    module = saved(tmp_path / "small.ckpt", kind=Normed, adapters_only_checkpoints=True, **trained)

    loaded = load_from_checkpoint(Normed, tmp_path / "small.ckpt")

    assert module.net["head"][0].running_mean.abs().sum() > 0
    assert torch.equal(loaded.net["head"][0].running_mean, module.net["head"][0].running_mean)


def test_a_gate_and_a_global_branch_come_back(tmp_path):
    module, callback = Plain(), colora(adapters_only_checkpoints=True)
    callback.prepare_server(module, global_branch=True)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if "colora_global" in name or "colora_gate" in name:
                value.add_(0.7)
    run = trainer(callback, epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "small.ckpt")

    loaded = load_from_checkpoint(Plain, tmp_path / "small.ckpt")
    resumed = Plain()
    trainer(colora(), epochs=1).fit(resumed, loader(), ckpt_path=tmp_path / "small.ckpt")

    for other in (loaded, resumed):
        assert config_of(other).global_branch
        assert_same(state(other), state(module))


def test_a_checkpoint_without_a_global_branch_is_refused_where_there_is_one(tmp_path):
    saved(tmp_path / "alone.ckpt")
    module = Plain()
    colora().prepare_server(module, global_branch=True)

    with pytest.raises(CheckpointMismatchError, match="made without a server"):
        trainer(colora(), epochs=4).fit(module, loader(), ckpt_path=tmp_path / "alone.ckpt")


@SIZES
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rank": 3}, "r: 2 in the checkpoint, 3 here"),
        ({"alpha": 8}, "alpha: 4 in the checkpoint, 8 here"),
        ({"num_blocks": 2}, "num_blocks: 1 in the checkpoint, 2 here"),
        ({"seed": 1}, "seed: 0 in the checkpoint, 1 here"),
        ({"exclude_modules": ["0.0"]}, r"only in the checkpoint: \['net.body.0.0'\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resuming_with_other_adapters_is_refused_before_anything_is_loaded(other, message, small, tmp_path):
    saved(tmp_path / "a.ckpt", adapters_only_checkpoints=small)
    module = Plain()

    with pytest.raises(CheckpointMismatchError, match=message):
        trainer(colora(**other), epochs=4).fit(module, loader(), ckpt_path=tmp_path / "a.ckpt")

    assert all(p.abs().sum() == 0 for p in adapter_parameters(module).pq.values())


def test_a_lenient_module_does_not_make_a_mismatch_silent(tmp_path):
    class Lenient(Plain):
        strict_loading = False

    saved(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointMismatchError):
        trainer(colora(rank=3), epochs=4).fit(Lenient(), loader(), ckpt_path=tmp_path / "a.ckpt")

    module = Lenient()
    trainer(colora(), epochs=3).fit(module, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert all(p.abs().sum() > 0 for p in adapter_parameters(module).pq.values())


def test_another_base_model_is_refused(tmp_path):
    saved(tmp_path / "a.ckpt")

    with pytest.raises(CheckpointMismatchError, match="made for the base model `Sequential"):
        trainer(colora(), epochs=4).fit(Plain(width=8), loader(8), ckpt_path=tmp_path / "a.ckpt")


def test_a_checkpoint_without_adapters_is_refused_with_the_way_out(tmp_path):
    class Base(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run = trainer()
    run.fit(Base(), loader())
    run.save_checkpoint(tmp_path / "base.ckpt")

    with pytest.raises(CheckpointMismatchError, match="holds no Co-LoRA adapters"):
        trainer(colora(), epochs=4).fit(Base(), loader(), ckpt_path=tmp_path / "base.ckpt")


def test_another_dropout_is_no_reason_to_refuse(tmp_path):
    saved(tmp_path / "a.ckpt")
    trainer(colora(dropout=0.3), epochs=3).fit(Plain(), loader(), ckpt_path=tmp_path / "a.ckpt")


def test_a_callback_of_other_arguments_refuses_the_state_of_another():
    with pytest.raises(CheckpointMismatchError, match="r: 2 there, 5 here"):
        colora(rank=5).load_state_dict(colora(rank=2).state_dict())
    colora(rank=2).load_state_dict(colora(rank=2).state_dict())


def aligned_alignment() -> Alignment:
    probe = Plain()
    inject(probe, colora().config)
    base = config_of(probe).base_identity
    return Alignment(base, {base: {n: (A + 1, B + 1) for n, (A, B) in bases_of(probe).items()}}, (), {})


def test_aligned_bases_come_back_from_a_small_checkpoint(tmp_path):
    module = saved(tmp_path / "a.ckpt", adapters_only_checkpoints=True, aligned=aligned_alignment())

    loaded = load_from_checkpoint(Plain, tmp_path / "a.ckpt")

    assert_same(state(loaded), state(module))


def test_a_small_checkpoint_without_alignment_is_refused_where_bases_are_aligned(tmp_path):
    saved(tmp_path / "a.ckpt", adapters_only_checkpoints=True)

    with pytest.raises(CheckpointMismatchError, match="made without an alignment"):
        trainer(colora(aligned=aligned_alignment()), epochs=4).fit(Plain(), loader(), ckpt_path=tmp_path / "a.ckpt")


def test_a_tensor_that_is_missing_for_another_reason_is_an_error(tmp_path):
    saved(tmp_path / "a.ckpt", adapters_only_checkpoints=True)
    checkpoint = torch.load(tmp_path / "a.ckpt")
    del checkpoint["state_dict"][next(name for name in checkpoint["state_dict"] if "colora_P" in name)]
    torch.save(checkpoint, tmp_path / "a.ckpt")

    for load in (
        lambda: trainer(colora(), epochs=4).fit(Plain(), loader(), ckpt_path=tmp_path / "a.ckpt"),
        lambda: load_from_checkpoint(Plain, tmp_path / "a.ckpt"),
    ):
        with pytest.raises(RuntimeError, match=r"Missing key\(s\)(?s:.*)colora_P"):
            load()


def test_a_tensor_trained_now_that_the_checkpoint_left_out_is_an_error(tmp_path):
    saved(tmp_path / "a.ckpt", adapters_only_checkpoints=True)

    with pytest.raises(RuntimeError, match=r"Missing key\(s\)(?s:.*)net.head.weight"):
        trainer(colora(train_also=["net.head"]), epochs=4).fit(Plain(), loader(), ckpt_path=tmp_path / "a.ckpt")


@SIZES
def test_weight_averaging_resumes_from_both_kinds_of_checkpoint(small, tmp_path):
    def fit(module, epochs, **kwargs):
        run = trainer(colora(adapters_only_checkpoints=small), EMAWeightAveraging(decay=0.8), epochs=epochs)
        run.fit(module, loader(), **kwargs)
        return state(module)

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")

    whole = fit(Plain(), 4)
    run = trainer(colora(adapters_only_checkpoints=small), EMAWeightAveraging(decay=0.8), Stop(), epochs=4)
    run.fit(Plain(), loader())
    checkpoint = torch.load(tmp_path / "stop.ckpt")

    assert_same(fit(Plain(), 4, ckpt_path=tmp_path / "stop.ckpt"), whole)
    for key in ("state_dict", "current_model_state"):
        assert any("base_layer" in name for name in checkpoint[key]) is not small


@SIZES
@pytest.mark.parametrize("kind", [Plain, InConfigureModel])
def test_load_from_checkpoint_gives_the_trained_module_with_its_hyperparameters(kind, small, tmp_path):
    module = kind(lr=0.07)
    run = trainer(colora(adapters_only_checkpoints=small, train_also=["net.head"]), epochs=2)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)

    loaded = load_from_checkpoint(kind, tmp_path / "a.ckpt")

    assert loaded.hparams.lr == 0.07
    assert not loaded.training
    assert_same(state(loaded), state(module))
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == [
        n for n, p in module.named_parameters() if p.requires_grad
    ]
    assert load_from_checkpoint(kind, tmp_path / "a.ckpt", lr=1.0).hparams.lr == 1.0


def test_what_lightning_itself_does_with_such_a_checkpoint(tmp_path):
    """The reason for `load_from_checkpoint`: with strict=False Lightning drops every adapter and warns at most."""
    saved(tmp_path / "a.ckpt")

    with pytest.raises(RuntimeError, match="Missing key"):
        Plain.load_from_checkpoint(tmp_path / "a.ckpt")
    dropped = Plain.load_from_checkpoint(tmp_path / "a.ckpt", strict=False)
    assert not any("colora" in name for name in dropped.state_dict())


def test_a_loaded_module_goes_on_training(tmp_path):
    saved(tmp_path / "a.ckpt")
    loaded = load_from_checkpoint(Plain, tmp_path / "a.ckpt")
    before = copy.deepcopy(state(loaded))

    trainer(colora()).fit(loaded, loader())

    assert any(not torch.equal(before[name], value) for name, value in loaded.state_dict().items())


def test_a_checkpoint_that_does_not_say_what_it_holds_needs_a_config(tmp_path):
    module = saved(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt")
    del checkpoint["colora"]
    torch.save(checkpoint, tmp_path / "a.ckpt")

    with pytest.raises(ValueError, match="does not say which"):
        load_from_checkpoint(Plain, tmp_path / "a.ckpt")
    loaded = load_from_checkpoint(Plain, tmp_path / "a.ckpt", config=colora().config)
    assert_same(state(loaded), state(module))


def test_a_config_that_contradicts_the_checkpoint_is_refused(tmp_path):
    saved(tmp_path / "a.ckpt")

    with pytest.raises(CheckpointMismatchError, match="r: 2 in the checkpoint, 3 here"):
        load_from_checkpoint(Plain, tmp_path / "a.ckpt", config=CoLoraConfig(r=3, alpha=4, num_blocks=1))


def test_a_checkpoint_without_adapters_loads_as_it_is(tmp_path):
    class Base(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Base()
    run = trainer()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "base.ckpt")

    assert_same(state(load_from_checkpoint(Base, tmp_path / "base.ckpt")), state(module))


def test_the_modules_own_checkpoint_hooks_run_once_each(tmp_path):
    calls = []

    class Hooked(Plain):
        def on_save_checkpoint(self, checkpoint):
            calls.append("save")
            checkpoint["mine"] = 5

        def on_load_checkpoint(self, checkpoint):
            calls.append("load")
            assert checkpoint["mine"] == 5
            assert "state_dict" in checkpoint

    saved(tmp_path / "a.ckpt", kind=Hooked)
    assert calls == ["save"]
    load_from_checkpoint(Hooked, tmp_path / "a.ckpt")
    assert calls == ["save", "load"]
    trainer(colora(), epochs=3).fit(Hooked(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert calls == ["save", "load", "load"]


def test_model_checkpoint_keeps_the_best_and_best_resumes(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    run = trainer(colora(), keep, epochs=2, enable_checkpointing=True)
    run.fit(Plain(), loader(), loader())

    result = run.validate(Plain(), loader(), ckpt_path="best", verbose=False)

    assert result[0]["val_loss"] == pytest.approx(float(keep.best_model_score))


def test_what_a_checkpoint_says_of_adapters_is_plain_and_true(tmp_path):
    module = saved(tmp_path / "a.ckpt", train_also=["net.head"])

    about = torch.load(tmp_path / "a.ckpt", weights_only=True)["colora"]

    assert about == describe(module)
    assert about["train_also"] == ["net.head.weight", "net.head.bias"]
    assert about["config"]["r"] == 2


def test_a_newer_format_is_refused(tmp_path):
    saved(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt")
    checkpoint["colora"]["version"] = 2
    torch.save(checkpoint, tmp_path / "a.ckpt")

    with pytest.raises(CheckpointMismatchError, match="format 2"):
        load_from_checkpoint(Plain, tmp_path / "a.ckpt")


class Built(Plain):
    """With an argument that only the command line's parser can build again."""

    def __init__(self, activation: nn.Module, lr: float = 0.05) -> None:
        super().__init__(lr=lr)
        self.activation = activation

    def forward(self, x):
        return super().forward(self.activation(x))


def test_a_checkpoint_saved_under_lightning_cli_loads(tmp_path):
    from lightning.pytorch.cli import LightningCLI

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader()

    LightningCLI(
        Built,
        Data,
        save_config_callback=None,
        args=[
            "fit",
            "--model.lr=0.03",
            "--model.activation=torch.nn.Softplus",
            "--model.activation.beta=2",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.max_epochs=1",
            "--trainer.logger=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.accelerator=cpu",
            "--trainer.callbacks+=lightning_pfl.callbacks.colora.CoLoRA",
            "--trainer.callbacks.rank=2",
            "--trainer.callbacks.num_blocks=1",
        ],
    )
    (path,) = tmp_path.glob("checkpoints/*.ckpt")

    with pytest.raises(
        ValueError, match=r"'activation'.* name classes or functions"
    ):  # which a stranger may have chosen
        load_from_checkpoint(Built, path)
    loaded = load_from_checkpoint(Built, path, weights_only=False)

    assert loaded.hparams.lr == 0.03
    assert loaded.activation.beta == 2
    assert any(p.abs().sum() > 0 for p in adapter_parameters(loaded).pq.values())


class _Called(Plain):
    def __init__(self, width: int = 6, done: Callable[[], None] | None = None) -> None:
        super().__init__(width)


@pytest.mark.parametrize(
    "named", [{"done": "os.getcwd"}, {"width": {"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}}}]
)
def test_hyperparameters_that_name_code_are_not_imported(tmp_path, named):
    """LightningCLI saves classes and functions by their names; a file from elsewhere could name any."""
    module = _Called()
    inject(module, CoLoraConfig(r=2, num_blocks=1))
    checkpoint = {
        "state_dict": module.state_dict(),
        "hyper_parameters": {**named, "_instantiator": "lightning.pytorch.cli.instantiate_module"},
        "colora": describe(module),
    }
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=rf"{next(iter(named))}.*name classes or functions"):
        load_from_checkpoint(_Called, tmp_path / "x.ckpt")
    load_from_checkpoint(_Called, tmp_path / "x.ckpt", done=None, width=6)


def test_a_damaged_checkpoint_says_so(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="damaged, or loading it would run code"):
        load_from_checkpoint(Plain, tmp_path / "x.ckpt")
    torch.save([1], tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="no `state_dict`"):
        load_from_checkpoint(Plain, tmp_path / "x.ckpt")


def test_a_checkpoint_whose_description_lacks_a_layer_is_refused(tmp_path):
    """Found by fuzzing: the adapters that are built are then not those that were saved."""
    checkpoint = checkpoint_of(Blocks)
    del checkpoint["colora"]["config"]["placement"]["blocks.1.fc"]
    torch.save(checkpoint, tmp_path / "x.ckpt")

    with pytest.raises(CheckpointMismatchError, match=r"do not fit the Blocks (?s:.*)blocks\.1\.fc\.colora_P"):
        load_from_checkpoint(Blocks, tmp_path / "x.ckpt")
