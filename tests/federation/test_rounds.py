"""Slow, hung, absent and failing clients: what a round does about them, on a clock that nobody waits for."""

import math
import multiprocessing

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_pfl.aggregation import Aggregator, FedAvg, UpdateGuard
from lightning_pfl.errors import ClientFailedError, FederationError, RejectedUpdateError
from lightning_pfl.federation import LocalPool
from lightning_pfl.federation.pools import Pace, SimulatedPool
from lightning_pfl.federation.rules import BelowQuorum, Decision, DropLate, RetryRound, RoundRules, SkipRound, UseLate
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.test_resume import StopAfter
from tests.federation.tiny import ClientsOwnData, Tiny


class Watch(Aggregator):
    """FedAvg that remembers what counted: per round, client, round in which it was asked, rounds late."""

    uses_global_branch = needs_sketches = False

    def __init__(self, rule=None):
        self.rule = rule or FedAvg()
        self.guard = self.rule.guard
        self.seen = []

    def aggregate(self, updates, state):
        self.seen.append([(update.client_id, update.round, update.staleness) for update in updates])
        return self.rule.aggregate(updates, state)

    def center(self, updates):
        return self.rule.center(updates)


def run(tmp_path, seconds, *, clients="abcd", rounds=1, module=None, rules=None, rule=None, horizon=None, **trainer):
    """A run among devices of some seconds a turn: by client, by client and round, else 1.

    Returns the strategy, with `pool` and `aggregator` to look at.
    """
    pool = SimulatedPool(
        lambda client_id, round: Pace(seconds=seconds.get((client_id, round), seconds.get(client_id, 1.0)))
    )
    settings = {name: trainer.pop(name) for name in ("fraction", "seed") if name in trainer}
    strategy = strategy_of(clients, pool=pool, aggregator=Watch(rule), rules=rules, **settings)
    trainer = trainer_of(tmp_path, strategy, **{"max_epochs": horizon or rounds, "limit_val_batches": 0, **trainer})
    if horizon:
        trainer.callbacks.append(StopAfter(rounds))
    trainer.fit(module or Tiny(), datamodule=ClientsOwnData())
    return strategy


def states(strategy):
    return {client_id: strategy.store.get(client_id) for client_id in strategy.store.ids()}


def counted(strategy):
    return ["".join(client_id for client_id, _, _ in round) for round in strategy.aggregator.seen]


def test_a_round_lasts_as_long_as_its_slowest_client(tmp_path):
    strategy = run(tmp_path, {"b": 7.0, ("c", 1): 20.0}, rounds=2)

    assert strategy.pool.now() == 7.0 + 20.0
    assert counted(strategy) == ["abcd", "abcd"]


def test_who_is_late_is_cancelled_at_the_deadline_and_keeps_its_state(tmp_path, caplog):
    strategy = run(tmp_path, {("d", 1): 10.5}, rounds=2, rules=RoundRules(deadline=10, quorum=0.75))

    assert strategy.pool.now() == 1.0 + 10.0
    assert counted(strategy) == ["abcd", "abc"]
    assert [(one.round, one.client_id) for one in strategy.left_out] == [(1, "d")]
    assert "is late: it was asked in round 1" in strategy.left_out[0].reason
    assert states(strategy)["d"] == states(run(tmp_path, {}, rounds=1, horizon=2))["d"]
    assert "client `d` was left out, for the 1. time; it goes on from where it was before" in caplog.text


def test_who_delivers_exactly_at_the_deadline_is_in_time(tmp_path):
    strategy = run(tmp_path, {"d": 10.0}, rules=RoundRules(deadline=10))

    assert counted(strategy) == ["abcd"]


def test_a_hung_client_costs_a_deadline_each_round_and_no_more(tmp_path):
    strategy = run(tmp_path, {"d": math.inf}, rounds=3, rules=RoundRules(deadline=10, quorum=0.5))

    assert strategy.pool.now() == 30.0
    assert counted(strategy) == ["abc"] * 3
    assert "d" not in states(strategy)


def test_a_hung_client_without_a_deadline_is_told_of_rather_than_waited_for(tmp_path):
    with pytest.raises(FederationError, match=r"clients \['d'\] never answer.*RoundRules\(deadline=\.\.\.\)"):
        run(tmp_path, {"d": math.inf})


def test_more_clients_are_asked_than_wanted_and_the_slowest_are_cancelled(tmp_path):
    """Half of four is wanted, twice as many are asked: the round ends with the second."""
    rules = RoundRules(over_select=1.0)
    strategy = run(tmp_path, {"a": 4.0, "b": 3.0, "c": 2.0}, fraction=0.5, rules=rules)

    assert counted(strategy) == ["cd"]
    assert strategy.pool.now() == 2.0
    assert strategy.store.ids() == ["c", "d"]
    assert [one.client_id for one in strategy.left_out] == ["a", "b"]


def test_late_results_join_the_round_in_which_they_come(tmp_path):
    """`d` takes 15 s of a deadline of 10: it is not asked in round 1, and there 5 s after its beginning."""
    rules = RoundRules(deadline=10, quorum=0.5, late=UseLate())
    strategy = run(tmp_path, {("d", 0): 15.0, ("a", 1): 7.0}, rounds=3, rules=rules)

    assert strategy.aggregator.seen[1] == [("a", 1, 0), ("b", 1, 0), ("c", 1, 0), ("d", 0, 1)]
    assert counted(strategy) == ["abc", "abcd", "abcd"]
    assert strategy.pool.now() == 10.0 + 7.0 + 1.0
    assert strategy.left_out == []
    # nothing of it is lost: it has two turns behind it, as the traffic says too
    up = {client_id: traffic.up for client_id, traffic in strategy.traffic.items()}
    assert up["d"] * 3 == up["a"] * 2


def test_a_late_result_is_the_same_as_it_would_have_been_in_time(tmp_path):
    rules = RoundRules(deadline=10, quorum=0.5, late=UseLate())
    late = run(tmp_path, {("d", 0): 15.0, ("a", 1): 7.0}, rounds=2, horizon=4, rules=rules)

    assert states(late)["d"] == states(run(tmp_path, {}, rounds=1, horizon=4))["d"]


def test_who_is_late_for_too_long_is_cancelled(tmp_path):
    rules = RoundRules(deadline=10, quorum=0.5, late=UseLate(max_rounds=2))
    strategy = run(tmp_path, {("d", 0): 35.0}, rounds=4, rules=rules)

    # asked in round 0 and given up at the end of round 2, since that makes it two rounds late
    assert [(one.round, one.client_id, one.reason) for one in strategy.left_out] == [
        (2, "d", "is late: it was asked in round 0")
    ]
    assert counted(strategy) == ["abc", "abc", "abc", "abcd"]


def test_evaluation_in_between_does_not_swallow_a_late_result(tmp_path):
    """Jobs are done in their order here, so the training of `c` and `d` comes while `a` and `b` are evaluated."""
    aggregator = Watch()
    strategy = strategy_of(
        "abcd", aggregator=aggregator, fraction=0.5, rules=RoundRules(over_select=1.0, late=UseLate())
    )
    trainer = trainer_of(tmp_path, strategy, max_epochs=2)

    trainer.fit(Tiny(), datamodule=ClientsOwnData())

    assert aggregator.seen[-2:] == [[("a", 0, 0), ("b", 0, 0)], [("c", 0, 1), ("d", 0, 1)]]
    assert {"client/c/val_loss", "client/d/val_loss"} <= set(trainer.callback_metrics)
    assert strategy.store.ids() == ["a", "b", "c", "d"]


def test_rounds_may_end_after_a_few_updates_while_everybody_is_at_work(tmp_path):
    """Buffered asynchronous rounds: two of six make a round. Turns take 1, 2, 3, 4, 5, 6 s; by hand:

    t = 2: a, b (both again at work until 3 and 4). t = 3: a, c. t = 4: a, b. At 4, d is there too, and waits.
    """
    seconds = {client_id: index + 1.0 for index, client_id in enumerate("abcdef")}
    rules = RoundRules(over_select=2.0, late=UseLate(max_rounds=10))
    strategy = run(tmp_path, seconds, clients="abcdef", fraction=1 / 3, rounds=4, rules=rules)

    assert strategy.aggregator.seen[:3] == [
        [("a", 0, 0), ("b", 0, 0)],
        [("a", 1, 0), ("c", 0, 1)],
        [("a", 2, 0), ("b", 1, 1)],
    ]
    assert ("d", 0, 3) in strategy.aggregator.seen[3]
    assert strategy.left_out == []


def test_not_more_clients_are_at_work_than_the_rules_say(tmp_path):
    """Of eight, two are wanted and four at work: who is late takes the place of somebody new."""
    at_work, most = set(), []

    strategy = strategy_of(
        "abcdefgh",
        pool=SimulatedPool(lambda client_id, round: Pace(seconds=1.0 + ord(client_id) % 5)),
        aggregator=Watch(),
        fraction=0.25,
        rules=RoundRules(over_select=1.0, late=UseLate(max_rounds=10)),
    )
    submit, following = strategy.pool.submit, strategy.pool.next

    def noting_submit(jobs):
        at_work.update(job.assignment.client_id for job in jobs)
        most.append(len(at_work))
        submit(jobs)

    def noting_next(timeout=None):
        result = following(timeout)
        at_work.discard(result.client_id)
        return result

    strategy.pool.submit, strategy.pool.next = noting_submit, noting_next
    trainer_of(tmp_path, strategy, max_epochs=6, limit_val_batches=0).fit(Tiny(), datamodule=ClientsOwnData())

    assert most == [4] * 6


# -- too few -----------------------------------------------------------------------------------------------------------


def test_below_quorum_a_run_stops_and_says_who_is_missing_and_what_can_be_done(tmp_path):
    with pytest.raises(
        FederationError,
        match=r"Round 0 has 2 of the 3 updates that it needs \(`c` is late; `d` is late\)\. Give clients more time",
    ):
        run(tmp_path, {"c": 11.0, "d": math.inf}, rules=RoundRules(deadline=10, quorum=0.75))


@pytest.mark.parametrize("late", [DropLate(), UseLate(max_rounds=3)])
def test_a_round_that_is_skipped_leaves_everything_as_it_was(tmp_path, caplog, late):
    """Those who are late are cancelled under either rule: what they were asked belongs to a round that never was."""
    rules = RoundRules(deadline=10, quorum=0.75, late=late, below_quorum=SkipRound())
    strategy = run(tmp_path, {("c", 1): 11.0, ("d", 1): 12.0}, rounds=3, rules=rules, module=(module := Tiny()))
    other = Tiny()
    expected = run(tmp_path, {}, rounds=2, horizon=3, module=other)

    assert counted(strategy) == ["abcd", "abcd"]
    assert states(strategy) == states(expected)
    assert torch.equal(module.encoder.weight, other.encoder.weight)
    assert [record.round for record in strategy.relevance] == [0, 1, 2]
    assert [(one.round, one.client_id) for one in strategy.left_out] == [(1, "c"), (1, "d")]
    assert (
        "Round 1 has 2 of the 3 updates that it needs (`c` is late; `d` is late). `SkipRound` says: SKIP" in caplog.text
    )


def test_a_retry_asks_those_who_are_missing_and_keeps_what_has_come(tmp_path, caplog):
    asked = []

    def pace(client_id, round):
        asked.append(client_id)
        return Pace(seconds=math.inf if client_id == "d" and asked.count("d") == 1 else 1.0)

    rules = RoundRules(deadline=10, below_quorum=RetryRound())
    strategy = strategy_of("abcd", pool=SimulatedPool(pace), aggregator=Watch(), rules=rules)
    trainer_of(tmp_path, strategy, max_epochs=1, limit_val_batches=0).fit(Tiny(), datamodule=ClientsOwnData())

    assert asked == ["a", "b", "c", "d", "d"]
    assert strategy.pool.now() == 11.0
    assert counted(strategy)[-1] == "abcd"
    assert states(strategy) == states(run(tmp_path, {}, rounds=1))
    assert strategy.traffic == run(tmp_path, {}, rounds=1).traffic
    assert "`RetryRound` says: RETRY" in caplog.text


def test_retries_end_and_then_another_rule_decides(tmp_path):
    rules = RoundRules(deadline=10, below_quorum=RetryRound(times=2, then=SkipRound()))
    strategy = run(tmp_path, {("d", 0): math.inf}, rounds=2, rules=rules)

    assert strategy.pool.now() == 3 * 10.0 + 1.0
    assert counted(strategy) == ["abcd"]


def test_a_user_may_decide_otherwise(tmp_path):
    class FirstRoundMayFail(BelowQuorum):
        def decide(self, shortfall):
            return Decision.SKIP if shortfall.round == 0 else Decision.STOP

    rules = RoundRules(deadline=10, below_quorum=FirstRoundMayFail())
    with pytest.raises(FederationError, match="Round 2 has 3 of the 4"):
        run(tmp_path, {("a", 0): math.inf, ("d", 2): math.inf}, rounds=3, rules=rules)


class RaisesIn(Tiny):
    """A client raises in one round."""

    def __init__(self, client_id="c", round=0):
        super().__init__()
        self.where = client_id, round

    def training_step(self, batch, batch_idx):
        if (self.trainer.strategy.client_id, self.trainer.strategy.round) == self.where:
            raise RuntimeError("out of paper")
        return super().training_step(batch, batch_idx)


def test_with_a_quorum_a_client_that_raises_is_only_missing(tmp_path, caplog):
    strategy = run(tmp_path, {}, rounds=2, module=RaisesIn(), rules=RoundRules(quorum=0.75))

    assert counted(strategy) == ["abd", "abcd"]
    assert [(one.round, one.client_id, one.reason) for one in strategy.left_out] == [
        (0, "c", "failed (RuntimeError: out of paper)")
    ]
    assert "in training_step" in caplog.text  # the whole traceback


def test_without_a_quorum_a_client_that_raises_ends_the_run_at_once(tmp_path):
    """It is known after a second that four of four will not come, so nobody waits for the slow one."""
    pool = SimulatedPool(lambda client_id, round: Pace(seconds=100.0 if client_id == "d" else 1.0))
    trainer = trainer_of(tmp_path, strategy_of("abcd", pool=pool), limit_val_batches=0)

    with pytest.raises(ClientFailedError, match="Client `c` failed in round 0") as caught:
        trainer.fit(RaisesIn(), datamodule=ClientsOwnData())

    assert "out of paper" in caught.value.trace
    assert pool.now() == 1.0


class Poisoned(Tiny):
    def on_train_epoch_end(self):
        if self.trainer.strategy.client_id == "c":
            with torch.no_grad():
                self.encoder.weight.fill_(math.nan)


@pytest.mark.parametrize(("quorum", "stands"), [(None, True), (0.75, True), (1.0, False)])
def test_whom_the_guard_leaves_out_does_not_count_towards_a_quorum(tmp_path, caplog, quorum, stands):
    """Without a quorum it has delivered, and the round goes on without it."""
    rules = RoundRules(quorum=quorum)
    if not stands:
        with pytest.raises(FederationError, match=r"has 3 of the 4 updates that it needs \(`c` was left out: `encoder"):
            run(tmp_path, {}, module=Poisoned(), rules=rules)
        return
    strategy = run(tmp_path, {}, module=Poisoned(), rules=rules)

    assert counted(strategy) == ["abd"]
    assert strategy.store.ids() == ["a", "b", "d"]  # it starts afresh, and not from NaN
    assert "must be finite" in strategy.left_out[0].reason
    assert "client `c` was left out, for the 1. time" in caplog.text


def test_a_strict_guard_ends_the_run(tmp_path):
    with pytest.raises(RejectedUpdateError, match="client `c` in round 0"):
        run(tmp_path, {}, module=Poisoned(), rule=FedAvg(guard=UpdateGuard(strict=True)))


def test_a_rejected_update_is_in_the_exit_code_if_the_guard_is_strict(tmp_path):
    """As any error that nobody catches; else it is in the log."""
    codes = []
    for strict in (False, True):
        arguments = {"module": Poisoned(), "rule": FedAvg(guard=UpdateGuard(strict=strict))}
        program = multiprocessing.get_context("fork").Process(target=run, args=(tmp_path, {}), kwargs=arguments)
        program.start()
        program.join()
        codes.append(program.exitcode)
    assert codes == [0, 1]


def test_how_many_counted_and_who_did_not_is_logged_every_round(tmp_path):
    strategy = strategy_of("abcd", rules=RoundRules(quorum=0.5))
    trainer = trainer_of(tmp_path, strategy, max_epochs=1)

    trainer.fit(RaisesIn(), datamodule=ClientsOwnData())

    assert float(trainer.callback_metrics["round/updates"]) == 3
    assert float(trainer.callback_metrics["round/left_out"]) == 1


def test_monitors_survive_a_round_that_is_skipped(tmp_path):
    """Nothing is measured in it; the last value stays."""
    rules = RoundRules(deadline=10, below_quorum=SkipRound())
    monitors = [EarlyStopping("val_loss", patience=5), ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)]
    strategy = strategy_of(
        "ab",
        pool=SimulatedPool(lambda client_id, round: Pace(seconds=math.inf if round == 1 else 1.0)),
        rules=rules,
    )
    trainer = trainer_of(tmp_path, strategy, max_epochs=3, callbacks=monitors, enable_checkpointing=True)

    trainer.fit(Tiny(), datamodule=ClientsOwnData())

    assert trainer.current_epoch == 3
    assert (tmp_path / "last.ckpt").exists()


def test_a_client_that_cannot_be_evaluated_is_only_missing_with_a_quorum(tmp_path, caplog):
    class Blind(Tiny):
        def validation_step(self, batch, batch_idx):
            if self.trainer.strategy.client_id == "c" and self.trainer.state.fn == "validate":  # not inside a fit
                raise RuntimeError("no light")
            super().validation_step(batch, batch_idx)

    trainer = trainer_of(tmp_path, strategy_of("abcd", rules=RoundRules(quorum=0.5)), max_epochs=1)
    trainer.fit(Blind(), datamodule=ClientsOwnData())

    assert "client/a/val_loss" in trainer.callback_metrics
    assert "client/c/val_loss" not in trainer.callback_metrics
    assert "client `c` was not evaluated: it failed (RuntimeError: no light)" in caplog.text

    strict = trainer_of(tmp_path, strategy_of("abcd"), max_epochs=1)
    with pytest.raises(ClientFailedError, match="no light"):
        strict.fit(Blind(), datamodule=ClientsOwnData())


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_a_run_among_slow_devices_gives_the_same_every_time(tmp_path):
    def once():
        rules = RoundRules(deadline=8, quorum=0.3, over_select=0.5, late=UseLate(), below_quorum=RetryRound())
        seconds = {(name, round): float((ord(name) * 7 + round * 5) % 13) for name in "abcdef" for round in range(4)}
        strategy = run(tmp_path, seconds, clients="abcdef", fraction=0.5, rounds=4, rules=rules)
        return strategy.aggregator.seen, states(strategy), strategy.pool.now()

    assert once() == once()


def test_bytes_take_their_time(tmp_path):
    """Encoder of 4 x 8 + 8 numbers, 160 bytes: nothing is sent down at first, and 160 bytes up at 16 a second."""
    pool = SimulatedPool(lambda client_id, round: Pace(seconds=2.0, download=80.0, upload=16.0))
    strategy = strategy_of("ab", pool=pool)
    trainer_of(tmp_path, strategy, max_epochs=2, limit_val_batches=0).fit(Tiny(), datamodule=ClientsOwnData())

    assert pool.now() == (2.0 + 10.0) + (2.0 + 2.0 + 10.0)


@pytest.mark.parametrize("pool", [LocalPool, lambda: SimulatedPool(lambda client_id, round: Pace())])
def test_rules_that_are_never_needed_change_nothing(tmp_path, pool):
    results = []
    for rules in (None, RoundRules(deadline=1e6, quorum=0.5, late=UseLate(3), below_quorum=RetryRound())):
        strategy = strategy_of("abc", pool=pool(), rules=rules)
        trainer_of(tmp_path, strategy).fit(Tiny(), datamodule=ClientsOwnData())
        results.append(states(strategy))
    assert results[0] == results[1]
