"""Promises of `CoLoRA` as an ordinary PEFT callback and as a federation's `Exchange`."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_pfl.adapters import (
    FixedGate,
    adapter_parameters,
    architecture_of,
    bases_of,
    config_of,
    inject,
    shared_tensors,
)
from lightning_pfl.adapters.alignment import Alignment
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.types import Personalized, SharedTensors
from tests.callbacks.modules import InConfigureModel, InSetup, Plain, colora, loader, network, trainer

WAYS = pytest.mark.parametrize("kind", [Plain, InSetup, InConfigureModel])


def frozen(module: L.LightningModule) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@WAYS
def test_adapters_are_trained_wherever_layers_are_built(kind):
    module = kind()
    start = {name: p.clone() for name, p in network().named_parameters()}

    trainer(colora(), epochs=3).fit(module, loader())

    trained = adapter_parameters(module)
    assert len(trained.pq) == 4  # P and Q of the last block's two layers
    assert len(trained.ab) == 4
    assert not trained.gates
    assert all(p.abs().sum() > 0 for p in (*trained.pq.values(), *trained.ab.values()))
    for name, p in module.net.named_parameters():
        if ".colora_" not in name:
            assert torch.equal(p, start[name.replace(".base_layer", "")]), f"{name} is frozen"


@WAYS
def test_the_first_output_is_the_base_models(kind):
    module, x = kind(), torch.randn(4, 6)
    base = network()

    trainer(colora()).validate(module, loader(), verbose=False)

    assert torch.equal(module.net["head"](module.net["body"](x)), base["head"](base["body"](x)))


@WAYS
def test_configure_model_is_as_before_once_the_run_has_begun(kind):
    module = kind()
    seen = {}

    class Look(L.Callback):
        def setup(self, trainer, pl_module, stage):
            seen["wrapped"] = is_overridden("configure_model", pl_module)

        def on_train_start(self, trainer, pl_module):
            seen["during"] = "configure_model" in vars(pl_module)
            seen["copy"] = copy.deepcopy(pl_module.net)
            pickle.dumps(pl_module.net)

    trainer(colora(), Look()).fit(module, loader())

    assert seen["wrapped"] or kind is Plain  # Lightning calls the hook only if it counts as overridden
    assert not seen["during"]
    assert "configure_model" not in vars(module)


def test_a_hook_that_the_user_set_on_the_object_is_called_and_stays():
    module = Plain()
    calls = []
    module.configure_model = lambda: calls.append("configure_model")
    mine = module.configure_model

    trainer(colora()).fit(module, loader())

    assert calls == ["configure_model"]
    assert module.configure_model is mine


@WAYS
def test_a_run_that_fails_before_the_layers_stand_leaves_the_module_usable(kind):
    module = kind()

    class Stop(L.Callback):
        def setup(self, trainer, pl_module, stage):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        trainer(colora(), Stop()).fit(module, loader())
    assert "configure_model" not in vars(module)

    trainer(colora()).fit(module, loader())
    assert adapter_parameters(module).pq


@WAYS
def test_fit_then_validate_test_predict_and_fit_again_inject_once(kind, caplog):
    module, callback = kind(), colora()
    names = []
    with caplog.at_level(logging.INFO, "lightning_pfl"):
        for _ in range(2):
            run = trainer(callback)
            run.fit(module, loader(), loader())
            run.validate(module, loader(), verbose=False)
            run.test(module, loader(), verbose=False)
            run.predict(module, loader())
            names.append(sorted(module.state_dict()))

    assert names[0] == names[1]
    assert not any("base_layer.base_layer" in name for name in names[1])
    reports = [record for record in caplog.records if "Co-LoRA layers" in record.getMessage()]
    assert len(reports) == 1
    assert "2 Co-LoRA layers in 1 blocks" in reports[0].getMessage()


def test_train_also_names_are_trained_and_the_rest_is_not():
    module = Plain()
    head = module.net["head"].weight.clone()

    trainer(colora(train_also=["net.head"])).fit(module, loader())

    assert not torch.equal(module.net["head"].weight, head)
    own = {name for name, p in module.named_parameters() if p.requires_grad and ".colora_" not in name}
    assert own == {"net.head.weight", "net.head.bias"}


def test_train_also_that_names_nothing_or_is_a_string_is_an_error():
    with pytest.raises(ValueError, match="`train_also` names `nose`"):
        trainer(colora(train_also=["nose"])).fit(Plain(), loader())
    with pytest.raises(TypeError, match="wrap it"):
        colora(train_also="head")


def test_param_groups_hold_every_trained_parameter_once_and_do_not_decay_gates():
    module = Plain()
    callback = colora(train_also=["net.head"])
    callback.prepare_server(module, global_branch=True)

    groups = {group["name"]: group for group in CoLoRA.param_groups(module, lr=1.0, lr_pq=3.0)}

    held = [id(p) for group in groups.values() for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in module.parameters() if p.requires_grad}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "pq": 3.0,
        "ab": 1.0,
        "gate": 1.0,
        "train_also": 1.0,
    }
    assert groups["gate"]["weight_decay"] == 0
    assert "weight_decay" not in groups["pq"]
    assert {id(p) for p in groups["train_also"]["params"]} == {id(p) for p in module.net["head"].parameters()}


def test_param_groups_leave_out_empty_groups_and_show_their_names_in_the_log(tmp_path):
    module = Plain()
    logger = CSVLogger(tmp_path)

    trainer(colora(), LearningRateMonitor(), logger=logger, log_every_n_steps=1).fit(module, loader())

    assert [group["name"] for group in CoLoRA.param_groups(module, lr=1, lr_pq=1)] == ["pq", "ab"]
    assert "lr-AdamW/pq" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()


def test_a_gate_that_its_optimizer_decays_is_warned_of_with_the_way_out():
    """AdamW decays everything by 0.01 unless told otherwise; `param_groups`, an own zero and a gate unread do not."""

    class Decaying(Plain):
        def __init__(self, **kwargs):
            super().__init__()
            self.of_optimizer = kwargs

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.05, **self.of_optimizer)

    def warned(module, **kwargs):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            trainer(colora(**kwargs)).fit(module, loader())
        return [str(one.message) for one in found if "weight_decay" in str(one.message)]

    (message,) = warned(Decaying(), global_branch=True)
    assert message.startswith("4 of 4 gates are in an optimizer group with weight_decay > 0 (net.body.0.0.colora_gate.")
    assert "CoLoRA.param_groups" in message
    assert not warned(Plain(), global_branch=True)  # which uses `param_groups`
    assert not warned(Decaying(weight_decay=0.0), global_branch=True)
    assert not warned(Decaying(), global_branch=True, gate=FixedGate())
    assert not warned(Decaying())  # without a global branch there is no gate


def test_adapters_that_no_optimizer_holds_are_an_error_with_the_way_out():
    class Listed(Plain):
        def __init__(self):
            super().__init__()
            self.mine = list(self.parameters())

        def configure_optimizers(self):
            return torch.optim.SGD(self.mine, lr=0.1)

    with pytest.raises(ValueError, match=r"8 of 8 adapter parameters are in no optimizer(?s:.*)CoLoRA.param_groups"):
        trainer(colora()).fit(Listed(), loader())


@pytest.mark.parametrize(
    "collect",
    [lambda m: m.parameters(), lambda m: [p for p in m.parameters() if p.requires_grad]],
    ids=["all", "trained"],
)
def test_optimizers_of_parameters_collected_late_are_fine(collect):
    class Late(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD(collect(self), lr=0.1)

    module = Late()
    trainer(colora()).fit(module, loader())
    assert all(p.abs().sum() > 0 for p in adapter_parameters(module).pq.values())


def test_no_layer_to_adapt_is_an_error_that_says_what_was_there():
    with pytest.raises(ValueError, match=r"No layer is left to adapt(?s:.*)net\.body\.0\.0"):
        trainer(colora(target_modules=["q_proj"])).fit(Plain(), loader())


def test_another_rank_on_a_module_that_has_adapters_is_an_error():
    module = Plain()
    trainer(colora(rank=2)).fit(module, loader())

    with pytest.raises(ValueError, match="r: 2 there, 3 asked for"):
        trainer(colora(rank=3)).fit(module, loader())


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed", "64-true"])
def test_precisions(precision):
    module = Plain()

    trainer(colora(), precision=precision, epochs=2).fit(module, loader(), loader())

    trained = adapter_parameters(module)
    expected = torch.float64 if precision == "64-true" else torch.float32
    for p in (*trained.pq.values(), *trained.ab.values()):
        assert p.dtype == expected
        assert torch.isfinite(p).all()
        assert p.abs().sum() > 0
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_gradient_accumulation_and_clipping_work():
    module = Plain()
    trainer(colora(), accumulate_grad_batches=2, gradient_clip_val=0.1).fit(module, loader())
    assert all(p.abs().sum() > 0 for p in adapter_parameters(module).pq.values())


def test_backbone_finetuning_freezes_and_unfreezes_beside_it():
    class WithBackbone(Plain):
        @property
        def backbone(self):
            return self.net["body"]

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)

    module = WithBackbone()
    base = module.net["body"][0][0].weight.clone()
    trainer(colora(), BackboneFinetuning(unfreeze_backbone_at_epoch=1), epochs=2).fit(module, loader())
    before = [p.detach().clone() for p in adapter_parameters(module).pq.values()]
    run = trainer(colora(), BackboneFinetuning(unfreeze_backbone_at_epoch=1), epochs=2)
    run.fit(module, loader())  # which freezes adapters that are there already, in its setup

    after = adapter_parameters(module).pq.values()
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(module.net["body"][0][0].base_layer.weight, base)  # what BackboneFinetuning is for
    held = [id(p) for group in run.optimizers[0].param_groups for p in group["params"]]
    assert len(held) == len(set(held))


@WAYS
def test_weight_averaging_after_it_averages_adapters(kind):
    if kind is InSetup:
        pytest.skip("WeightAveraging itself copies the module before `setup` builds layers")
    module = kind()
    callback = EMAWeightAveraging(decay=0.9)
    last = {}

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            last.update({n: p.detach().clone() for n, p in adapter_parameters(pl_module).pq.items()})

    trainer(colora(), callback, Look(), epochs=2).fit(module, loader())

    for name, p in adapter_parameters(module).pq.items():
        assert p.abs().sum() > 0
        assert not torch.equal(p, last[name]), "at the end the averages are in the module"


def test_stochastic_weight_averaging_works_on_a_module_that_is_built():
    module = Plain()
    trainer(colora(), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), epochs=3).fit(module, loader())
    assert all(p.abs().sum() > 0 for p in adapter_parameters(module).pq.values())


def test_averaging_that_would_copy_a_module_without_adapters_is_refused():
    for averaging in (EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.01)):
        with pytest.raises(ValueError, match="must come after CoLoRA"):
            trainer(averaging, colora()).fit(Plain(), loader())
    with pytest.raises(ValueError, match="copies the module before"):
        trainer(colora(), StochasticWeightAveraging(swa_lrs=0.01)).fit(InConfigureModel(), loader())


def test_pytorch_lightning_objects_are_refused_with_the_reason():
    import pytorch_lightning

    class Old(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, batch_idx):
            return self.net["head"](self.net["body"](batch[0])).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    old = pytorch_lightning.Trainer(max_epochs=1, accelerator="cpu", callbacks=[colora()], **quiet)
    with pytest.raises(TypeError, match="comes from `pytorch_lightning`, but CoLoRA is a callback of `lightning`"):
        old.fit(Old(), loader())
    with pytest.raises(TypeError, match="`Old` comes from `pytorch_lightning`"):
        colora().prepare_server(Old(), global_branch=False)


def test_prepare_server_injects_with_or_without_the_global_branch_and_again_does_nothing():
    for wanted in (True, False):
        module, callback = Plain(), colora()
        for _ in range(2):
            callback.prepare_server(module, global_branch=wanted)
        assert config_of(module).global_branch is wanted
        assert bool(adapter_parameters(module).gates) is wanted


def test_a_global_branch_that_no_server_will_fill_is_refused():
    module = Plain()
    colora().prepare_server(module, global_branch=True)

    with pytest.raises(ValueError, match="the aggregator of this one sends none"):
        colora().prepare_server(module, global_branch=False)


def test_a_client_that_builds_its_own_layers_gets_the_branch_that_the_server_prepared():
    """The callback travels to clients; what it learned on the driver holds there, and not in a Trainer of one's own."""
    callback = colora()
    callback.prepare_server(Plain(), global_branch=True)
    callback = pickle.loads(pickle.dumps(callback))

    client, alone = InConfigureModel(), InConfigureModel()
    run = trainer(callback)
    run.strategy.client_id = "ward-3"
    run.fit(client, loader())
    trainer(callback).fit(alone, loader())

    assert config_of(client).global_branch
    assert not config_of(alone).global_branch


def test_a_prepared_module_keeps_its_branch_and_identity_through_pickling_and_setup():
    callback, module = colora(), Plain()
    callback.prepare_server(module, global_branch=True)

    callback, module = pickle.loads(pickle.dumps((callback, module)))
    run = trainer(callback)
    run.strategy.client_id = "ward-3"
    run.fit(module, loader())

    assert config_of(module).global_branch
    assert module.on_save_checkpoint.args[0] is module


def test_upload_is_what_was_trained_and_receive_writes_both_branches():
    callback, module, other = colora(), Plain(), Plain()
    for each in (module, other):
        callback.prepare_server(each, global_branch=True)
    with torch.no_grad():
        for p in (*adapter_parameters(module).pq.values(), *adapter_parameters(module).ab.values()):
            p.normal_()
    sent = callback.upload(module)
    assert torch.equal(sent.common.vector, shared_tensors(module).common.vector)
    untouched = shared_tensors(other)

    callback.receive(other, Personalized(frozen=sent))
    assert torch.equal(callback.upload(other).common.vector, untouched.common.vector)
    globals_ = [b for n, b in other.named_buffers() if "colora_global_P" in n]
    locals_ = [p for n, p in module.named_parameters() if "colora_P" in n]
    assert all(torch.equal(g, p) for g, p in zip(globals_, locals_, strict=True))

    callback.receive(other, Personalized(start=sent))
    assert torch.equal(callback.upload(other).common.vector, sent.common.vector)
    assert torch.equal(callback.upload(other).same_architecture.vector, sent.same_architecture.vector)

    callback.receive(other, Personalized())
    assert torch.equal(callback.upload(other).common.vector, sent.common.vector)


def test_receive_refuses_what_the_module_does_not_have():
    callback, module, wider = colora(), Plain(), Plain()
    callback.prepare_server(module, global_branch=False)
    colora(rank=3).prepare_server(wider, global_branch=False)

    with pytest.raises(ValueError, match="must have the shape"):
        callback.receive(module, Personalized(start=callback.upload(wider)))
    with pytest.raises(ValueError, match="no global branch"):
        callback.receive(module, Personalized(frozen=SharedTensors()))


def test_architecture_tells_widths_apart():
    callback = colora()
    modules = [Plain(6), Plain(6), Plain(8)]
    for module in modules:
        callback.prepare_server(module, global_branch=False)

    assert callback.architecture(modules[0]) == callback.architecture(modules[1]) == architecture_of(modules[0])
    assert callback.architecture(modules[0]) != callback.architecture(modules[2])


@WAYS
def test_aligned_bases_are_set_from_an_alignment_or_its_folder(kind, tmp_path):
    probe = Plain()
    inject(probe, colora().config)
    base = config_of(probe).base_identity
    bases = {layer: (torch.full_like(A, 2.0), torch.full_like(B, 3.0)) for layer, (A, B) in bases_of(probe).items()}
    alignment = Alignment(base, {base: bases}, (), {})
    alignment.save(tmp_path)

    for aligned in (alignment, tmp_path, str(tmp_path)):
        module = kind()
        trainer(colora(aligned=aligned)).fit(module, loader())
        assert all((A == 2).all() and (B == 3).all() for A, B in bases_of(module).values())


def test_private_layers_false_adapts_the_shared_blocks_only():
    module = Plain()
    trainer(colora(private_layers=False)).fit(module, loader())
    assert not adapter_parameters(module).ab


def test_export_writes_a_folder_that_peft_reads_into_the_inner_transformer(tmp_path):
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 20}

    def llama() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1))

    class LM(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.wrapped = nn.ModuleDict({"model": llama()})

        def training_step(self, batch, batch_idx):
            return self.wrapped["model"](input_ids=batch[0], labels=batch[0]).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(CoLoRA.param_groups(self, lr=0.01, lr_pq=0.1))

    ids = torch.randint(20, (8, 6), generator=torch.Generator().manual_seed(0))
    module = LM()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=4)
    trainer(colora(), epochs=2).fit(module, data)

    CoLoRA.export(module, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()

    wanted = module.wrapped["model"].eval()(ids).logits
    torch.testing.assert_close(loaded(ids).logits, wanted)
    assert not torch.allclose(llama().eval()(ids).logits, wanted, atol=1e-3)


def test_export_of_a_plain_module_fits_a_module_built_like_it(tmp_path):
    from peft import PeftModel

    module = Plain()
    trainer(colora(), epochs=2).fit(module, loader())
    CoLoRA.export(module, tmp_path)

    x = torch.randn(3, 6)
    torch.testing.assert_close(PeftModel.from_pretrained(Plain(), tmp_path).eval()(x), module(x))


def test_the_callback_can_be_built_by_the_command_line_parser():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(L.Callback, "callback")
    written = {
        "class_path": "lightning_pfl.callbacks.colora.CoLoRA",
        "init_args": {
            "rank": 3,
            "train_also": ["net.head"],
            "gate": {"class_path": "lightning_pfl.adapters.InputGate"},
        },
    }

    callback = parser.instantiate_classes(parser.parse_object({"callback": written})).callback

    assert callback.config.r == 3
    assert callback.train_also == ("net.head",)
    assert type(callback.config.gate).__name__ == "InputGate"


def test_a_saved_module_object_is_loaded_with_its_adapters():
    """torch.save of the whole module: what stands around its hooks travels along."""
    module = Plain()
    trainer(colora(), epochs=2).fit(module, loader())
    module.trainer = None
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)

    loaded = torch.load(buffer, weights_only=False)

    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), module(x))
    checkpoint = {"state_dict": {}}
    loaded.on_save_checkpoint(checkpoint)
    assert checkpoint["colora"]["config"]["r"] == 2
