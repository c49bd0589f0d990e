"""What a step costs, counted while it runs and from shapes alone; the two must agree."""

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_pfl.adapters import CoLoraConfig, InputGate, StaticGate, add_global_branch, inject
from lightning_pfl.benchmark.tiny import tiny_gemma, tiny_llama
from lightning_pfl.data import StepCost, estimated_cost, matched_steps, measured_cost

IDS = torch.arange(32).reshape(2, 16) % 30
METHODS = {
    "plain LoRA": {},
    "Co-LoRA layers only": {"private_layers": False},
    "static gate": {"gate": StaticGate()},
    "static gate, Co-LoRA layers only": {"gate": StaticGate(), "private_layers": False},
    "input gate": {"gate": InputGate()},
    "input gate, Co-LoRA layers only": {"gate": InputGate(), "private_layers": False},
}


def step(model):
    return lambda: model(input_ids=IDS, labels=IDS).loss


def adapted(make, settings):
    model = make(hidden=64, num_layers=4)
    inject(model, CoLoraConfig(r=8, alpha=16, num_blocks=2, **settings))
    if "gate" in settings:
        add_global_branch(model)
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
def test_shapes_say_what_running_counts(make, method):
    """To the operation: every product of base, adapters, gate and attention, forward and backward."""
    model = adapted(make, METHODS[method])

    assert estimated_cost(model, num_tokens=32, sequence_length=16) == measured_cost(step(model))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma])
def test_full_fine_tuning_and_no_training_at_all(make):
    frozen, trained = make(), make().requires_grad_(True)

    assert estimated_cost(trained, num_tokens=32, sequence_length=16) == measured_cost(step(trained))
    assert estimated_cost(frozen, num_tokens=32).backward == 0


def test_two_linear_layers_by_hand():
    """Forward 2 * 4 * (3 * 5 + 5 * 7); backward both weights and the second layer's input."""
    mlp = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    cost = estimated_cost(mlp, num_tokens=4)

    assert cost == StepCost(8 * 15 + 8 * 35, 8 * 15 + 8 * 35 + 8 * 35)
    assert measured_cost(lambda: mlp(torch.zeros(4, 3)).sum()) == cost
    assert estimated_cost(mlp, num_tokens=4, inputs_require_grad=True).backward == cost.backward + 8 * 15


def test_transposed_layers_of_transformers_count_too():
    layer = Conv1D(7, 5)
    cost = measured_cost(lambda: layer(torch.zeros(1, 4, 5)).sum())

    assert estimated_cost(layer, num_tokens=4) == cost == StepCost(8 * 35, 8 * 35)


def test_parts_may_see_another_number_of_tokens_or_none():
    mlp = nn.ModuleDict({"tower": nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)), "head": nn.Linear(3, 2)})
    cost = estimated_cost(mlp, num_tokens=4, tokens_of={"tower": 10, "tower.1": 0, "head": 1})

    assert cost.forward == 2 * 10 * 15 + 0 + 2 * 1 * 6


def test_parts_that_are_not_reached_cost_nothing_backward():
    """Frozen layers before the first adapter need no backward pass; those after it do."""
    config = {"private_layers": False}
    all_blocks = adapted(tiny_llama, {})
    last_layers = adapted(tiny_llama, config)

    assert (
        estimated_cost(last_layers, num_tokens=32).backward < 0.7 * estimated_cost(all_blocks, num_tokens=32).backward
    )


def test_nothing_is_computed_for_a_model_on_the_meta_device():
    with torch.device("meta"):
        layer = nn.Linear(100_000, 100_000)

    assert estimated_cost(layer, num_tokens=3).forward == 6 * 10**10


def test_a_probe_costs_its_forward_pass_now_and_then():
    probe = nn.Linear(3, 3)
    cost = measured_cost(
        lambda: nn.functional.linear(torch.zeros(2, 3), torch.ones(4, 3, requires_grad=True)).sum(),
        probe=lambda: probe(torch.zeros(5, 3)),
        probe_every=10,
    )

    assert cost == StepCost(48, 48, probe=90, probe_every=10)
    assert cost.of_round(11) == 11 * 96 + 2 * 90


def test_matched_steps_spend_at_most_the_budget():
    plain = StepCost(100, 200)
    for probe in (0, 1, 999):
        ours = StepCost(130, 210, probe, 7)
        steps = matched_steps(ours, reference=plain, reference_steps=100)
        assert ours.of_round(steps) <= plain.of_round(100) < ours.of_round(steps + 1)
    assert matched_steps(plain, reference=plain, reference_steps=100) == 100
    with pytest.raises(ValueError, match="no room for a step of 400"):
        matched_steps(StepCost(200, 200), reference=plain, reference_steps=1)


def test_the_methods_own_steps_follow_from_the_model():
    """Ours costs more than one LoRA per step, so it takes fewer steps; the paper has 94 for 100."""
    plain = estimated_cost(adapted(tiny_llama, {}), num_tokens=32)
    ours = estimated_cost(adapted(tiny_llama, {"gate": StaticGate()}), num_tokens=32)

    assert 80 < matched_steps(ours, reference=plain, reference_steps=100) < 100


def test_measuring_leaves_other_adapters_methods_counted_as_they_run():
    """PEFT's own LoRA, which the shapes know nothing of, is counted by running."""
    from peft import LoraConfig

    model = tiny_llama()
    base = measured_cost(step(model.requires_grad_(True)))
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"]), model)

    assert measured_cost(step(model)).forward == base.forward + 2 * (2 * 32 * 4 * (32 + 32))
