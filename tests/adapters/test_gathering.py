"""Promises of `lightning_pfl.adapters.gathering`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_pfl.adapters import inject
from lightning_pfl.adapters.alignment import LeastSquares, _sites, align
from lightning_pfl.adapters.gathering import Site, Watched, causal_lm_loss, look
from lightning_pfl.adapters.layer_sums import LayerSums, ProjectedSums
from lightning_pfl.adapters.readings import Reading
from lightning_pfl.functional.alignment import unexplained
from tests.adapters.test_alignment import TinyLM, config, pair, readings

LAYER = "main/0/fc1"


def site(model: TinyLM, rank: int = 3) -> Site:
    fc1 = model.blocks[0].fc1
    return Site(fc1, torch.randn(rank, fc1.in_features), torch.randn(fc1.out_features, rank))


def gather(anchor, students, records, *, layers, held_out, sink=ProjectedSums):
    """Sums of all records, every so-manyth held out."""
    own = Watched(*anchor).only(layers)
    watched = {name: Watched(name, *student).only(layers) for name, student in students.items()}
    sums = {n: {layer: sink(own.sites[layer], site) for layer, site in w.sites.items()} for n, w in watched.items()}
    for index, record in enumerate(records):
        for name, layer, seen in look(own, watched, record, loss=causal_lm_loss):
            sums[name][layer].add(seen, is_held_out=index % held_out == held_out - 1)
    return sums


def test_sums_are_of_the_layers_inputs_and_of_the_loss_gradients_at_its_outputs():
    """By autograd on the plain model; the anchor reads 12 positions, the student the 6 that end at even places."""
    anchor, student = TinyLM(6, 5, seed=0), TinyLM(8, 7, seed=1)
    at, to = site(anchor), site(student)
    ids = torch.randint(30, (2, 12))
    record = {
        "anchor": Reading({"input_ids": ids, "labels": ids}, torch.arange(1, 13).expand(2, 12)),
        "student": Reading({"input_ids": ids[:, ::2], "labels": ids[:, ::2]}, torch.arange(2, 13, 2).expand(2, 6)),
    }
    kept = []
    handle = anchor.blocks[0].fc1.register_forward_hook(lambda _, args, output: kept.extend([args[0], output]))
    logits = anchor(ids).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    (g,) = torch.autograd.grad(loss, [kept[1]])
    handle.remove()

    sums = gather(
        ("anchor", anchor, {LAYER: at}),
        {"student": (student, {LAYER: to})},
        [record],
        layers=[LAYER],
        held_out=2,
    )["student"][LAYER]

    assert sums.inputs.count == sums.gradients.count == 12
    # states at the even places; effects of all positions
    torch.testing.assert_close(sums.inputs.z, (kept[0][:, 1::2] @ at.A.T).sum((0, 1)).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.gradients.z, (g @ at.B).sum((0, 1)).double(), rtol=1e-4, atol=1e-4)


def test_every_fifth_record_is_held_out_and_reported_on():
    models = {"small": TinyLM(12, 16, seed=0), "large": TinyLM(20, 28, seed=1)}  # nothing in common: errors differ
    for model in models.values():
        inject(model, config())
    alignment = align(models, readings(), anchor="small", held_out=5, rule=LeastSquares())
    layer = alignment.report[0].layer
    sites = {}
    for name, model in models.items():
        fc1 = model.blocks[0].fc1
        bases = alignment.bases[fc1.colora_config["default"].base_identity]
        sites[name] = {layer: Site(fc1.base_layer, *bases[layer])}

    sums = gather(
        ("small", models["small"], sites["small"]),
        {"large": (models["large"], sites["large"])},
        readings(),
        layers=[layer],
        held_out=5,
    )["large"][layer]

    assert (sums.inputs.count, sums.held_out_inputs.count) == (32 * 24, 8 * 24)
    A, B = sites["large"][layer].A, sites["large"][layer].B
    assert alignment.report[0].after.missed_A == pytest.approx(unexplained(A, sums.held_out_inputs), rel=1e-4)
    assert alignment.report[0].after.missed_B == pytest.approx(
        unexplained(B.T, sums.held_out_gradients, of_variation=False), rel=1e-4
    )
    assert alignment.report[0].after.missed_B != pytest.approx(
        unexplained(B.T, sums.gradients, of_variation=False), rel=1e-4
    )


def test_dropout_is_off_while_models_are_watched():
    class Dropped(TinyLM):
        def forward(self, input_ids):
            with torch.no_grad():
                self.embedding.weight.copy_(nn.functional.dropout(self.embedding.weight, training=self.training))
            return super().forward(input_ids)

    model = Dropped(6, 5, seed=0).train()
    before = model.embedding.weight.clone()

    other = TinyLM(8, 7, seed=1)
    gather(
        ("a", model, {LAYER: site(model)}),
        {"b": (other, {LAYER: site(other)})},
        readings(("a", "b"), count=1),
        layers=[LAYER],
        held_out=2,
    )

    assert torch.equal(model.embedding.weight, before)


def test_work_in_place_behind_a_layer_does_not_spoil_its_gradient():
    class InPlace(TinyLM):
        def forward(self, input_ids):
            return SimpleNamespace(
                logits=self.head(self.blocks[0].fc2(self.blocks[0].fc1(self.embedding(input_ids)).mul_(2)))
            )

    anchor, student = InPlace(6, 5, seed=0), InPlace(8, 7, seed=1)
    at, to = site(anchor), site(student)
    sums = gather(
        ("a", anchor, {LAYER: at}),
        {"b": (student, {LAYER: to})},
        readings(("a", "b"), count=1),
        layers=[LAYER],
        held_out=2,
    )["b"][LAYER]

    # by hand: the gradient at fc1's output is twice that at what was doubled
    ids = readings(("a", "b"), count=1)[0]["a"].inputs["input_ids"]
    doubled = (2 * anchor.blocks[0].fc1(anchor.embedding(ids))).detach().requires_grad_()
    logits = anchor.head(anchor.blocks[0].fc2(doubled))
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    (g,) = torch.autograd.grad(loss, [doubled])
    torch.testing.assert_close(sums.gradients.z, (2 * g @ at.B).sum((0, 1)).double(), rtol=1e-4, atol=1e-4)


def unprojected(records, layers):
    models = pair()
    sites = {name: _sites(model) for name, model in models.items()}
    found = gather(
        ("small", models["small"], sites["small"]),
        {"large": (models["large"], sites["large"])},
        records,
        layers=layers,
        held_out=5,
        sink=LayerSums,
    )
    return found["large"], sites


def test_only_places_count_on_which_the_loss_depends():
    """Nothing is predicted after the last of 12 tokens: 11 places of 2 rows of 4 records; the fifth is held out."""
    layer = "main/1/fc2"
    found, sites = unprojected(readings(count=5), [layer])
    assert (found[layer].inputs.count, found[layer].held_out_inputs.count) == (4 * 2 * 11, 2 * 11)
    assert found[layer]._num_raw == 4 * 2 * 11
    assert found[layer].inputs.z.shape == (sites["small"][layer].A.shape[1],)


def test_what_all_rows_of_a_record_have_in_common_at_a_place_is_taken_off():
    layer = "main/0/fc1"
    same = []
    for record in readings(count=5):
        ids = record["small"].inputs["input_ids"][:1].expand(2, -1)
        reading = Reading({"input_ids": ids, "labels": ids}, record["small"].places)
        same.append({"small": reading, "large": reading})
    found, _ = unprojected(same, [layer])
    assert float(found[layer].inputs.xx.abs().max()) < 1e-10
    assert float(found[layer].mean.norm()) > 0.01, "but the mean is remembered"
    varied, _ = unprojected(readings(count=5), [layer])
    assert float(varied[layer].inputs.xx.abs().max()) > 0.1


def test_a_convolution_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"Conv2d\(3, 4, .* slides over its input\. Leave convolutions out"):
        Site(nn.Conv2d(3, 4, 3), torch.randn(2, 27), torch.randn(4, 2))
