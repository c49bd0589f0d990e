"""Methods with one adapter against numbers worked out by hand; `numbers` says in which federation."""

from lightning_pfl import methods
from tests.federation.runs import strategy_of, trainer_of
from tests.methods.numbers import NUMBER, Number, Wanted, answers, near, run, trained


def test_local_only_takes_two_steps_of_its_own(tmp_path):
    strategy, module = run(tmp_path, methods.local_only(NUMBER))

    # a: 0, then .1, then .1 - .1 (.2 - 1); b: 0, then .3, then .3 - .1 (.6 - 3)
    assert trained(strategy) == trained(strategy, "Q.default") == near(0.18, 0.54)
    assert answers(strategy, module) == near(0.36, 1.08)


def test_fedavg_starts_the_second_round_from_the_mean_by_examples(tmp_path):
    strategy, module = run(tmp_path, methods.fedavg(NUMBER))

    # the mean of .1 and .3, one to three, is .25; from there a: .25 - .1 (.5 - 1), b: .25 - .1 (.5 - 3)
    assert trained(strategy) == near(0.3, 0.5)
    assert answers(strategy, module) == near(0.9, 0.9)  # twice (.3 + 3 * .5) / 4


def test_the_warm_start_is_from_the_uniform_mean(tmp_path):
    strategy, module = run(tmp_path, methods.warm_started(NUMBER))

    # from .2, a: .2 - .1 (.4 - 1), b: .2 - .1 (.4 - 3)
    assert trained(strategy) == near(0.26, 0.46)
    assert answers(strategy, module) == near(0.72, 0.72)


def test_fedprox_pulls_the_second_step_of_a_round_to_where_the_round_began(tmp_path):
    strategy, _ = run(tmp_path, methods.fedprox(NUMBER, strength=1.0), steps=2)

    # round 1, a: .1, then .1 - .1 ((.2 - 1) + (.1 - 0)) = .17; b: .3, then .3 - .1 ((.6 - 3) + (.3 - 0)) = .51
    # mean (.17 + 3 * .51) / 4 = .425
    # round 2, a: .425 - .1 (.85 - 1) = .44, then .44 - .1 ((.88 - 1) + (.44 - .425)) = .4505
    #          b: .425 - .1 (.85 - 3) = .64, then .64 - .1 ((1.28 - 3) + (.64 - .425)) = .7905
    assert trained(strategy) == near(0.4505, 0.7905)


def test_fedprox_counts_the_pull_once_per_step_however_many_batches_a_step_has(tmp_path):
    method = methods.fedprox(NUMBER, strength=1.0)
    strategy = strategy_of(["a", "b"], share=(), aggregator=method.aggregator, local_epochs=2)
    trainer_of(tmp_path, strategy, max_epochs=1, callbacks=[*method.callbacks], accumulate_grad_batches=2).fit(
        Number(), datamodule=Wanted()
    )

    assert trained(strategy) == near(0.17, 0.51)  # two batches alike make one step, two steps as above


def test_fedper_keeps_what_is_named_and_averages_the_rest(tmp_path):
    strategy, module = run(tmp_path, methods.fedper(NUMBER, keep=["main/0/fc/Q"]))

    # P starts round 2 at .25, Q at .1 and .3: a errs by .35 - 1, b by .55 - 3
    assert trained(strategy) == near(0.315, 0.495)
    assert trained(strategy, "Q.default") == near(0.165, 0.545)
    assert answers(strategy, module) == near(0.45 + 0.165, 0.45 + 0.545)
    assert strategy.traffic["a"].up == 2 * 4  # one number a round
