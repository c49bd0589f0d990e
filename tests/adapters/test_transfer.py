"""The transfer test: what P and Q of one model are worth in another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_pfl.adapters import inject
from lightning_pfl.adapters.alignment import LeastSquares
from lightning_pfl.adapters.transfer import Transfer, fit_pq, transfer
from tests.adapters.test_alignment import VOCABULARY, TinyLM, align, config, pair, readings


def task(seed):
    """Answer with the token that is twice the last one, which no model does by itself."""
    ids = torch.randint(VOCABULARY, (64, 5), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "answers": (2 * ids[:, -1]) % VOCABULARY}


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["input_ids"]).logits[:, -1], batch["answers"])


def measured(models):
    return transfer(
        models["small"],
        models["large"],
        fit=lambda model: fit_pq(model, (task(seed) for seed in range(30)), loss=loss, lr=0.1),
        score=lambda model: float(loss(model, task(99))),
    )


def test_P_of_one_planted_model_is_worth_in_the_other_what_its_own_is_once_they_are_aligned():
    models = pair()
    unaligned = measured(models)
    align(models, readings(count=60), anchor="small", rule=LeastSquares()).apply(models["large"])
    aligned = measured(models)

    assert unaligned.own < unaligned.zero - 0.1
    assert unaligned.recovered < 0.3
    assert aligned.transferred < aligned.zero
    assert aligned.recovered > 0.8


def test_both_models_are_left_as_they_were_and_private_layers_start_from_where_they_were():
    models = {"small": TinyLM(12, 16, seed=0), "large": TinyLM(20, 28, seed=1)}
    for model in models.values():
        inject(model, config(num_blocks=1))  # so the first block's layers are conventional
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.fill_(0.01)
    before = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    measured(models)
    for name, model in models.items():
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_fit_pq_trains_P_and_Q_and_nothing_else():
    model = pair()["small"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit_pq(model, [task(0)], loss=loss, lr=0.1)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if "colora_P" in key or "colora_Q" in key}


def test_what_is_recovered_is_a_share_of_what_own_training_gains():
    assert Transfer(zero=2.0, own=1.0, transferred=1.25).recovered == 0.75
    assert Transfer(zero=2.0, own=1.0, transferred=3.0).recovered == -1.0
    assert math.isnan(Transfer(zero=2.0, own=2.5, transferred=1.0).recovered)


def test_models_without_the_same_layers_are_refused():
    models = pair()
    narrow = TinyLM(12, 16, seed=0)
    inject(narrow, config(target_modules=["fc1"]))
    with pytest.raises(ValueError, match=r"only one of them has \['main/0/fc2/P'"):
        transfer(narrow, models["large"], fit=lambda _: None, score=lambda _: 0.0)
    low = TinyLM(12, 16, seed=0)
    inject(low, config(r=3))
    with pytest.raises(ValueError, match="their shapes differ"):
        transfer(low, models["large"], fit=lambda _: None, score=lambda _: 0.0)
