"""Promises of `lightning_pfl.adapters.tensors`: what crosses between clients, and what a checkpoint holds."""

from __future__ import annotations

import pytest
import torch

from lightning_pfl.adapters import (
    Additive,
    CoLoraConfig,
    FixedGate,
    adapter_parameters,
    adapter_state,
    add_global_branch,
    architecture_of,
    bases_of,
    inject,
    load_global,
    load_local,
    set_bases,
    shared_tensors,
)
from lightning_pfl.types import FlatTensors, SharedTensors
from tests.adapters.tiny import gemma3, gpt2, llama, mlp, output, qwen2, scramble


def adapted(model, **config):
    inject(model, CoLoraConfig(**{"r": 4, "alpha": 8, "num_blocks": 2, **config}))
    return model


def names(shared):
    return set(shared.common.layout.names), set(shared.same_architecture.layout.names)


def test_what_is_shared_has_common_names_across_families_and_own_names_within_one():
    shallow, deep, other = adapted(llama(3)), adapted(gemma3(5)), adapted(gpt2())

    common, own = names(shared_tensors(shallow))
    roles = ("q", "k", "v", "o", "gate", "up", "down")
    assert common == {f"main/{b}/{role}/{letter}" for b in (0, 1) for role in roles for letter in "PQ"}
    assert common == names(shared_tensors(deep))[0]
    assert {"main/0/qkv/P", "main/0/o/Q"} <= names(shared_tensors(other))[0]
    # of three blocks, number 1 (0 is the end of the first part) is conventional
    modules = ("self_attn.q_proj", "mlp.down_proj")
    assert {f"model.layers.1.{m}.{letter}" for m in modules for letter in "AB"} <= own
    assert len(own) == 7 * 2


def test_a_clients_tensors_travel_to_another_model_and_come_back():
    sender, receiver = adapted(llama(3)), adapted(gemma3(5))
    scramble(sender)
    sent = shared_tensors(sender)

    load_local(receiver, SharedTensors(common=sent.common))

    back = shared_tensors(receiver)
    assert torch.equal(back.common.vector, sent.common.vector)
    assert torch.equal(back.same_architecture.vector, shared_tensors(adapted(gemma3(5))).same_architecture.vector)


def test_what_is_shared_is_a_copy():
    model = adapted(mlp())
    shared = shared_tensors(model)
    before = shared.common.vector.clone()
    scramble(model)
    assert torch.equal(shared.common.vector, before)


def test_a_loaded_model_gives_the_senders_output():
    sender, receiver = adapted(llama()), adapted(llama())
    scramble(sender)

    load_local(receiver, shared_tensors(sender))

    assert torch.equal(output(receiver), output(sender))
    assert all(p.requires_grad for p in adapter_parameters(receiver).pq.values())


def test_loading_the_global_branch_leaves_the_local_one_alone_and_needs_one():
    sender, receiver = adapted(mlp()), adapted(mlp())
    scramble(sender)
    with pytest.raises(ValueError, match=r"no global branch to load into. Call `add_global_branch"):
        load_global(receiver, shared_tensors(sender))
    add_global_branch(receiver)
    own = shared_tensors(receiver)

    load_global(receiver, shared_tensors(sender))

    assert torch.equal(shared_tensors(receiver).common.vector, own.common.vector)
    assert torch.equal(shared_tensors(receiver).same_architecture.vector, own.same_architecture.vector)
    sent = shared_tensors(sender).common.unpack()
    assert torch.equal(receiver[2].colora_global_P["default"], sent["main/0/linear/P"])
    assert torch.equal(receiver[6].colora_global_Q["default"], sent["main/1/linear/Q"])


def test_a_name_that_is_not_sent_keeps_its_value():
    model = adapted(mlp())
    scramble(model)
    before = shared_tensors(model).common.unpack()

    load_local(model, SharedTensors(FlatTensors.pack({"main/1/linear/Q": torch.arange(4.0)})))

    after = shared_tensors(model).common.unpack()
    assert after["main/1/linear/Q"].tolist() == [0, 1, 2, 3]
    assert all(torch.equal(after[name], before[name]) for name in before if name != "main/1/linear/Q")


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"common": {"main/2/linear/P": torch.eye(4)}}, r"`main/2/linear/P`, which the Sequential does not have"),
        ({"common": {"main/1/linear/P": torch.eye(2)}}, r"must have the shape \(4, 4\).* came as \(2, 2\)"),
        ({"same_architecture": {"main/0/linear/P": torch.eye(4)}}, r"does not have. It has \['0.A'"),
    ],
)
def test_an_unknown_name_or_another_shape_is_refused_and_nothing_is_written(sent, message):
    model = adapted(mlp())
    good = {"main/0/linear/Q": torch.ones(4)}
    shared = SharedTensors(**{**{"common": FlatTensors.pack(good)}, **{
        part: FlatTensors.pack({**(good if part == "common" else {}), **tensors}) for part, tensors in sent.items()
    }})  # fmt: skip

    with pytest.raises(ValueError, match=message):
        load_local(model, shared)

    assert shared_tensors(model).common.vector.abs().max() == 0


def test_architecture_is_that_of_models_whose_layers_can_be_mixed():
    reference = architecture_of(adapted(llama()))

    trained = adapted(llama())
    scramble(trained)
    add_global_branch(trained)
    assert architecture_of(trained) == reference
    others = [
        adapted(llama(3)), adapted(qwen2()), adapted(llama(intermediate_size=25)), adapted(llama(), r=2),
        adapted(llama(), alpha=4), adapted(llama(), num_blocks=4), adapted(llama(), seed=1),
        adapted(llama(), private_layers=False),
    ]  # fmt: skip
    assert len({architecture_of(other) for other in others} | {reference}) == len(others) + 1


def test_parameters_come_in_three_groups_under_their_own_names():
    model = adapted(mlp())
    assert not adapter_parameters(model).gates
    add_global_branch(model)

    groups = adapter_parameters(model)

    assert list(groups.pq) == [f"{i}.colora_{x}.default" for i in (2, 6) for x in "PQ"]
    assert list(groups.ab) == [f"{i}.colora_{x}.default" for i in (0, 4) for x in "AB"]
    assert list(groups.gates) == [f"{i}.colora_gate.default" for i in (0, 2, 4, 6)]
    every = {**groups.pq, **groups.ab, **groups.gates}
    own = dict(model.named_parameters())
    assert all(own[name] is parameter for name, parameter in every.items())
    assert {name for name, p in own.items() if p.requires_grad} == set(every)


def test_a_checkpoint_of_adapters_only_restores_them_and_leaves_rebuilt_bases_out():
    model = adapted(llama())
    add_global_branch(model)
    scramble(model)
    state = adapter_state(model)
    assert set(state) <= set(model.state_dict())
    assert not any("basis" in name or "aligned" in name for name in state)

    fresh = adapted(llama())
    add_global_branch(fresh)
    assert not fresh.load_state_dict(state, strict=False).unexpected_keys

    assert torch.equal(output(fresh), output(model))


def test_aligned_bases_are_used_and_kept_by_a_checkpoint():
    model = adapted(mlp())
    scramble(model)
    before = output(model)
    A, B = torch.randn(4, 8), torch.randn(8, 4)

    set_bases(model, {"main/1/linear": (A, B)})

    assert not torch.allclose(output(model), before)
    assert torch.equal(bases_of(model)["main/1/linear"][0], A)
    state = adapter_state(model)
    assert {name for name in state if "basis" in name} == {f"6.colora_basis_{x}.default" for x in "AB"}
    fresh = adapted(mlp())
    fresh.load_state_dict(state, strict=False)
    assert torch.equal(output(fresh), output(model))
    assert set(adapter_state(fresh)) == set(state), "that bases are aligned is part of the state"


@pytest.mark.parametrize(
    ("address", "A", "message"),
    [
        ("main/7/linear", torch.ones(4, 8), r"`main/7/linear`, which the Sequential does not have"),
        ("main/0/linear", torch.ones(4, 9), r"`main/0/linear/A` must have the shape \(4, 8\)"),
    ],
)
def test_bases_that_do_not_fit_are_refused(address, A, message):
    with pytest.raises(ValueError, match=message):
        set_bases(adapted(mlp()), {address: (A, torch.ones(8, 4))})


def other_rank(module, rank):
    """G of one conventional layer in another rank, and what it adds to that layer's weight."""
    name = next(iter(shared_tensors(module).same_architecture.layout.factors))
    mine = shared_tensors(module).same_architecture.unpack()
    generator = torch.Generator().manual_seed(rank)
    A = torch.randn(rank, mine[f"{name}.A"].shape[1], generator=generator)
    B = torch.randn(mine[f"{name}.B"].shape[0], rank, generator=generator)
    return name, A, B


@pytest.mark.parametrize("rank", [1, 6])
def test_the_global_branch_takes_factors_of_another_rank_and_keeps_them_in_a_state_dict(rank):
    module = adapted(llama(3), global_branch=True, gate=FixedGate(Additive(), value=1.0))
    name, A, B = other_rank(module, rank)

    load_global(module, SharedTensors(same_architecture=FlatTensors.pack({f"{name}.A": A, f"{name}.B": B})))

    layer = module.get_submodule(name)
    torch.testing.assert_close(layer.delta_weight("default")[0], 2.0 * B @ A)
    x = torch.randn(3, A.shape[1])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 2.0 * x @ A.T @ B.T, rtol=1e-4, atol=1e-4)
    again = adapted(llama(3), global_branch=True, gate=FixedGate(Additive(), value=1.0))
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.get_submodule(name).colora_global_A["default"], A)
    assert again.get_submodule(name)(x).equal(layer(x))


def test_a_local_branch_takes_no_other_rank_and_a_global_one_no_other_width():
    module = adapted(llama(3), global_branch=True)
    name, A, B = other_rank(module, 6)

    with pytest.raises(ValueError, match=rf"`{name}.A` must have the shape"):
        load_local(module, SharedTensors(same_architecture=FlatTensors.pack({f"{name}.A": A, f"{name}.B": B})))
    with pytest.raises(ValueError, match=rf"`{name}.A` must have the shape"):
        load_global(module, SharedTensors(same_architecture=FlatTensors.pack({f"{name}.A": A})))  # without its partner
    wide = SharedTensors(same_architecture=FlatTensors.pack({f"{name}.A": torch.cat([A, A], dim=1), f"{name}.B": B}))
    with pytest.raises(ValueError, match=rf"`{name}.A` must have the shape"):
        load_global(module, wide)
    state = {**module.state_dict(), f"{name}.colora_A.default": A}
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict(state)
