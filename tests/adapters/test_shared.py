"""The second adapter: how it starts, who sees it, what is exchanged and saved of it."""

import pytest
import torch
from torch import nn

from lightning_pfl.adapters import CoLoraConfig, adapter_state, inject, load_local, set_bases, shared_tensors
from lightning_pfl.adapters.injection import ADAPTER, SHARED
from lightning_pfl.adapters.shared import add_shared_adapter, exchanged, show, shows
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.types import FlatTensors, SharedTensors


def mlp(**arguments):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    inject(module, CoLoraConfig(r=2, alpha=2, num_blocks=1, **arguments))
    return module


def test_it_starts_as_the_first_one_is_aligned_bases_included():
    module = mlp()
    set_bases(module, {"main/0/linear": (torch.ones(2, 4), torch.ones(4, 2))})
    module[0].colora_B[ADAPTER].data.fill_(0.5)

    add_shared_adapter(module)
    add_shared_adapter(module)

    for layer in (module[0], module[2]):
        first, second = layer.state_of(ADAPTER), layer.state_of(SHARED)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert all(p.requires_grad for name in (ADAPTER, SHARED) for p in layer.local_tensors(name).values())


def test_outputs_are_those_of_the_adapters_that_are_shown():
    module = mlp()
    add_shared_adapter(module)
    x = torch.ones(1, 4)
    base = module[0](x)
    module[0].colora_B[ADAPTER].data.fill_(1.0)
    module[0].colora_B[SHARED].data.fill_(10.0)
    own = module[0](x) - base

    with shows(module, SHARED):
        assert torch.allclose(module[0](x) - base, 10 * own)
    show(module, ADAPTER, SHARED)

    assert torch.allclose(module[0](x) - base, 11 * own)


def test_the_second_one_is_exchanged_and_both_are_saved():
    module = mlp(global_branch=True)
    add_shared_adapter(module)

    load_local(module, SharedTensors(FlatTensors.pack({"main/0/linear/Q": torch.ones(2)})))

    assert shared_tensors(module).common.unpack()["main/0/linear/Q"].tolist() == [1.0, 1.0]
    assert module[2].colora_Q[ADAPTER].tolist() == [0.0, 0.0]
    assert {"2.colora_Q.default", "2.colora_Q.shared"} <= adapter_state(module).keys()
    assert {exchanged(module[0]), exchanged(module[2])} == {SHARED}


def test_a_folder_for_one_adapter_refuses_the_sum_of_two(tmp_path):
    module = mlp()
    add_shared_adapter(module)
    show(module, ADAPTER, SHARED)

    with pytest.raises(ValueError, match=r"those of the adapters \['default', 'shared'\] together"):
        CoLoRA.export(module, tmp_path)
