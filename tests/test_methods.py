"""Every method against numbers worked out by hand, and in runs of two families of models.

One linear layer of width 1, W = 0 and rank 1 with A = B = s = 1, gives h(x) = P x + Q; with x = 1 and the loss
(h - y)^2 / 2, P and Q have one gradient, h - y, so both are one number p, h = 2 p, and a step of SGD at 0.1 is
p <- p - 0.1 (2 p - y).
Client a wants y = 1 and has one example, b wants y = 3 and has three.
"""

from functools import partial
from math import exp

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pfl import methods
from lightning_pfl.adapters import bases_of
from lightning_pfl.callbacks.colora import CoLoRA
from lightning_pfl.federation import Client
from lightning_pfl.federation.turn import unpack_state
from lightning_pfl.types import ClientUpdate, FlatTensors, Personalized, SharedTensors
from tests.federation.runs import assert_equal_states, strategy_of, trainer_of
from tests.federation.test_resume import fit, outcome
from tests.federation.test_strategy import FixedSketch
from tests.federation.tiny import Blocks, ClientsOwnData, Late, WideBlocks

WANTED = {"a": 1.0, "b": 3.0}
NUMBER = partial(CoLoRA, rank=1, alpha=1, num_blocks=1, target_modules=["fc"])


class Number(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(1, 1, bias=False)})])
        nn.init.zeros_(self.blocks[0]["fc"].weight)

    def forward(self, x):
        return self.blocks[0]["fc"](x)

    def training_step(self, batch):
        return half_square(self, batch)[0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Wanted(L.LightningDataModule):
    """One batch of one example per step, the same always."""

    def train_dataloader(self):
        wanted = WANTED[self.trainer.strategy.client_id]
        return DataLoader(TensorDataset(torch.ones(2, 1), torch.full((2, 1), wanted)), batch_size=1)


def half_square(module, batch):
    h = module(batch[0])
    return (h - batch[1]).square().mean() / 2, torch.cat([torch.zeros_like(h), h], dim=1)


def run(tmp_path, method, *, rounds=2, steps=1, callbacks=()):
    clients = [Client("a", num_examples=1), Client("b", num_examples=3)]
    strategy = strategy_of(clients, share=(), aggregator=method.aggregator, local_epochs=1, local_steps=steps)
    module = Number()
    trainer_of(tmp_path, strategy, max_epochs=rounds, callbacks=[*method.callbacks, *callbacks]).fit(
        module, datamodule=Wanted()
    )
    assert bases_of(module) == {"main/0/fc": (torch.ones(1, 1), torch.ones(1, 1))}
    return strategy, module


def trained(strategy, name="P.default"):
    """What clients have after their last turn, before anything is sent back."""
    states = (unpack_state(strategy.store.get(client))["state_dict"] for client in "ab")
    return [state[f"blocks.0.fc.colora_{name}"].item() for state in states]


def answers(strategy, module):
    """h(1) of clients' models after aggregation."""
    return [strategy.personalize(module, client)(torch.ones(1, 1)).item() for client in "ab"]


def near(*numbers):
    return pytest.approx(list(numbers), abs=1e-6)


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
    strategy = strategy_of(list(WANTED), share=(), aggregator=method.aggregator, local_epochs=2)
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


def test_ditto_pulls_the_kept_adapter_to_the_received_mean_and_sends_the_other(tmp_path):
    strategy, module = run(tmp_path, methods.ditto(NUMBER, strength=1.0))

    assert trained(strategy, "P.shared") == near(0.3, 0.5)  # FedAvg's
    # from .1 and .3, towards .25: a: .1 - .1 ((.2 - 1) + (.1 - .25)); b: .3 - .1 ((.6 - 3) + (.3 - .25))
    assert trained(strategy) == near(0.195, 0.535)
    assert answers(strategy, module) == near(0.39, 1.07)


def test_fedsim_trains_the_sum_and_averages_one_part(tmp_path):
    strategy, module = run(tmp_path, methods.fedsim(NUMBER))

    # u = .25 and v = .1, .3: a errs by .5 + .2 - 1, b by .5 + .6 - 3, and both parts take a tenth of it
    assert trained(strategy, "P.shared") == near(0.28, 0.44)
    assert trained(strategy) == near(0.13, 0.49)
    assert answers(strategy, module) == near(0.8 + 0.26, 0.8 + 0.98)  # u: (.28 + 3 * .44) / 4 = .4


def test_feddpa_trains_the_shared_adapter_first_and_then_the_kept_one_beside_it(tmp_path):
    strategy, module = run(tmp_path, methods.feddpa(NUMBER, weight=0.5), steps=2)

    # h = G + L. Round 1: G = .1, .3; L steps by .1 * .5 * (1 - .1) = .045 and .05 * (3 - .3) = .135
    # round 2: G = .3, .5 from .25; L steps by .05 * (1 - .345) and .05 * (3 - .635)
    assert trained(strategy, "P.shared") == near(0.3, 0.5)
    assert trained(strategy) == near(0.045 + 0.03275, 0.135 + 0.11825)
    assert answers(strategy, module) == near(0.45 + 0.07775, 0.45 + 0.25325)


def test_feddpa_of_an_odd_turn_gives_the_shared_adapter_the_smaller_half(tmp_path):
    strategy, _ = run(tmp_path, methods.feddpa(NUMBER), rounds=1, steps=3)

    assert trained(strategy, "P.shared") == near(0.1, 0.3)


def test_feddat_adds_each_others_predictions_to_the_labels(tmp_path):
    method = methods.feddat(NUMBER, outputs=half_square, alpha=3.0, beta=0.5, temperature=2.0)

    strategy, module = run(tmp_path, method)

    # Logits are (0, z). The divergence's gradient in z of the student is T (sigmoid(z / T) - sigmoid(t / T)).
    # Round 1: all z are 0: s = .1, .3; the dual model is h = G + L, so L takes half steps: .05, .15.
    # Round 2: s = G = .25, so z_s = .5, and z_d = .25 + L = .3 and .4.
    def sigmoid(z):
        return 1 / (1 + exp(-z))

    dual = {"a": 0.3, "b": 0.4}
    apart = {client: 2 * (sigmoid(0.5 / 2) - sigmoid(z / 2)) for client, z in dual.items()}
    shared = {client: 0.25 - 0.1 * ((0.5 - WANTED[client]) + 3.0 * apart[client]) for client in "ab"}
    kept = {
        client: dual[client] - 0.25 - 0.05 * ((z - WANTED[client]) - 0.5 * apart[client]) for client, z in dual.items()
    }
    assert trained(strategy, "P.shared") == near(*shared.values())
    assert trained(strategy) == near(*kept.values())
    mean = (shared["a"] + 3 * shared["b"]) / 4
    assert answers(strategy, module) == near(mean + kept["a"], mean + kept["b"])


def public_batches(module):
    return [torch.ones(1, 1)]


def public_logits(module, batch):
    h = module(batch)
    return torch.cat([torch.zeros_like(h), h], dim=1)


class AtTheFirstStep(L.Callback):
    """What the shared adapter is when a round's training begins, by client and round."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        value = pl_module.blocks[0]["fc"].colora_P["shared"].item()
        SEEN[trainer.strategy.client_id, trainer.strategy.round] = value


SEEN = {}


def test_perada_teaches_the_mean_the_mean_of_predictions_before_it_pulls_to_it(tmp_path):
    method = methods.perada(
        NUMBER, batches=public_batches, logits=public_logits, strength=1.0, lr=0.01, temperature=2.0
    )

    run(tmp_path, method, callbacks=[AtTheFirstStep()])

    # Round 1 is Ditto's: w = v = .1, .3. Mean adapter .25, whose logit .5 is the mean of .2 and .6 by examples, so that
    # there is nothing to learn but rounding errors; AdamW's first step is at most 0.01 long.
    assert SEEN["a", 0] == 0.0
    assert SEEN["a", 1] == SEEN["b", 1] == pytest.approx(0.25, abs=0.0101)


@pytest.mark.parametrize(("target", "moved"), [(0.9, 0.26), (0.1, 0.24)])
def test_distillation_steps_towards_the_mean_logits_with_dropout_off_and_trains_nothing_else(target, moved):
    """AdamW's first step is as long as the learning rate, whatever the gradient's size."""
    module = Number()
    colora, distillation, two = methods.perada(NUMBER, batches=public_batches, logits=public_logits, lr=0.01).callbacks
    for callback in (colora, distillation, two):
        callback.prepare_server(module, global_branch=False)
    fc = module.blocks[0]["fc"]
    for name in ("P", "Q"):
        getattr(fc, f"colora_{name}")["shared"].data.fill_(0.25)
    (name,) = distillation.upload(module).common.layout.names
    sent = SharedTensors(FlatTensors.pack({name: torch.tensor([[0.0, target]])}))

    distillation.receive(module, Personalized(start=sent))
    distillation.on_train_start(None, module)

    assert [fc.colora_P["shared"].item(), fc.colora_Q["shared"].item()] == pytest.approx([moved, moved], abs=1e-5)
    assert fc.colora_P["default"].item() == 0.0
    assert all(p.grad is None for p in module.parameters())


def test_logits_of_another_public_set_are_refused():
    module = Number()
    colora, distillation, two = methods.perada(NUMBER, batches=public_batches, logits=public_logits).callbacks
    for callback in (colora, distillation, two):
        callback.prepare_server(module, global_branch=False)
    sent = SharedTensors(FlatTensors.pack({"public/2/logits": torch.zeros(1, 2).expand(3, 2)}))

    distillation.receive(module, Personalized(start=sent))
    with pytest.raises(ValueError, match="3 rows, but this client's public set gives 1"):
        distillation.on_train_start(None, module)


def test_the_control_without_exchange_has_its_own_last_upload_as_global_branch(tmp_path):
    strategy, module = run(tmp_path, methods.no_exchange(NUMBER))

    # the gate starts at a half: h = G + L. L: .05, .15; then G = L, so h = .1, .3
    assert trained(strategy) == near(0.05 + 0.05 * (1 - 0.1), 0.15 + 0.05 * (3 - 0.3))
    assert answers(strategy, module) == near(2 * 0.095, 2 * 0.285)  # G is L again, so the gate has no say


def test_the_control_with_an_empty_global_branch_sends_nothing_and_keeps_the_gate(tmp_path):
    strategy, _ = run(tmp_path, methods.zero_global(NUMBER))

    # h = L: .05, .15; then steps by .05 * (1 - .05) and .05 * (3 - .15)
    assert trained(strategy) == near(0.0975, 0.2925)
    # the gate's gradient is beta (1 - beta) (2 G - 2 L) (h - y), with G = 0
    assert trained(strategy, "gate.default") == near(-0.1 * 0.25 * 0.1 * 0.95, -0.1 * 0.25 * 0.3 * 2.85)
    assert strategy.traffic["a"].down == 0


def test_uniform_relevance_gives_each_the_other_ones_upload(tmp_path):
    strategy, _ = run(tmp_path, methods.uniform(NUMBER))

    # G = .15 for a and .05 for b: h = .2 for both
    assert trained(strategy) == near(0.05 + 0.05 * 0.8, 0.15 + 0.05 * 2.8)


def test_a_uniform_warm_start_moves_the_own_adapter_too(tmp_path):
    strategy, _ = run(tmp_path, methods.uniform(NUMBER, warm_start=True))

    # L starts at .1 for both, G is .15 and .05: h = .25, .15
    assert trained(strategy) == near(0.1 + 0.05 * 0.75, 0.1 + 0.05 * 2.85)


def update(client, p, *, sketch=None, num_examples=1, bound=None):
    shared = SharedTensors(FlatTensors.pack({"P": torch.tensor([p])}), FlatTensors.pack(bound or {}))
    return ClientUpdate(client, 0, num_examples, "one", shared, sketch)


SKETCHES = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([1.0, 1.0]), "c": torch.tensor([0.0, 1.0])}
UPDATES = [update(client, p, sketch=SKETCHES[client]) for client, p in zip("abc", (1.0, 2.0, 4.0), strict=True)]


def frozen_of_a(method):
    return method.aggregator.aggregate(UPDATES, {}).personalized["a"].frozen.common.vector.item()


def test_ours_standardises_rows_and_the_papers_does_not():
    """The cosines of a with b and c are .7071 and 0."""
    ours, paper = (frozen_of_a(method(NUMBER)) for method in (methods.ours, methods.paper))

    # standardised they are 1 and -1, so exp(2) : exp(-2); plain exp(1.4142) : 1
    assert ours == pytest.approx((2 * exp(2) + 4 * exp(-2)) / (exp(2) + exp(-2)))
    assert paper == pytest.approx((2 * exp(2**0.5) + 4) / (exp(2**0.5) + 1))
    assert frozen_of_a(methods.unaligned(NUMBER)) == ours


def test_random_relevance_is_as_concentrated_and_somebody_elses():
    found = {round(frozen_of_a(methods.shuffled(NUMBER, seed=seed)), 5) for seed in range(8)}

    right, wrong = ((x * exp(2) + y * exp(-2)) / (exp(2) + exp(-2)) for x, y in ((2, 4), (4, 2)))
    assert found == {round(right, 5), round(wrong, 5)}  # of two others, a seed picks either


def test_the_oracle_counts_shared_tasks():
    tasks = {"a": ["x", "y"], "b": ["z"], "c": ["y"]}

    assert frozen_of_a(methods.oracle(NUMBER, tasks=tasks)) == 4.0


def test_flexlora_averages_what_factors_compute():
    """B A is 2 * 1 and 4 * 3; one to three gives (2 + 36) / 4, where factors would give 3.5 * 2.5."""
    factors = {"a": (1.0, 2.0, 1), "b": (3.0, 4.0, 3)}
    updates = [
        update(client, 0.0, num_examples=n, bound={"0.A": torch.tensor([[A]]), "0.B": torch.tensor([[B]])})
        for client, (A, B, n) in factors.items()
    ]

    sent = methods.flexlora(NUMBER).aggregator.aggregate(updates, {}).personalized["a"].start

    tensors = sent.same_architecture.unpack()
    assert (tensors["0.B"] @ tensors["0.A"]).item() == pytest.approx(9.5)


def test_hetlora_weighs_by_the_norm_of_the_product():
    """B A is 2 * 1 and 4 * 3, P is 0, so the weights are 2 : 12 whatever the numbers of examples."""
    updates = [
        update(client, 0.0, num_examples=n, bound={"0.A": torch.tensor([[A]]), "0.B": torch.tensor([[B]])})
        for client, (A, B, n) in {"a": (1.0, 2.0, 9), "b": (3.0, 4.0, 1)}.items()
    ]

    sent = methods.hetlora(NUMBER, ranks={"a": 1, "b": 1}).aggregator.aggregate(updates, {}).personalized["a"].start

    tensors = sent.same_architecture.unpack()
    assert tensors["0.A"].item() == pytest.approx((2 * 1 + 12 * 3) / 14)
    assert tensors["0.B"].item() == pytest.approx((2 * 2 + 12 * 4) / 14)


def test_hetlora_clients_train_and_receive_no_more_than_their_rank(tmp_path):
    method = methods.hetlora(SMALL, ranks={"a": 1, "b": 2})
    strategy = strategy_of(list("ab"), share=(), aggregator=method.aggregator, local_steps=2)
    module = Blocks()

    trainer_of(tmp_path, strategy, max_epochs=2, callbacks=[*method.callbacks]).fit(module, datamodule=ClientsOwnData())

    cut = {"A": (slice(1, None),), "B": (slice(None), slice(1, None)), "P": (slice(1, None),), "Q": (slice(1, None),)}
    states = {client: strategy.personalize(module, client).state_dict() for client in "ab"}
    stored = {client: unpack_state(strategy.store.get(client))["state_dict"] for client in "ab"}
    for name, layer in (("A", 0), ("B", 0), ("P", 1), ("Q", 1)):
        key = f"blocks.{layer}.fc.colora_{name}.default"
        for found in (states, stored):
            assert not found["a"][key][cut[name]].any()
            assert found["b"][key][cut[name]].any()
            assert found["a"][key].any()
    assert not states["a"]["blocks.1.fc.colora_P.default"][:, 1:].any()


def test_an_unaligned_control_overrules_the_alignment():
    assert methods.unaligned(partial(NUMBER, aligned="bases.safetensors")).callbacks[0].aligned is None


def squares(module, batch):
    h = module(batch[0])
    return nn.functional.mse_loss(h, batch[1]), torch.cat([torch.zeros_like(h), h], dim=1)


FAMILY_TASKS = {"a": ["x"], "b": ["x"], "wide": ["x", "y"]}
METHODS = {
    "local_only": methods.local_only,
    "no_exchange": methods.no_exchange,
    "zero_global": methods.zero_global,
    "fedavg": methods.fedavg,
    "warm_started": methods.warm_started,
    "fedprox": methods.fedprox,
    "fedper": partial(methods.fedper, keep=["main/0/fc/Q", "blocks.0.*"]),
    "ditto": methods.ditto,
    "fedsim": methods.fedsim,
    "feddpa": methods.feddpa,
    "feddat": partial(methods.feddat, outputs=squares),
    "perada": partial(methods.perada, batches=lambda module: [torch.eye(4)], logits=public_logits),
    "flexlora": methods.flexlora,
    "hetlora": partial(methods.hetlora, ranks={"a": 1, "b": 2, "wide": 2}),
    "ours": methods.ours,
    "paper": methods.paper,
    "uniform": partial(methods.uniform, warm_start=True),
    "shuffled": methods.shuffled,
    "oracle": partial(methods.oracle, tasks=FAMILY_TASKS),
    "unaligned": methods.unaligned,
}
SMALL = partial(CoLoRA, rank=2, alpha=4, num_blocks=1, target_modules=["fc"], train_also=["head"], dropout=0.2)


def test_every_method_is_run_below():
    public = {name for name in methods.__all__ if name[0].islower()}

    assert public == set(METHODS)


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())
def test_two_families_train_and_resuming_equals_not_stopping(tmp_path, make):
    def play(folder, rounds, **arguments):
        method = make(SMALL)
        clients = ["a", "b", Client("wide", model=WideBlocks)]
        strategy = strategy_of(clients, share=(), aggregator=method.aggregator, local_steps=2)
        callbacks = [*method.callbacks, FixedSketch()]
        module = Blocks()
        fit(folder, strategy, rounds, module=module, callbacks=callbacks, horizon=2, **arguments)
        return strategy, module

    strategy, module = play(tmp_path / "whole", 2)
    play(tmp_path / "parts", 1)
    resumed, _ = play(tmp_path / "parts", 2, ckpt_path=tmp_path / "parts" / "epoch=0.ckpt")

    got, expected = (outcome(tmp_path / folder / "epoch=1.ckpt") for folder in ("parts", "whole"))
    assert_equal_states(got, expected)
    assert resumed.traffic == strategy.traffic
    x = torch.ones(1, 4)
    assert not torch.equal(strategy.personalize(module, "a")(x), Blocks()(x))
    state = unpack_state(strategy.store.get("a"))["state_dict"]
    for name, value in state.items():
        if "colora_B" in name or "colora_P" in name:
            assert value.any(), f"{name} was not trained"


def test_two_adapters_in_a_model_that_is_built_for_each_client(tmp_path):
    """`configure_model` builds by the client's id, so the second adapter must come in each turn before the restore."""
    method = methods.ditto(SMALL)
    strategy = strategy_of(["a", "wide"], share=(), aggregator=method.aggregator, local_steps=2)
    module = Late()

    trainer_of(tmp_path, strategy, max_epochs=2, callbacks=[*method.callbacks]).fit(module, datamodule=ClientsOwnData())

    for client, width in (("a", 8), ("wide", 12)):
        state = unpack_state(strategy.store.get(client))["state_dict"]
        kept, shared = (state[f"blocks.0.fc.colora_B.{name}"] for name in ("default", "shared"))
        assert kept.shape == shared.shape == (width, 2)
        assert kept.any()
        assert shared.any()
        assert not torch.equal(kept, shared)
