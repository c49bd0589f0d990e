"""Every client holds all adapters and answers a question with those whose owners trained on such questions."""

import copy
from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pfl.adapters import adapter_state
from lightning_pfl.aggregation import FedAvg, LocalOnly, RelevanceAggregator, UniformAggregator
from lightning_pfl.aggregation.guard import UpdateGuard
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.callbacks.federated import KeySource
from lightning_pfl.callbacks.routing_keys import RoutingKeys
from lightning_pfl.errors import FederationError
from lightning_pfl.federation import Client, Experts
from lightning_pfl.federation.privacy import Privacy, PrivacyBudget
from lightning_pfl.functional.mechanisms import UpdateNoise
from lightning_pfl.functional.relevance import Uniform
from lightning_pfl.functional.routing import Blend, Keys, Nearest
from lightning_pfl.functional.wire import Bfloat16, Int8
from lightning_pfl.relevance import Reader
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors
from tests.federation.runs import assert_equal_states, strategy_of, trainer_of
from tests.federation.tiny import Blocks, WideBlocks

CENTRES = {"north": (6.0, 0.0, 0.0, 0.0), "south": (-6.0, 0.0, 0.0, 0.0)}


def questions(kind, count, seed):
    return torch.tensor(CENTRES[kind]) + torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


class TwoPlaces(L.LightningDataModule):
    """Clients `north*` are asked around one place and learn that the answer is 3, `south*` around another, -3."""

    def loader(self, seed):
        client_id = self.trainer.strategy.client_id
        kind = client_id.split("-")[0]
        x = questions(kind, 16, seed + sum(map(ord, client_id)))
        y = torch.full((16, 1), 3.0 if kind == "north" else -3.0)
        return DataLoader(TensorDataset(x, y), batch_size=4)

    def train_dataloader(self):
        return self.loader(0)

    def val_dataloader(self):
        return self.loader(10_000)


class Inputs(Reader):
    """A question is what it is."""

    def prepare(self):
        pass

    def read(self, batch):
        return batch[0].cpu()


class Silent(KeySource):
    def take_keys(self):
        return None

    def read(self, batch):
        raise AssertionError("nobody asks")


def callbacks():
    colora = CoLoRA(rank=2, alpha=4, num_blocks=1, target_modules=["fc"], private_layers=False)
    return [colora, RoutingKeys(Inputs(), num_keys=2)]


def federation(**arguments):
    ids = ("north-a", "north-b", "south-a", "south-b")
    clients = [Client(one, model=WideBlocks if one.endswith("b") else None) for one in ids]
    return strategy_of(clients, **{"share": (), "aggregator": LocalOnly(), **arguments})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Each place on a narrow and on a wide model, two rounds, nothing exchanged in training."""
    strategy, folder = federation(), tmp_path_factory.mktemp("run")
    keep = ModelCheckpoint(folder, save_last=True)
    trainer = trainer_of(folder, strategy, max_epochs=2, enable_checkpointing=True, callbacks=[*callbacks(), keep])
    trainer.fit(Blocks(), datamodule=TwoPlaces())
    return strategy, keep.last_model_path


def outputs(module, batch):
    return module(batch[0])


def owned_by(experts, *owners):
    """Weights by which one owner's adapter answers each question."""
    return torch.stack([torch.tensor([float(one == owner) for one in experts.owners]) for owner in owners])


def owners_of(experts, x):
    weights = experts.weigh(experts.read([x]))
    assert (weights.max(dim=1).values == 1).all()
    return [experts.owners[place] for place in weights.argmax(dim=1).tolist()]


def with_adapter_of(strategy, client_id, owner):
    """A client's module with another's P and Q written into it by hand."""
    module, other = strategy.personalize(Blocks(), client_id), strategy.personalize(Blocks(), owner)
    own, theirs = adapter_state(module), adapter_state(other)
    for name in own:
        if "colora_P" in name or "colora_Q" in name:
            assert theirs[name].any()
            dict(module.named_parameters())[name].data.copy_(theirs[name])
    return module


def test_each_question_is_answered_with_the_adapter_of_who_trained_on_such_ones(run):
    """Worked by hand: the client's own module, and the same with the other's P and Q."""
    strategy, _ = run
    experts = strategy.experts(Blocks(), "north-a", answering=Nearest())
    x = torch.cat([questions("south", 2, 1), questions("north", 2, 2), questions("south", 1, 3)])

    owners = owners_of(experts, x)
    answered = experts.answer([x], outputs)

    assert [owner[:5] for owner in owners] == ["south", "south", "north", "north", "south"]
    assert owners[2] == owners[3] == "north-a"  # its relative is asked what is as near to both, not it
    for row, owner in enumerate(owners):
        with torch.no_grad():
            expected = with_adapter_of(strategy, "north-a", owner)(x[row : row + 1])
        torch.testing.assert_close(answered[row : row + 1], expected)


def test_questions_of_ones_own_kind_stay_there_and_are_mostly_ones_own_to_answer(run):
    """In four coordinates chance makes a relative much nearer at times; what is one's own is answered as alone."""
    strategy, _ = run
    for client_id in strategy.client_ids:
        experts = strategy.experts(Blocks(), client_id, answering=Nearest(margin=3))
        alone = strategy.personalize(Blocks(), client_id)
        x = questions(client_id.split("-")[0], 20, 5)

        owners = owners_of(experts, x)
        own = torch.tensor([owner == client_id for owner in owners])

        assert {owner[:5] for owner in owners} == {client_id[:5]}
        assert own.float().mean() > 0.7
        with torch.no_grad():
            torch.testing.assert_close(experts.answer([x], outputs)[own], alone(x)[own])


def test_near_owners_answer_by_the_mean_of_their_adapters(run):
    """By hand: the mean of P and Q of both owners of a place, the own one counting a quarter more where it is one."""
    strategy, _ = run
    experts = strategy.experts(Blocks(), "north-a", answering=Blend(reach=1000, own=0.25))
    near = Blend(reach=1000).weights(torch.tensor([[1.0, 2.0, 5e3, 5e3]]), own=0)
    assert near.tolist() == [[0.625, 0.375, 0, 0]]
    x = torch.cat([questions("north", 1, 2), questions("south", 1, 1)])
    weights = torch.tensor([[0.625, 0.375, 0, 0], [0, 0, 0.5, 0.5]])

    answered = experts.answer([x], outputs, weights=weights)

    for row, (shares, pair) in enumerate(
        [((0.625, 0.375), ("north-a", "north-b")), ((0.5, 0.5), ("south-a", "south-b"))]
    ):
        module = strategy.personalize(Blocks(), "north-a")
        states = [adapter_state(strategy.personalize(Blocks(), owner)) for owner in pair]
        for name, parameter in module.named_parameters():
            if "colora_P" in name or "colora_Q" in name:
                parameter.data.copy_(sum(share * state[name] for share, state in zip(shares, states, strict=True)))
        with torch.no_grad():
            torch.testing.assert_close(answered[row], module(x[row : row + 1])[0])


def test_who_is_near_is_told_by_the_question(run):
    strategy, _ = run
    experts = strategy.experts(Blocks(), "north-a")
    for kind in ("north", "south"):
        weights = experts.weigh(experts.read([questions(kind, 20, 7)]))
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(20))
        counted = {owner for owner, weight in zip(experts.owners, weights.sum(dim=0), strict=True) if weight}
        assert counted == {f"{kind}-a", f"{kind}-b"}


def test_questions_of_one_mixture_are_asked_in_one_call(run):
    strategy, _ = run
    experts, sizes = strategy.experts(Blocks(), "north-a"), []

    def counted(module, batch):
        sizes.append(len(batch[0]))
        return module(batch[0])

    weights = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0]])
    experts.answer([questions("north", 3, 1)], counted, weights=weights)
    assert sorted(sizes) == [1, 2]


def test_afterwards_the_module_is_what_it_was(run):
    """Also when an answer fails half-way."""
    strategy, _ = run
    experts = strategy.experts(Blocks(), "north-a")
    before = copy.deepcopy(experts.module.state_dict())

    def fails(module, batch):
        raise RuntimeError("no answer")

    experts.answer([questions("south", 3, 1)], outputs)
    with pytest.raises(RuntimeError, match="no answer"):
        experts.answer([questions("south", 3, 1)], fails)

    assert_equal_states(dict(experts.module.state_dict()), dict(before))
    assert not experts.module.training


def test_it_costs_the_others_adapters_and_keys(run):
    """P and Q of one linear at rank 2 are six numbers; two groups of nine numbers are a client's keys."""
    strategy, _ = run
    assert strategy.experts(Blocks(), "north-a").nbytes == 3 * 4 * (6 + 2 * 9)
    assert strategy.traffic["north-a"].up == 2 * 4 * (6 + 2 * 9)  # in each of two rounds


def test_batches_may_be_mappings_and_have_weights_given(run):
    strategy, _ = run
    experts = strategy.experts(Blocks(), "north-a")
    x, seen = questions("south", 2, 1), []

    def inner(module, batch):
        seen.append(batch["pair"][1].tolist())
        return module(batch["pair"][0])

    found = experts.answer({"pair": (x, torch.arange(2))}, inner, weights=owned_by(experts, "north-a", "south-b"))

    assert sorted(seen) == [[0], [1]]  # everything in a batch is dealt out alike
    assert torch.equal(found[:1], experts.answer([x[:1]], outputs, weights=owned_by(experts, "north-a")))
    assert torch.equal(found[1:], experts.answer([x[1:]], outputs, weights=owned_by(experts, "south-b")))


def test_after_aggregation_everybodys_adapter_is_what_the_server_has_made_of_it(tmp_path):
    """Under FedAvg all experts are one; as their last turns have left them they differ."""
    strategy = federation(aggregator=FedAvg())
    trainer_of(tmp_path, strategy, max_epochs=1, callbacks=callbacks()).fit(Blocks(), datamodule=TwoPlaces())
    x = questions("south", 2, 1)

    def answers(owner, *, aggregated):
        experts = strategy.experts(Blocks(), "north-a", aggregated=aggregated)
        return experts.answer([x], outputs, weights=owned_by(experts, owner, owner))

    torch.testing.assert_close(answers("south-a", aggregated=True), answers("north-a", aggregated=True))
    assert not torch.allclose(answers("south-a", aggregated=False), answers("north-a", aggregated=False))


def test_keys_and_adapters_are_in_the_checkpoint(run, tmp_path):
    """A run that is loaded answers alike; one that goes on gives the bits of one that did not stop."""
    strategy, path = run
    loaded = federation()
    trainer_of(tmp_path, loaded, callbacks=callbacks()).validate(
        Blocks(), datamodule=TwoPlaces(), ckpt_path=path, verbose=False
    )
    x = torch.cat([questions("south", 3, 1), questions("north", 3, 2)])
    one, other = (each.experts(Blocks(), "south-b") for each in (strategy, loaded))
    assert torch.equal(one.answer([x], outputs), other.answer([x], outputs))

    whole, goes_on = federation(), federation()
    trainer_of(tmp_path, whole, max_epochs=3, callbacks=callbacks()).fit(Blocks(), datamodule=TwoPlaces())
    trainer_of(tmp_path, goes_on, max_epochs=3, callbacks=callbacks()).fit(
        Blocks(), datamodule=TwoPlaces(), ckpt_path=path
    )
    for client_id, known in whole._state.experts.items():
        assert known.keys[:, 0].sum() == 3 * 16
        assert torch.equal(goes_on._state.experts[client_id].keys, known.keys)
        assert torch.equal(goes_on._state.experts[client_id].common.vector, known.common.vector)


@pytest.mark.parametrize("wire", [Bfloat16(), Int8()], ids=["bfloat16", "int8"])
def test_keys_are_not_rounded_on_the_wire(tmp_path, run, wire):
    """The first round's are the same as without a format; counts would not survive one."""
    plain, written = federation(), federation(wire=wire)
    for strategy in (plain, written):
        trainer_of(tmp_path, strategy, max_epochs=1, callbacks=callbacks()).fit(Blocks(), datamodule=TwoPlaces())
    for client_id, known in plain._state.experts.items():
        assert torch.equal(written._state.experts[client_id].keys, known.keys)
        assert written.traffic[client_id].up >= 8 + known.keys.numel() * 4
    experts = written.experts(Blocks(), "north-a", answering=Nearest())
    assert owners_of(experts, questions("south", 1, 1))[0].startswith("south")


def test_what_cannot_be_is_refused_with_the_reason(run, tmp_path):
    strategy, _ = run
    experts = strategy.experts(Blocks(), "north-a")
    with pytest.raises(ValueError, match="no client `east`"):
        strategy.experts(Blocks(), "east")
    with pytest.raises(TypeError, match="WideBlocks"):
        strategy.experts(WideBlocks(), "north-a")
    with pytest.raises(ValueError, match=r"2 questions needs finite weights of 4 owners for each, but has \(1, 4\)"):
        experts.answer([torch.zeros(2, 4)], outputs, weights=owned_by(experts, "north-a"))
    with pytest.raises(ValueError, match="some that are not finite"):
        experts.answer([torch.zeros(1, 4)], outputs, weights=owned_by(experts, "north-a") / 0)
    with pytest.raises(ValueError, match="holds a str"):
        experts.answer([torch.zeros(2, 4), "text"], outputs, weights=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="lengths are"):
        experts.answer([torch.zeros(2, 4), torch.zeros(3)], outputs, weights=torch.zeros(2, 4))
    keyless = federation()
    trainer_of(tmp_path, keyless, max_epochs=1, callbacks=callbacks()[:1]).fit(Blocks(), datamodule=TwoPlaces())
    with pytest.raises(FederationError, match="RoutingKeys"):
        keyless.experts(Blocks(), "north-a")


def test_a_client_that_never_took_part_has_no_keys(tmp_path):
    strategy = federation(fraction=0.5)
    trainer_of(tmp_path, strategy, max_epochs=1, callbacks=callbacks()).fit(Blocks(), datamodule=TwoPlaces())
    (first, second), absent = sorted(strategy._state.experts), set(strategy.client_ids) - set(strategy._state.experts)
    assert strategy.experts(Blocks(), first).owners == (first, second)
    with pytest.raises(ValueError, match="has not sent any keys"):
        strategy.experts(Blocks(), absent.pop())


def test_a_private_run_and_one_with_a_global_branch_refuse_keys_before_anything_runs(tmp_path):
    privacy = Privacy(budget=PrivacyBudget(8, 1e-5), updates=UpdateNoise(1.0, 1.0))
    with pytest.raises(ValueError, match="no noise hides that"):
        trainer_of(tmp_path, federation(privacy=privacy), callbacks=callbacks()).fit(Blocks(), datamodule=TwoPlaces())
    with pytest.raises(ValueError, match="a rule without a global branch"):
        trainer_of(tmp_path, federation(aggregator=UniformAggregator()), callbacks=callbacks()).fit(
            Blocks(), datamodule=TwoPlaces()
        )
    with pytest.raises(ValueError, match="one set of keys"):
        trainer_of(tmp_path, federation(), callbacks=[*callbacks(), Silent()]).fit(Blocks(), datamodule=TwoPlaces())


def test_an_owner_without_a_layer_has_zero_there_and_one_of_another_rank_is_refused():
    module = L.LightningModule()
    module.layer = nn.Linear(2, 2, bias=False)

    class Weight:
        def upload(self, module):
            return SharedTensors(FlatTensors.pack({"P": module.layer.weight}))

        def receive(self, module, personalized):
            module.layer.weight.data.copy_(personalized.start.common.unpack()["P"])

    def make(adapter):
        keys = {"a": Keys.of(torch.zeros(1, 2), limit=1), "b": Keys.of(torch.ones(1, 2), limit=1)}
        adapters = {"a": FlatTensors.empty(), "b": FlatTensors.pack(adapter)}
        return Experts(
            module, exchange=Weight(), source=None, client_id="a", adapters=adapters, keys=keys, answering=Nearest()
        )

    experts = make({"Q": torch.ones(3)})
    found = experts.answer(torch.ones(1, 2), lambda module, x: module.layer(x), weights=owned_by(experts, "b"))
    assert found.tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="`P` must have one shape on all clients"):
        make({"P": torch.ones(3, 3)})


@pytest.mark.parametrize(
    ("keys", "message"),
    [(torch.ones(1, 5).double(), "its keys must be float32"), (torch.ones(1, 7), "must have 5 numbers in a row")],
)
def test_the_guard_leaves_out_keys_that_nobody_could_read(keys, message):
    """The others' keys have five numbers in a row."""
    shared = SharedTensors(FlatTensors.pack({"P": torch.ones(1)}))
    good = [ClientUpdate(f"ward-{n}", 0, 10, "tiny", shared, keys=torch.ones(2, 5)) for n in range(3)]

    seen = UpdateGuard().inspect([*good, replace(good[0], client_id="odd", keys=keys)])

    assert len(seen.accepted) == 3
    assert message in seen.rejected["odd"]


def test_ours_routes_beside_the_relevance_of_its_sketches(tmp_path):
    """Keys are no sketch: with uniform weights the pull is the same with and without them."""
    rule = RelevanceAggregator(Uniform(), pull=0.5)
    plain, keyed = federation(aggregator=rule), federation(aggregator=rule)
    trainer_of(tmp_path, plain, max_epochs=2, callbacks=callbacks()[:1]).fit(Blocks(), datamodule=TwoPlaces())
    trainer_of(tmp_path, keyed, max_epochs=2, callbacks=callbacks()).fit(Blocks(), datamodule=TwoPlaces())
    for client_id in plain.client_ids:
        states = (one.personalize(Blocks(), client_id).state_dict() for one in (plain, keyed))
        assert_equal_states(*(dict(state) for state in states))
