"""Federated runs whose clients and server write to each other in a wire format."""

from dataclasses import replace

import pytest
import torch

from lightning_pfl.aggregation import FedAvg, UniformAggregator, UpdateGuard
from lightning_pfl.errors import CheckpointMismatchError, RejectedUpdateError
from lightning_pfl.federation import Client, ClientPool, LocalPool, Privacy, RayPool
from lightning_pfl.federation.history import Traffic
from lightning_pfl.federation.turn import unpack_state
from lightning_pfl.functional.accounting import PrivacyBudget
from lightning_pfl.functional.mechanisms import ClientNoise, UpdateNoise
from lightning_pfl.functional.wire import Bfloat16, Float32, Int8, LargestChanges
from lightning_pfl.types import Letter, UpdateLetter
from tests.federation.runs import assert_equal_states, strategy_of, trainer_of
from tests.federation.test_privacy import Spy, probe
from tests.federation.test_resume import fit, outcome
from tests.federation.test_strategy import STARTS, FixedSketch, Starts, colora
from tests.federation.tiny import Blocks, ClientsOwnData, Tiny, WideBlocks

ENCODER = 4 * 8 + 8
HEAD = 21  # bytes of a letter before its numbers
FORMATS = [Bfloat16(), Int8(block=16), LargestChanges(0.25, values=Float32())]


def run(tmp_path, wire, rounds=3, *, clients=("a", "b"), module=None, callbacks=(), **arguments):
    strategy = strategy_of(clients, wire=wire, **{"aggregator": Spy(FedAvg()), **arguments})
    trainer = trainer_of(tmp_path, strategy, max_epochs=rounds, callbacks=list(callbacks))
    trainer.fit(module or Tiny(), datamodule=ClientsOwnData())
    return strategy


def is_bfloat16(tensor):
    return torch.equal(tensor, tensor.bfloat16().float())


def test_what_travels_is_rounded_in_both_directions_and_what_a_client_keeps_is_not(tmp_path):
    strategy = run(tmp_path, Bfloat16(), callbacks=[Starts()])

    for round, seen in enumerate(strategy.aggregator.seen):
        for client_id, update in seen.items():
            assert is_bfloat16(update.shared.common.vector)
            if round:
                assert is_bfloat16(STARTS[client_id, round]["encoder.weight"])
            assert not is_bfloat16(STARTS[client_id, round]["head.weight"])
    assert not is_bfloat16(unpack_state(strategy.store.get("a"))["state_dict"]["encoder.weight"])
    assert torch.equal(STARTS["a", 2]["encoder.weight"], STARTS["b", 2]["encoder.weight"])


@pytest.mark.parametrize(
    ("wire", "first", "later"),
    [
        (Bfloat16(), 2 * ENCODER, 2 * ENCODER),
        (Int8(block=16), ENCODER + 4 * 3, ENCODER + 4 * 3),
        (LargestChanges(0.25, values=Float32()), 4 * ENCODER, 10 * (2 + 4)),
    ],
    ids=repr,
)
def test_bytes_are_counted_by_round_client_and_direction(tmp_path, wire, first, later):
    """The first letter up also says which tensors it holds; by the time anything goes down both sides know."""
    strategy = run(tmp_path, wire)

    rounds = [one.by_client for one in strategy.traffic_by_round]
    assert [sorted(one) for one in rounds] == [["a", "b"]] * 3
    spelled = rounds[0]["a"].up - HEAD - first
    assert 0 < spelled < 100
    assert [one["a"].up - HEAD for one in rounds] == [first + spelled, later, later]
    down = HEAD + wire.dense.nbytes([8, 32])
    assert [one["b"].down for one in rounds] == [down] * 3  # what was aggregated is evaluated in its own round
    for client_id in "ab":
        assert sum((one[client_id] for one in rounds), Traffic()) == strategy.traffic[client_id]


def test_bytes_so_far_are_logged(tmp_path):
    strategy = strategy_of(["a", "b"])
    trainer = trainer_of(tmp_path, strategy, max_epochs=2, limit_val_batches=0)
    trainer.fit(Tiny(), datamodule=ClientsOwnData())

    assert trainer.callback_metrics["traffic/up"] == 2 * 2 * 4 * ENCODER
    assert trainer.callback_metrics["traffic/down"] == 2 * 4 * ENCODER


TRAINED = {}


class Trained(Tiny):
    """Notes in this process what each client has trained in each round."""

    def on_train_epoch_end(self):
        key = (self.trainer.strategy.client_id, self.trainer.strategy.round)
        TRAINED[key] = torch.cat([self.encoder.bias.detach(), self.encoder.weight.detach().flatten()]).clone()


def test_what_is_held_back_is_sent_later(tmp_path):
    """Under FedAvg the server writes over what clients trained, so that only what they hold back still knows it."""
    held_back = []

    class Remember(Spy):
        def aggregate(self, updates, state):
            if self.seen:
                carried = unpack_state(strategy.store.get("a"))["federated_client"]
                held_back.append(carried["held_back"][0]["vector"])
            return super().aggregate(updates, state)

    strategy = strategy_of(["a", "b"], aggregator=Remember(FedAvg()), wire=LargestChanges(0.1, values=Float32()))
    trainer_of(tmp_path, strategy, max_epochs=4).fit(Trained(), datamodule=ClientsOwnData())

    seen = [[one[client_id].shared.common.vector for client_id in "ab"] for one in strategy.aggregator.seen]
    assert torch.equal(seen[0][0], TRAINED["a", 0])  # the first update is sent whole
    assert not held_back[0].any()
    for round in (1, 2):
        start = (seen[round - 1][0] + seen[round - 1][1]) / 2
        assert ((seen[round][0] - start).abs() > 1e-6).sum() == 4  # a tenth of 40 numbers
        due = TRAINED["a", round] + held_back[round - 1]
        torch.testing.assert_close(held_back[round], due - seen[round][0])
        assert held_back[round].abs().max() > 0


def test_an_adapter_that_nobody_writes_over_arrives_whole_in_the_end(tmp_path):
    """P and Q are the client's own: once training stands still, a few rounds bring the server's copy up to them."""

    class Still(Blocks):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 2 else 0.0)
            return [optimizer], [scheduler]

    aggregator, wire = Spy(UniformAggregator()), LargestChanges(0.34, values=Float32())
    strategy = run(tmp_path, wire, 6, module=Still(), callbacks=[colora()], share=(), aggregator=aggregator)

    held_back = unpack_state(strategy.store.get("a"))["federated_client"]["held_back"]
    sent = [seen["a"].shared.common.vector for seen in aggregator.seen]
    assert not torch.equal(sent[1], sent[2])  # training has stopped by then
    assert not held_back[0]["vector"].any()


@pytest.mark.parametrize("wire", FORMATS, ids=repr)
def test_resuming_equals_not_stopping(tmp_path, wire):
    def whole(folder, rounds, **arguments):
        clients = ["a", "b", "c", Client("wide", model=WideBlocks)]
        strategy = strategy_of(clients, share=(), fraction=0.75, wire=wire)
        callbacks = [colora(dropout=0.2), FixedSketch()]
        fit(folder, strategy, rounds, module=Blocks(), callbacks=callbacks, **arguments)
        return strategy

    expected = whole(tmp_path / "whole", 4)
    whole(tmp_path / "parts", 2)

    resumed = whole(tmp_path / "parts", 4, ckpt_path=tmp_path / "parts" / "epoch=1.ckpt")

    assert_equal_states(outcome(tmp_path / "parts" / "epoch=3.ckpt"), outcome(tmp_path / "whole" / "epoch=3.ckpt"))
    assert resumed.traffic == expected.traffic
    got, wanted = ([one.by_client for one in strategy.traffic_by_round] for strategy in (resumed, expected))
    assert got == wanted


@pytest.mark.ray
def test_local_and_ray_agree_bit_for_bit(tmp_path, ray_session):
    """With the format that uses all of them: bytes for values, places for changes, a residual in the private state."""
    for name, pool in {"local": LocalPool(), "ray": RayPool(num_actors=2)}.items():
        clients = ["a", "b", Client("wide", model=WideBlocks)]
        wire = LargestChanges(0.25, values=Int8(block=16))
        strategy = strategy_of(clients, pool=pool, share=(), wire=wire)
        fit(tmp_path / name, strategy, 3, module=Blocks(), callbacks=[colora(dropout=0.2), FixedSketch()])

    assert_equal_states(outcome(tmp_path / "ray" / "epoch=2.ckpt"), outcome(tmp_path / "local" / "epoch=2.ckpt"))


def test_a_checkpoint_holds_what_clients_receive_as_it_travels(tmp_path):
    strategy = strategy_of(wire=Bfloat16())
    fit(tmp_path, strategy, 2, module=Tiny())

    saved = outcome(tmp_path / "epoch=1.ckpt")["federated"]["personalized"]["a"]

    (frozen, start) = saved["letters"]
    assert frozen is None
    assert sum(piece.nbytes for piece in start) == HEAD + 2 * ENCODER


@pytest.mark.parametrize("wire", [None, Int8()], ids=repr)
def test_a_checkpoint_of_another_format_is_refused(tmp_path, wire):
    fit(tmp_path, strategy_of(wire=Bfloat16()), 1, module=Tiny())

    with pytest.raises(CheckpointMismatchError, match=r"Resume with `FederatedStrategy\(wire=Bfloat16\(\)\)`"):
        fit(tmp_path, strategy_of(wire=wire), 2, module=Tiny(), ckpt_path=tmp_path / "epoch=0.ckpt")


# -- beside the guard --------------------------------------------------------------------------------------------------


class Meddles(ClientPool):
    """Changes what client `b` sends, on its way."""

    def __init__(self, change):
        self.pool, self.change = LocalPool(), change

    def start(self, clients, snapshots):
        self.pool.start(clients, snapshots)

    def submit(self, jobs):
        self.pool.submit(jobs)

    def next(self, timeout=None):
        result = self.pool.next(timeout)
        if result is not None and result.client_id == "b" and result.letter is not None:
            return replace(result, letter=self.change(result.letter))
        return result

    def cancel(self, client_ids):
        self.pool.cancel(client_ids)

    def close(self):
        self.pool.close()


BROKEN = {
    "cut off": lambda letter: UpdateLetter(Letter(letter.shared.common[:-3]), letter.sketch),
    "a pickle": lambda letter: UpdateLetter(Letter(b"\x80\x05" + bytes(50)), letter.sketch),
    "nothing written": lambda letter: None,
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_letter_that_cannot_be_read_does_not_count_and_the_round_goes_on(tmp_path, change):
    strategy = run(tmp_path, Bfloat16(), 2, clients="abc", pool=Meddles(change))

    assert [sorted(seen) for seen in strategy.aggregator.seen] == [["a", "c"]] * 2
    assert [(one.round, one.client_id) for one in strategy.left_out] == [(0, "b"), (1, "b")]
    assert "what it sent cannot be read" in strategy.left_out[0].reason
    assert strategy.store.ids() == ["a", "c"]


def test_a_strict_guard_ends_the_run_at_such_a_letter(tmp_path):
    with pytest.raises(RejectedUpdateError, match=r"'b': .*cannot be read"):
        run(
            tmp_path,
            Bfloat16(),
            clients="abc",
            pool=Meddles(BROKEN["a pickle"]),
            aggregator=FedAvg(guard=UpdateGuard(strict=True)),
        )


@pytest.mark.parametrize("wire", FORMATS, ids=repr)
def test_a_diverged_client_is_left_out_and_goes_on_from_what_counted(tmp_path, wire):
    class Diverges(Tiny):
        def on_train_epoch_end(self):
            if self.trainer.strategy.client_id == "b" and self.trainer.strategy.round == 1:
                with torch.no_grad():
                    self.encoder.weight[0, 0] = float("nan")

    strategy = run(tmp_path, wire, 3, clients="abc", module=Diverges())

    assert [sorted(seen) for seen in strategy.aggregator.seen] == [["a", "b", "c"], ["a", "c"], ["a", "b", "c"]]
    (left_out,) = strategy.left_out
    assert "must be finite" in left_out.reason


# -- beside privacy ----------------------------------------------------------------------------------------------------


def test_noise_comes_before_rounding_and_costs_the_same(tmp_path):
    """The first round's sketch and update are those of a run without a wire format, rounded."""
    seen = {}
    for name, wire in {"plain": None, "rounded": Bfloat16()}.items():
        privacy = Privacy(
            budget=PrivacyBudget(epsilon=1000, delta=1e-5),
            sketches=ClientNoise(4.0),
            updates=UpdateNoise(4.0, max_norm=1.0),
            seed=3,
        )
        strategy = run(
            tmp_path,
            wire,
            2,
            module=Blocks(),
            callbacks=[colora(), probe()],
            share=(),
            aggregator=Spy(UniformAggregator()),
            privacy=privacy,
        )
        seen[name] = strategy.aggregator.seen[0]["a"], strategy.epsilon("a")

    (plain, spent), (rounded, spent_rounded) = seen["plain"], seen["rounded"]
    assert torch.equal(rounded.sketch, plain.sketch.bfloat16().float())
    assert torch.equal(rounded.shared.common.vector, plain.shared.common.vector.bfloat16().float())
    assert not is_bfloat16(plain.sketch)
    assert spent == spent_rounded > 0


def test_what_is_sent_twice_is_paid_once(tmp_path):
    """Server and client digest the same bytes, so a budget for two rounds is enough for two, a turn run again too."""
    budget = PrivacyBudget(epsilon=1000, delta=1e-5)
    privacy = Privacy(budget=budget, updates=UpdateNoise(4.0, max_norm=1.0), seed=3)
    aggregator = Spy(UniformAggregator())
    strategy = run(
        tmp_path, Int8(), 2, module=Blocks(), callbacks=[colora()], share=(), aggregator=aggregator, privacy=privacy
    )
    ledgers = strategy._state.ledgers

    before = ledgers.epsilon("a")
    ledgers.charge(aggregator.seen[-1]["a"])

    assert ledgers.epsilon("a") == before > 0


def test_the_largest_changes_of_noised_numbers_are_refused():
    privacy = Privacy(budget=PrivacyBudget(8, 1e-5), updates=UpdateNoise(4.0, max_norm=1.0))
    with pytest.raises(ValueError, match="would then send the numbers with the largest noise"):
        strategy_of(privacy=privacy, wire=LargestChanges(0.1))


def test_a_format_that_is_none_is_refused():
    with pytest.raises(TypeError, match="`wire` must be a WireFormat, but is 'bfloat16'"):
        strategy_of(wire="bfloat16")
