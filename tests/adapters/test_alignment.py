"""Promises of `lightning_pfl.adapters.alignment`, shown on a network and its disguised copy in a wider space."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_pfl.adapters import CoLoraConfig, adapter_parameters, bases_of, inject, load_local, shared_tensors
from lightning_pfl.adapters.alignment import Alignment, Canonical, CcaB, GradientB, LeastSquares
from lightning_pfl.adapters.alignment import align as align_by
from lightning_pfl.adapters.gathering import causal_lm_loss
from lightning_pfl.adapters.readings import Reading
from tests.adapters.test_readings import Words

VOCABULARY = 30


def align(*args, rule=None, **kwargs):
    """By least squares unless a test says otherwise: there the anchor's bases stay, which makes expectations easy."""
    return align_by(*args, rule=rule or LeastSquares(), **kwargs)


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.fc2(torch.tanh(self.fc1(h)))


class TinyLM(nn.Module):
    """Every position sees the mean of what came before it, then two residual blocks."""

    def __init__(self, width: int, hidden: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        h = self.embedding(input_ids)
        h = h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[:, None].sqrt()
        for block in self.blocks:
            h = block(h)
        return SimpleNamespace(logits=self.head(h))


def disguised(model: TinyLM, width: int, hidden: int) -> TinyLM:
    """The same function in other coordinates: states rotated into a wider space, hidden units shuffled and padded."""
    copy = TinyLM(width, hidden, seed=77)
    old_width, old_hidden = model.head.in_features, model.blocks[0].fc1.out_features
    T = torch.linalg.qr(torch.randn(width, old_width))[0].T  # [old, new], orthonormal rows
    S = torch.eye(hidden)[torch.randperm(hidden)[:old_hidden]]  # [old, new], one unit of the new for each of the old
    with torch.no_grad():
        copy.embedding.weight.copy_(model.embedding.weight @ T)
        copy.head.weight.copy_(model.head.weight @ T)
        for new, old in zip(copy.blocks, model.blocks, strict=True):
            new.fc1.weight.copy_(S.T @ old.fc1.weight @ T)
            new.fc2.weight.copy_(T.T @ old.fc2.weight @ S)
    return copy


def config(**kwargs) -> CoLoraConfig:
    return CoLoraConfig(**{"r": 4, "alpha": 8, "num_blocks": 2, **kwargs})


def pair() -> dict[str, TinyLM]:
    small = TinyLM(12, 16, seed=0)
    models = {"small": small, "large": disguised(small, 20, 28)}
    for model in models.values():
        inject(model, config())
    return models


def readings(names: tuple[str, ...] = ("small", "large"), count: int = 40) -> list[dict[str, Reading]]:
    generator = torch.Generator().manual_seed(5)
    records = []
    for _ in range(count):
        ids = torch.randint(VOCABULARY, (2, 12), generator=generator)
        reading = Reading({"input_ids": ids, "labels": ids}, torch.arange(12).expand(2, 12))
        records.append(dict.fromkeys(names, reading))
    return records


def trained(model: TinyLM) -> TinyLM:
    """Any P and Q will do, so long as they change the output a lot."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in adapter_parameters(model).pq.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def change(model: TinyLM, ids: Tensor, base: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits - base


def test_P_and_Q_do_the_same_in_the_disguised_model_once_it_is_aligned():
    models = pair()
    ids = torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    base = models["small"](ids).logits.detach()
    torch.testing.assert_close(models["large"](ids).logits.detach(), base, atol=1e-4, rtol=0)  # the disguise is exact
    alignment = align(models, readings(), anchor="small")
    shared = shared_tensors(trained(models["small"]))
    wanted = change(models["small"], ids, base)

    load_local(models["large"], shared)
    unaligned = (change(models["large"], ids, base) - wanted).norm() / wanted.norm()
    alignment.apply(models["large"])
    aligned = (change(models["large"], ids, base) - wanted).norm() / wanted.norm()

    assert unaligned > 1
    assert aligned < 0.02
    assert all(fit.after.missed_A < 1e-4 and fit.after.missed_B < 1e-4 for fit in alignment.report)


def test_canonical_bases_make_P_and_Q_do_the_same_in_the_disguised_model():
    """The anchor gets new bases too, so both models apply the alignment; all coordinates agree, so none is dimmed."""
    models = pair()
    ids = torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    base = models["small"](ids).logits.detach()
    alignment = align(models, readings(count=200), anchor="small", rule=Canonical(ridge=1e-6))
    for model in models.values():
        alignment.apply(model)
    shared = shared_tensors(trained(models["small"]))
    wanted = change(models["small"], ids, base)
    load_local(models["large"], shared)

    assert wanted.norm() > 0.1 * base.norm()
    assert (change(models["large"], ids, base) - wanted).norm() / wanted.norm() < 0.05
    assert all(fit.after.missed_A < 0.01 and fit.after.missed_B < 0.01 for fit in alignment.report)


@pytest.mark.parametrize("rule", [Canonical(ridge=1e-6), LeastSquares()], ids=["canonical", "least squares"])
def test_any_number_of_models_follow_one_anchor(rule):
    """Two disguises of one model, each in its own width: what is P of any is P of all."""
    small = TinyLM(12, 16, seed=0)
    models = {"small": small, "large": disguised(small, 20, 28), "wide": disguised(small, 15, 40)}
    for model in models.values():
        inject(model, config())
    ids = torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    base = small(ids).logits.detach()
    alignment = align(models, readings(tuple(models), count=120), anchor="small", rule=rule)
    for model in models.values():
        alignment.apply(model)
    shared = shared_tensors(trained(models["wide"]))
    wanted = change(models["wide"], ids, base)
    for name in ("small", "large"):
        load_local(models[name], shared)
        assert (change(models[name], ids, base) - wanted).norm() / wanted.norm() < 0.05
    assert len(alignment.bases) == 3
    assert len(alignment.report) == 2 * 4


def test_canonical_bases_do_not_see_the_mean_of_the_inputs():
    """Otherwise P would carry a constant, which is another in every model."""
    models = pair()
    seen: dict[str, list[Tensor]] = {"0": [], "1": []}
    for name, block in models["small"].blocks.named_children():
        block.fc1.base_layer.register_forward_hook(lambda _, args, __, name=name: seen[name].append(args[0].detach()))
    alignment = align(models, readings(count=25), anchor="small", rule=Canonical())
    for name, inputs in seen.items():
        # fitted on four of five records, at places on which the loss depends: all but the last of a row
        mean = (
            torch.stack([x[:, :-1] for index, x in enumerate(inputs[:25]) if index % 5 != 4]).double().mean((0, 1, 2))
        )
        A = alignment.bases[alignment.anchor][f"main/{name}/fc1"][0].double()
        assert (A @ mean).norm() < 1e-4 * A.norm() * mean.norm()


def test_canonical_bases_turn_down_what_unrelated_models_do_not_share():
    models = {"small": TinyLM(12, 16, seed=0), "large": TinyLM(20, 28, seed=1)}
    for model in models.values():
        inject(model, config())
    plain = align(models, readings(count=100), anchor="small", rule=Canonical(power=0))
    dimmed = align(models, readings(count=100), anchor="small", rule=Canonical(power=2))
    for layer, (A, _) in plain.bases[plain.anchor].items():
        ratios = (dimmed.bases[plain.anchor][layer][0].norm(dim=1) / A.norm(dim=1)).tolist()
        assert all(0 <= ratio <= 1 + 1e-5 for ratio in ratios)
        assert max(ratios) == pytest.approx(1), "relative to the layer's best, so that a layer always learns"
        assert min(ratios) < 0.9


def test_cca_leaves_B_in_its_random_column_space_where_gradients_find_the_anchors():
    models = pair()
    own = bases_of(models["large"])

    missed = {}
    for rule in (GradientB(), CcaB()):
        alignment = align(models, readings(), anchor="small", rule=LeastSquares(rule))
        missed[type(rule)] = min(fit.after.missed_B for fit in alignment.report)
        if isinstance(rule, CcaB):
            for layer, (_, B) in alignment.bases[alignment.report[0].model].items():
                torch.testing.assert_close(own[layer][1] @ (own[layer][1].T @ B), B, atol=1e-4, rtol=0)

    assert missed[GradientB] < 1e-4
    assert missed[CcaB] > 0.5


def test_orthonormal_only_gives_orthonormal_rows():
    alignment = align(pair(), readings(), anchor="small", rule=LeastSquares(orthonormal_only=True))

    for A, _ in alignment.bases[alignment.report[0].model].values():
        torch.testing.assert_close(A @ A.T, torch.eye(4), atol=1e-5, rtol=0)


def test_models_are_left_as_they_were():
    models = pair()
    models["small"].train()
    models["large"].eval()
    before = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    grads = {name: [p.requires_grad for p in model.parameters()] for name, model in models.items()}

    align(models, readings(), anchor="small")

    assert models["small"].training
    assert models["small"].blocks[0].training
    assert not models["large"].training
    for name, model in models.items():
        assert [p.requires_grad for p in model.parameters()] == grads[name]
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[name][key])


def test_several_passes_give_the_bits_of_one():
    one = align(pair(), readings(), anchor="small")
    several = align(pair(), readings(), anchor="small", max_bytes=1)

    assert one.report == several.report
    for base, layers in one.bases.items():
        for layer, tensors in layers.items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, several.bases[base][layer], strict=True))


def test_data_that_can_be_read_once_only_is_refused_where_it_must_be_read_twice():
    with pytest.raises(ValueError, match="4 passes over the public data"):
        align(pair(), iter(readings()), anchor="small", max_bytes=1)


def test_texts_are_matched_where_two_tokenizers_cut_alike():
    """Cut after 2 and after 3 characters: of 24, both have read 6, 12, 18 and 24 characters; a fifth is held out."""
    models = pair()
    texts = ["abcdefghijklmnopqrstuvwx"] * 60

    alignment = align(
        models,
        texts,
        anchor="small",
        tokenizers={"small": Words(2, start=True), "large": Words(3)},
        loss=causal_lm_loss,
        held_out=5,
    )

    assert {fit.tokens for fit in alignment.report} == {48 * 4}


def test_texts_ask_both_models_for_the_same_words_by_default():
    """Two vocabularies in another order: only gradients for the same words make the disguised model follow."""

    class Lettered(Words):
        def __init__(self, order):
            super().__init__(1)
            self.ids = {letter: index for index, letter in enumerate(order)}

        def __call__(self, text, **kwargs):
            return {**super().__call__(text, **kwargs), "input_ids": [self.ids[letter] for letter in text]}

        def get_vocab(self):
            return {"\u2581" + 3 * letter: index for letter, index in self.ids.items()}

    letters = "abcdefghijklmnopqrstuvwxyz"
    shuffled = torch.randperm(26, generator=torch.Generator().manual_seed(4)).tolist()
    models = {"small": TinyLM(12, 16, seed=0)}
    models["large"] = disguised(models["small"], 20, 28)
    with torch.no_grad():  # token k of the small model is token shuffled.index(k) of the large one
        for table in (models["large"].embedding.weight, models["large"].head.weight):
            table[:26] = table[shuffled]
    for model in models.values():
        inject(model, config())
    generator = torch.Generator().manual_seed(6)
    texts = ["".join(letters[i] for i in torch.randint(26, (12,), generator=generator)) for _ in range(120)]
    tokenizers = {"small": Lettered(letters), "large": Lettered([letters[i] for i in shuffled])}

    alignment = align(models, texts, anchor="small", tokenizers=tokenizers)

    assert all(fit.after.missed_A < 1e-3 and fit.after.missed_B < 1e-3 for fit in alignment.report)
    tokenizers["large"].get_vocab = lambda: {"\u2581aaa": 0, "\u2581111": 1}
    with pytest.raises(ValueError, match="two that are one token in each vocabulary, but there are 1"):
        align(models, texts, anchor="small", tokenizers=tokenizers)


def test_layers_that_the_anchor_lacks_are_reported_and_keep_their_bases():
    models = {"small": TinyLM(12, 16, seed=0), "large": TinyLM(20, 28, seed=1)}
    inject(models["small"], config(target_modules=["fc1"]))
    inject(models["large"], config())
    own = bases_of(models["large"])

    alignment = align(models, readings(), anchor="small")
    alignment.apply(models["large"])

    assert list(alignment.unaligned.values()) == [["main/0/fc2", "main/1/fc2"]]
    now = bases_of(models["large"])
    assert torch.equal(now["main/0/fc2"][0], own["main/0/fc2"][0])
    assert not torch.equal(now["main/0/fc1"][0], own["main/0/fc1"][0])


def test_a_saved_alignment_loads_as_it_was(tmp_path):
    models = pair()
    alignment = align(models, readings(), anchor="small")

    alignment.save(tmp_path / "alignment")
    loaded = Alignment.load(tmp_path / "alignment")
    loaded.apply(models["large"])

    assert loaded.anchor == alignment.anchor
    assert loaded.report == alignment.report
    assert loaded.unaligned == alignment.unaligned
    expected = alignment.bases[alignment.report[0].model]
    for layer, tensors in bases_of(models["large"]).items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected[layer], strict=True))


def test_files_of_two_alignments_are_refused(tmp_path):
    for folder, names in (("one", ["fc1"]), ("other", ["fc1", "fc2"])):
        models = {"small": TinyLM(12, 16, seed=0), "large": TinyLM(20, 28, seed=1)}
        for model in models.values():
            inject(model, config(target_modules=names))
        align(models, readings(), anchor="small").save(tmp_path / folder)
    (tmp_path / "one/alignment.json").replace(tmp_path / "other/alignment.json")

    with pytest.raises(ValueError, match="do not belong together"):
        Alignment.load(tmp_path / "other")

    text = (tmp_path / "other/alignment.json").read_text().replace('"version": 2', '"version": 3')
    (tmp_path / "other/alignment.json").write_text(text)
    with pytest.raises(ValueError, match="format 3, but this release reads 2"):
        Alignment.load(tmp_path / "other")


def test_an_alignment_of_other_models_or_layers_is_refused():
    alignment = align(pair(), readings(), anchor="small")
    stranger = TinyLM(14, 16, seed=0)
    inject(stranger, config())
    with pytest.raises(ValueError, match="covers the base models"):
        alignment.apply(stranger)

    models = {"small": TinyLM(12, 16, seed=0), "large": TinyLM(20, 28, seed=1)}
    for model in models.values():
        inject(model, config(num_blocks=1))
    narrow = align(models, readings(), anchor="small")
    with pytest.raises(ValueError, match="not made for: \\['main/1/fc1', 'main/1/fc2'\\]"):
        narrow.apply(pair()["large"])


def test_models_that_cannot_be_aligned_are_refused():
    with pytest.raises(ValueError, match="`anchor` must name one of the models"):
        align(pair(), readings(), anchor="medium")
    with pytest.raises(ValueError, match="`held_out` must be at least 2"):
        align(pair(), readings(), anchor="small", held_out=1)

    models = {"small": TinyLM(12, 16, seed=0), "large": TinyLM(20, 28, seed=1)}
    inject(models["small"], config(r=4))
    inject(models["large"], config(r=3))
    with pytest.raises(ValueError, match="`small` has 4 and `large` has 3"):
        align(models, readings(), anchor="small")

    models = {"small": TinyLM(12, 16, seed=0), "large": TinyLM(20, 28, seed=1)}
    inject(models["small"], config(target_modules=["fc1"]))
    inject(models["large"], config(target_modules=["fc2"]))
    with pytest.raises(ValueError, match="no layer in common"):
        align(models, readings(), anchor="small")

    models = {"small": TinyLM(12, 16, seed=0), "large": TinyLM(12, 16, seed=1)}
    for model in models.values():
        inject(model, config())
    with pytest.raises(ValueError, match="`large` and `small` are the same base model"):
        align(models, readings(), anchor="small")

    with pytest.raises(ValueError, match="holds no Co-LoRA adapters"):
        align({"small": TinyLM(12, 16, seed=0), "large": TinyLM(20, 28, seed=1)}, readings(), anchor="small")


def test_public_data_that_does_not_do_is_refused():
    with pytest.raises(TypeError, match=r"no(ne)? for \['large'\]"):
        align(pair(), ["abc"], anchor="small", tokenizers={"small": Words(1)})
    with pytest.raises(ValueError, match=r"A record .* no reading for \['large'\], only for \['small'\]"):
        align(pair(), readings(("small",)), anchor="small")
    with pytest.raises(ValueError, match="no held-out text"):
        align(pair(), readings(count=4), anchor="small")
    with pytest.raises(ValueError, match="needs `labels`"):
        align(
            pair(),
            [
                {k: Reading({"input_ids": r.inputs["input_ids"]}, r.places) for k, r in rec.items()}
                for rec in readings()
            ],
            anchor="small",
        )
    with pytest.raises(ValueError, match=r"sees \[2, 12\] vectors, but Reading.places names \[2, 5\]"):
        align(
            pair(),
            [{k: Reading(r.inputs, r.places[:, :5]) for k, r in record.items()} for record in readings()],
            anchor="small",
        )


def test_a_layer_that_is_not_reached_or_runs_twice_is_refused():
    class Odd(TinyLM):
        def forward(self, input_ids: Tensor) -> SimpleNamespace:
            h = self.embedding(input_ids)
            for _ in range(self.times):
                h = self.blocks[0](h)
            return SimpleNamespace(logits=self.head(h))

    for times, message in ((2, "runs more than once"), (1, "did not reach its layers")):
        odd = Odd(20, 28, seed=1)
        odd.times = times
        inject(odd, config())
        with pytest.raises(ValueError, match=message):
            align({"small": pair()["small"], "large": odd}, readings(), anchor="small")


def test_transformers_of_two_widths_in_bfloat16_align():
    from transformers import LlamaConfig, LlamaForCausalLM

    models = {}
    for name, width in (("small", 16), ("large", 24)):
        torch.manual_seed(width)
        shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
        model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1))
        models[name] = model.to(torch.bfloat16)
        inject(models[name], config(target_modules=["q_proj", "down_proj"]))

    alignment = align(models, readings(count=20), anchor="small")

    assert sorted(fit.layer for fit in alignment.report) == ["main/0/down", "main/0/q", "main/1/down", "main/1/q"]
    assert all(A.dtype == B.dtype == torch.float32 for A, B in alignment.bases[alignment.report[0].model].values())
    alignment.apply(models["large"])
