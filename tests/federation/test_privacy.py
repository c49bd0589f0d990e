"""What leaves a client with noise, what it costs, and that nothing leaves beyond the budget."""

import copy
import logging
import pickle
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_pfl.aggregation import Aggregator, FedAvg, LocalOnly, UniformAggregator
from lightning_pfl.callbacks.relevance_probe import RelevanceProbe
from lightning_pfl.errors import CheckpointMismatchError, ClientFailedError, PrivacyBudgetError
from lightning_pfl.federation import ClientStore, Privacy
from lightning_pfl.federation.privacy import Permit, release
from lightning_pfl.federation.store import ClientStore as Store
from lightning_pfl.federation.turn import run_job, unpack_state
from lightning_pfl.functional.accounting import Account, Ledger, PrivacyBudget
from lightning_pfl.functional.mechanisms import ClientNoise, ExampleNoise, UpdateNoise
from lightning_pfl.relevance import GradientProbe
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors
from tests.federation.runs import assert_equal_states, strategy_of, trainer_of
from tests.federation.test_resume import fit, outcome
from tests.federation.test_strategy import FixedSketch, colora
from tests.federation.tiny import Blocks, ClientsOwnData, Tiny

DELTA = 1e-5
PLENTY = PrivacyBudget(epsilon=1000, delta=DELTA)
FAINT = 1e-9  # a multiplier so small that what is sent shows what was to be hidden


def probe(max_norm=1.0):
    torch.manual_seed(0)
    return RelevanceProbe(
        GradientProbe(
            nn.Linear(4, 1),
            lambda module, batch: nn.functional.mse_loss(module(batch[0]), batch[1]),
            parameters=["weight"],
            size=8,
            max_norm=max_norm,
        ),
        every_n_steps=1,
    )


def both(budget=PLENTY, multiplier=4.0, **arguments):
    """Noise on everything."""
    return Privacy(
        budget=budget,
        sketches=ExampleNoise(multiplier),
        updates=UpdateNoise(multiplier, max_norm=1.0),
        **arguments,
    )


def lasting(rounds, *, multiplier=4.0, kinds=2):
    """A budget for so many rounds and no more."""
    return PrivacyBudget(Account().add(multiplier, times=rounds * kinds).epsilon(DELTA), DELTA)


class Spy(Aggregator):
    """Sees all that the server sees."""

    def __init__(self, rule):
        self.rule = rule
        self.seen = []

    @property
    def uses_global_branch(self):
        return self.rule.uses_global_branch

    @property
    def needs_sketches(self):
        return self.rule.needs_sketches

    def aggregate(self, updates, state):
        self.seen.append({update.client_id: update for update in updates})
        return self.rule.aggregate(updates, state)


def run(folder, privacy, rounds=4, *, strategy=None, **arguments):
    """Two clients with adapters and a probe."""
    strategy = strategy or strategy_of(["a", "b"], share=(), privacy=privacy)
    trainer = fit(
        folder, strategy, rounds, **{"module": Blocks(), "callbacks": [colora(dropout=0.2), probe()], **arguments}
    )
    return trainer, strategy


def job_of(strategy, client_id="a", round=0):
    """What a pool is handed, after a run."""
    return strategy._rounds.job(client_id, TrainerFn.FITTING, round)


def turn(strategy, job):
    plan = strategy._rounds.plan
    with plan.settings.turn(seed=job.seed, num_threads=1):
        return run_job(plan.snapshots[job.snapshot], job)


# -- the account -------------------------------------------------------------------------------------------------------


def test_resuming_equals_not_stopping_noise_and_account_included(tmp_path):
    """With secret keys: they lie in the checkpoint with the clients' states."""
    trainer, strategy = run(tmp_path / "whole", both())

    resumed, again = run(tmp_path / "rest", both(), ckpt_path=tmp_path / "whole" / "epoch=1.ckpt")

    assert_equal_states(outcome(tmp_path / "rest" / "epoch=3.ckpt"), outcome(tmp_path / "whole" / "epoch=3.ckpt"))
    expected = Account().add(4.0, times=8).epsilon(DELTA)  # four rounds, a sketch and an update each
    for one in (strategy, again):
        assert one.epsilon("a") == one.epsilon("b") == pytest.approx(expected)
    for one in (trainer, resumed):
        for name in ("privacy/epsilon", "client/a/privacy/epsilon", "client/b/privacy/epsilon"):
            assert one.callback_metrics[name] == pytest.approx(expected)


def test_every_rounds_epsilon_is_in_the_log(tmp_path):
    logger = CSVLogger(tmp_path)
    run(tmp_path, Privacy(budget=PLENTY, sketches=ClientNoise(4.0)), 3, logger=logger, horizon=3)
    logger.save()

    lines = [line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    column = lines[0].index("client/b/privacy/epsilon")
    got = [float(line[column]) for line in lines[1:] if line[column]]
    assert got == pytest.approx([Account().add(4.0, times=count).epsilon(DELTA) for count in (1, 2, 3)])


def test_only_who_takes_part_pays(tmp_path):
    """Half of four clients a round, drawn anew: the account is each client's own."""
    aggregator = Spy(UniformAggregator())
    strategy = strategy_of(list("abcd"), share=(), fraction=0.5, privacy=both(multiplier=5.0), aggregator=aggregator)
    run(tmp_path, None, 3, strategy=strategy)

    assert sum(map(len, aggregator.seen)) == 6
    for client_id in "abcd":
        turns = sum(client_id in seen for seen in aggregator.seen)
        expected = Account().add(5.0, times=2 * turns).epsilon(DELTA) if turns else 0.0
        assert strategy.epsilon(client_id) == pytest.approx(expected)


# -- the stop ----------------------------------------------------------------------------------------------------------


def test_the_run_ends_before_a_release_that_would_exceed_the_budget(tmp_path):
    """Two rounds are allowed; nobody trains in the third, and the checkpoint on the way out has both."""
    aggregator = Spy(UniformAggregator())
    strategy = strategy_of(["a", "b"], share=(), privacy=both(lasting(2)), aggregator=aggregator)
    callbacks = [colora(dropout=0.2), probe(), OnExceptionCheckpoint(tmp_path, "spent")]

    with pytest.raises(PrivacyBudgetError, match=r"Client `a` has spent epsilon .* resume with a larger") as caught:
        run(tmp_path, None, strategy=strategy, callbacks=callbacks)

    assert (caught.value.client_id, caught.value.round) == ("a", 2)
    assert caught.value.spent == pytest.approx(lasting(2).epsilon)
    assert caught.value.needed == pytest.approx(lasting(3).epsilon)
    assert vars(pickle.loads(pickle.dumps(caught.value))) == vars(caught.value)
    assert [sorted(seen) for seen in aggregator.seen] == [["a", "b"]] * 2

    def larger():
        return strategy_of(["a", "b"], share=(), privacy=both(lasting(4)), aggregator=Spy(UniformAggregator()))

    _, again = run(tmp_path / "on", None, strategy=larger(), ckpt_path=tmp_path / "spent.ckpt")
    _, whole = run(tmp_path / "whole", None, strategy=larger(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert again.epsilon("a") == whole.epsilon("a") == pytest.approx(lasting(4).epsilon)
    assert_equal_states(outcome(tmp_path / "on" / "epoch=3.ckpt"), outcome(tmp_path / "whole" / "epoch=3.ckpt"))


def test_a_client_itself_refuses_to_exceed_its_budget(tmp_path):
    """Also when the server asks for it: the turn ends with a failure and without an update."""
    _, strategy = run(tmp_path, both(lasting(2)), 2)
    job = job_of(strategy, round=2)
    assert job.permit.ledger.account == Account().add(4.0, times=4)

    result = turn(strategy, job)

    assert result.update is None
    assert "PrivacyBudgetError: Client `a` has spent" in result.failure.trace


def test_a_round_that_is_run_again_with_the_last_of_the_budget_is_not_refused(tmp_path):
    """The server has the bytes already: client b's failure must not cost a its last round."""

    class Stumbles(Blocks):
        fails = True

        def training_step(self, batch, batch_idx):
            if self.fails and self.trainer.strategy.client_id == "b" and self.current_epoch == 1:
                raise RuntimeError("out of paper")
            return super().training_step(batch, batch_idx)

    callbacks = [colora(), probe(), OnExceptionCheckpoint(tmp_path, "broken")]
    with pytest.raises(ClientFailedError, match="out of paper"):
        run(tmp_path, both(lasting(2)), 2, module=Stumbles(), callbacks=callbacks, horizon=2)
    repaired = Stumbles()
    repaired.fails = False

    _, again = run(
        tmp_path,
        both(lasting(2)),
        2,
        module=repaired,
        callbacks=[colora(), probe()],
        ckpt_path=tmp_path / "broken.ckpt",
        horizon=2,
    )

    assert again.epsilon("a") == again.epsilon("b") == pytest.approx(lasting(2).epsilon)


def test_what_the_server_has_seen_of_a_failed_round_counts_even_if_the_round_does_not(tmp_path):
    """Client a's update of round 1 came before b failed. Run again with other settings, it is another release."""

    class Stumbles(Tiny):
        def training_step(self, batch, batch_idx):
            if self.trainer.strategy.client_id == "b" and self.current_epoch == 1:
                raise RuntimeError("out of paper")
            return super().training_step(batch, batch_idx)

    def strategy():
        privacy = Privacy(budget=PLENTY, updates=UpdateNoise(4.0, 1.0))
        return strategy_of(["a", "b"], privacy=privacy)

    with pytest.raises(ClientFailedError):
        fit(tmp_path, strategy(), 2, module=Stumbles(), callbacks=[OnExceptionCheckpoint(tmp_path, "broken")])
    again = strategy()

    class Other(Tiny):
        def training_step(self, batch, batch_idx):
            return 2 * super().training_step(batch, batch_idx) + self.encoder.weight.square().sum()

    fit(tmp_path, again, 2, module=Other(), ckpt_path=tmp_path / "broken.ckpt")

    assert again.epsilon("a") == pytest.approx(Account().add(4.0, times=3).epsilon(DELTA))
    assert again.epsilon("b") == pytest.approx(Account().add(4.0, times=2).epsilon(DELTA))


# -- the key -----------------------------------------------------------------------------------------------------------


def test_a_turn_that_is_run_again_sends_the_same_bytes(tmp_path):
    """As after the death of the place where it ran. With another key, or later, other noise is sent."""
    _, strategy = run(tmp_path, both(), 2)
    job = job_of(strategy, round=2)

    first, second = (turn(strategy, copy.deepcopy(job)).update for _ in range(2))
    other = turn(strategy, replace(job, permit=replace(job.permit, key=bytes(32)))).update
    later = turn(strategy, replace(job, assignment=replace(job.assignment, round=3))).update

    assert torch.equal(first.sketch, second.sketch)
    assert torch.equal(first.shared.common.vector, second.shared.common.vector)
    for different in (other, later):
        assert not torch.equal(first.sketch, different.sketch)
        assert not torch.equal(first.shared.common.vector, different.shared.common.vector)


def test_keys_are_secret_and_of_each_client_and_stay_where_private_states_are(tmp_path):
    """Neither in what is sent, nor in what a turn hands back, nor in a checkpoint outside of the store's part."""
    _, strategy = run(tmp_path, both(), 2)
    jobs = {client_id: job_of(strategy, client_id, 2) for client_id in "ab"}
    keys = {client_id: job.permit.key for client_id, job in jobs.items()}

    assert keys["a"] != keys["b"]
    for client_id, key in keys.items():
        assert len(key) == 32
        assert key not in pickle.dumps(turn(strategy, jobs[client_id]))
        assert str(key) not in repr(jobs[client_id].permit)
        saved = outcome(tmp_path / "epoch=1.ckpt")
        assert saved["federated"].pop("store")["secrets"][client_id].numpy().tobytes() == key
        assert not _holds(saved, key)


def _holds(nest, key):
    if isinstance(nest, dict):
        return any(_holds(value, key) for value in nest.values())
    if isinstance(nest, (list, tuple)):
        return any(_holds(value, key) for value in nest)
    if isinstance(nest, torch.Tensor):
        return key in nest.detach().contiguous().numpy().tobytes()
    return nest in (key, key.hex())


def test_two_runs_draw_other_keys_unless_a_seed_makes_them(tmp_path):
    def sent(folder, **arguments):
        aggregator = Spy(LocalOnly())
        strategy = strategy_of(["a", "b"], share=(), privacy=both(**arguments), aggregator=aggregator)
        run(tmp_path / folder, None, 1, strategy=strategy)
        return [aggregator.seen[-1][client_id].sketch for client_id in "ab"]

    secret, other, seeded, repeated = sent("1"), sent("2"), sent("3", seed=5), sent("4", seed=5)

    assert not torch.equal(secret[0], other[0])
    assert all(map(torch.equal, seeded, repeated))
    assert not torch.equal(*seeded)


def test_a_store_with_a_url_keeps_secrets_out_of_checkpoints(tmp_path):
    def strategy():
        return strategy_of(["a", "b"], share=(), privacy=both(), store=ClientStore(tmp_path / "states"))

    _, whole = run(tmp_path / "whole", None, strategy=strategy())
    key = job_of(whole).permit.key
    assert not _holds(outcome(tmp_path / "whole" / "epoch=1.ckpt"), key)

    _, again = run(tmp_path / "rest", None, strategy=strategy(), ckpt_path=tmp_path / "whole" / "epoch=1.ckpt")

    assert job_of(again).permit.key == key
    got, expected = (outcome(tmp_path / one / "epoch=3.ckpt") for one in ("rest", "whole"))
    assert_equal_states(got, expected)


# -- what is sent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [FedAvg, LocalOnly])
def test_an_update_is_a_bounded_step_from_what_the_server_has(tmp_path, rule):
    """Under FedAvg from what the server sent, else from what the client sent last; at first from the seeded start."""
    aggregator = Spy(rule())
    privacy = Privacy(budget=PrivacyBudget(float("inf"), DELTA), updates=UpdateNoise(FAINT, max_norm=1e-3))
    strategy = strategy_of(["a", "b"], privacy=privacy, aggregator=aggregator)
    trainer_of(tmp_path, strategy).fit(Tiny(), datamodule=ClientsOwnData())

    start = {"encoder.bias": Tiny().encoder.bias.detach(), "encoder.weight": Tiny().encoder.weight.detach()}
    before = dict.fromkeys("ab", FlatTensors.pack(start).vector)
    for seen in aggregator.seen[-3:]:
        sent = {client_id: update.shared.common.vector for client_id, update in seen.items()}
        for client_id in "ab":
            step = (sent[client_id] - before[client_id]).norm().item()
            assert step == pytest.approx(1e-3, rel=1e-2)
        mean = (sent["a"] + sent["b"]) / 2
        before = dict.fromkeys("ab", mean) if rule is FedAvg else sent


def test_a_wide_bound_sends_what_was_trained_and_the_client_keeps_what_it_has(tmp_path):
    """Adapters, private layers included; its own model is never noised."""
    aggregator = Spy(UniformAggregator())
    faint = Privacy(budget=PrivacyBudget(float("inf"), DELTA), updates=UpdateNoise(FAINT, max_norm=1e3))
    strong = replace(faint, updates=UpdateNoise(4.0, max_norm=1.0))
    vectors, weights = [], []
    for privacy in (None, faint, strong):
        aggregator.seen.clear()
        strategy = strategy_of(["a", "b"], share=(), privacy=privacy, aggregator=aggregator)
        run(tmp_path / str(len(vectors)), None, 1, strategy=strategy, callbacks=[colora()])
        shared = aggregator.seen[-1]["a"].shared
        vectors.append(torch.cat([shared.common.vector, shared.same_architecture.vector]))
        weights.append(unpack_state(strategy.store.get("a"))["state_dict"])

    torch.testing.assert_close(vectors[1], vectors[0], rtol=1e-4, atol=1e-5)
    assert (vectors[2] - vectors[0]).std() > 1
    assert_equal_states(dict(weights[1]), dict(weights[0]))
    assert_equal_states(dict(weights[2]), dict(weights[0]))


def test_a_client_that_has_stopped_sends_what_the_server_has_already(tmp_path):
    """And pays for it once: the step from there would be noised anew in every round."""
    stopper = EarlyStopping("train_loss", patience=1, mode="max")
    stopper.federated_scope = "client"
    aggregator = Spy(LocalOnly())
    privacy = Privacy(budget=PLENTY, updates=UpdateNoise(4.0, 1.0))
    strategy = strategy_of(["a"], share=(), privacy=privacy, aggregator=aggregator)
    run(tmp_path, None, 6, horizon=6, strategy=strategy, callbacks=[colora(), stopper])

    sent = [seen["a"].shared.common.vector for seen in aggregator.seen]
    different = 1 + sum(not torch.equal(one, other) for one, other in pairwise(sent))
    assert different < 5
    assert torch.equal(sent[-1], sent[-2])
    assert strategy.epsilon("a") == pytest.approx(Account().add(4.0, times=different).epsilon(DELTA))


def test_a_sketch_that_was_never_made_costs_nothing():
    """A probe on another rhythm than rounds."""
    shared = SharedTensors(FlatTensors.pack({"P": torch.ones(2)}))
    update = ClientUpdate("a", 0, 1, "tiny", shared, sketch=None)
    permit = Permit(Privacy(budget=lasting(1, kinds=1), sketches=ClientNoise(4.0)), bytes(32), Ledger())

    sent = release(update, permit, known=None, bound=None, trained=True)

    assert sent.sketch is None
    assert sent.shared is shared


# -- what is refused and what is said ----------------------------------------------------------------------------------


def test_a_budget_without_noise_is_refused():
    with pytest.raises(ValueError, match="nothing is noised, so no budget could hold"):
        Privacy(budget=PLENTY)


def test_arguments_of_other_types_are_refused():
    with pytest.raises(TypeError, match=r"`Privacy\(budget=\.\.\.\)` must be a PrivacyBudget, but is 8"):
        Privacy(budget=8, sketches=ClientNoise(1.0))
    with pytest.raises(TypeError, match="must be a SketchNoise"):
        Privacy(budget=PLENTY, sketches=UpdateNoise(1.0, 1.0))
    with pytest.raises(TypeError, match="must be a UpdateNoise"):
        Privacy(budget=PLENTY, updates=ClientNoise(1.0))
    with pytest.raises(TypeError, match="`privacy` must be a Privacy"):
        strategy_of(["a"], privacy=PLENTY)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([], "noises sketches, but no callback makes any"),
        ([FixedSketch()], "FixedSketch does not say how far one moves its sketch"),
        ([probe(max_norm=None)], "Write `GradientProbe"),
    ],
)
def test_noise_that_cannot_be_had_is_refused_before_anything_runs(tmp_path, callbacks, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, both(), callbacks=[colora(), *callbacks])


def test_data_whose_order_cannot_be_known_is_refused(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.ones(4), torch.ones(1))] * 4)

    class Streams(ClientsOwnData):
        def train_dataloader(self):
            return DataLoader(Stream(), batch_size=2)

    trainer = trainer_of(tmp_path, strategy_of(["a"], share=(), privacy=both()), callbacks=[colora(), probe()])
    with pytest.raises(ClientFailedError, match="a Stream is iterable"):
        trainer.fit(Blocks(), datamodule=Streams())


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (None, both(), "In the checkpoint's run nothing is noised, and in this one noise on every sketch and update"),
        (both(), None, "hides one example, and in this one nothing is noised"),
        (
            both(),
            Privacy(budget=PLENTY, sketches=ExampleNoise(4.0)),
            "every sketch and update .* on every sketch hides",
        ),
        (
            Privacy(budget=PLENTY, sketches=ClientNoise(4.0)),
            Privacy(budget=PLENTY, sketches=ExampleNoise(4.0)),
            "hides all data of one client, and in this one noise on every sketch hides one example",
        ),
    ],
)
def test_an_account_does_not_go_on_with_what_it_does_not_cover(tmp_path, first, then, message):
    run(tmp_path, first, 1)

    with pytest.raises(CheckpointMismatchError, match=message):
        run(tmp_path, then, ckpt_path=tmp_path / "epoch=0.ckpt")


def test_more_noise_and_a_larger_budget_may_go_on_with_an_account(tmp_path):
    """Heterogeneous releases add up."""
    run(tmp_path, both(), 2)

    _, again = run(tmp_path, both(PrivacyBudget(2000, DELTA), multiplier=8.0), ckpt_path=tmp_path / "epoch=1.ckpt")

    expected = Account().add(4.0, times=4).add(8.0, times=4).epsilon(DELTA)
    assert again.epsilon("a") == pytest.approx(expected)


def test_the_log_says_what_is_hidden_and_what_is_not(tmp_path, caplog):
    def said(privacy, **arguments):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="lightning_pfl"):
            run(tmp_path, privacy, 2, horizon=2, **arguments)
        return caplog.text

    assert said(None).count("Clients send what they have without noise. `FederatedStrategy(privacy=...)`") == 1
    text = said(both())
    assert text.count("Noise hides one example in sketches and updates, within epsilon 1000 at delta 1e-05") == 1
    assert "Without noise are sent: metrics, logs, numbers of examples." in text
    text = said(Privacy(budget=PLENTY, updates=UpdateNoise(4.0, 1.0), seed=3))
    assert "hides all data of one client in updates" in text
    assert "Without noise are sent: relevance sketches, metrics" in text
    assert "`Privacy(seed=3)`: whoever knows the seed can take the noise off" in text


def test_a_budget_that_will_not_last_is_said_at_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="lightning_pfl"), pytest.raises(PrivacyBudgetError):
        run(tmp_path, both(lasting(3)), 4)
    assert "used up its privacy budget after 3 of 4" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="lightning_pfl"):
        run(tmp_path, both(lasting(4)), 4)
    assert "used up" not in caplog.text


def test_secrets_of_a_store_are_drawn_once_kept_and_moved(tmp_path):
    """In a folder nobody else may read them; a checkpoint's replace what is there."""
    first, there = Store(), Store(tmp_path / "states")
    secret = first.secret("a")
    assert len(secret) == 32
    assert first.secret("a") == secret != first.secret("b")

    old = there.secret("a")
    assert Store(tmp_path / "states").secret("a") == old != secret
    (file,) = (tmp_path / "states" / "a").iterdir()
    assert file.stat().st_mode & 0o077 == 0
    first.put("a", b"state")
    there.load_state_dict(first.state_dict())
    assert there.secret("a") == secret
    assert Store(tmp_path / "states").secret("a") == secret
    first.close()
    assert first.secret("a") != secret
