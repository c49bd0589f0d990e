r"""Bases under which one model's P and Q mean the same in models of other widths, depths and families.

Start at `align`: models with Co-LoRA adapters and public data in, an `Alignment` out, which is saved once and given to
every client (``CoLoRA(aligned=...)``). One model is the anchor; bases are chosen layer by layer
with the same address, over positions that have read the same (`lightning_pfl.adapters.readings`), by a rule
(`lightning_pfl.adapters.rules`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_pfl.adapters.aligned import Alignment, Bases, LayerFit
from lightning_pfl.adapters.contrasts import contrast_loss
from lightning_pfl.adapters.descent import GradientDescent
from lightning_pfl.adapters.fidelity import Errors, Fidelity
from lightning_pfl.adapters.gathering import Loss, Sink, Site, Watched, causal_lm_loss, look
from lightning_pfl.adapters.injection import ADAPTER, adapted_layers, config_of
from lightning_pfl.adapters.public_data import PublicData, Record
from lightning_pfl.adapters.readings import Reading
from lightning_pfl.adapters.rules import Canonical, CcaB, FitB, GradientB, LeastSquares, Rule
from lightning_pfl.adapters.tensors import bases_of

__all__ = [
    "Alignment",
    "Bases",
    "Canonical",
    "CcaB",
    "Errors",
    "FitB",
    "GradientB",
    "GradientDescent",
    "LayerFit",
    "LeastSquares",
    "Rule",
    "align",
]

log = logging.getLogger(__name__)


def align(
    models: Mapping[str, nn.Module],
    data: Iterable[str] | Iterable[Sequence[str]] | Iterable[Mapping[str, Reading]],
    *,
    anchor: str,
    tokenizers: Mapping[str, Any] | None = None,
    rule: Rule[Any] | None = None,
    loss: Loss | None = None,
    held_out: int = 5,
    max_bytes: int = 2**31,
) -> Alignment:
    """Fit the bases of several models to those of one of them.

    Args:
        models: per name, a model with Co-LoRA adapters (`inject`) of the same rank and number of blocks. They are left
            as they are; to use the result, hand it to ``CoLoRA(aligned=...)`` or to `set_bases`.
        data: public data: texts (then ``tokenizers`` must name one for each model), or records with a `Reading` for
            each model, or lists of either; a list, a data set, a DataLoader that does not shuffle, a generator where
            one pass is enough. A few hundred texts do; each is read by all models.
        anchor: name of the model that the others are compared with, usually the smallest.
        tokenizers: per name of a model, its tokenizer; for texts only.
        rule: how bases are chosen. None: `Canonical()`, by which the anchor gets new bases too. The paper's is
            ``LeastSquares(CcaB(), orthonormal_only=True)``; for widths whose squares do not fit into memory,
            `GradientDescent()`.
        loss: whose gradients B follows: a scalar of a model and `Reading.inputs`, summed (not averaged) over what the
            model predicts. None: for texts, how much the model prefers one word to another after the text
            (`lightning_pfl.adapters.contrasts`); for records, the cross entropy of their ``labels``.
        held_out: every how-manyth text is used to choose ridges and to measure, not to fit.
        max_bytes: of what a rule holds at once (`Rule.num_bytes`). Models that need more are read in several passes,
            for which ``data`` must be something that can be iterated over again. One layer may exceed it.

    Returns:
        The alignment, with the anchor's bases in it; its `report` says per layer what was missed before and is missed
        now, on the first 64 held-out records.

    Raises:
        ValueError: a name without a model, ranks that differ, models without a common address, too little data,
            one-shot data where several passes are needed, data that differ between passes, or a convolution.
        TypeError: texts without tokenizers, or items that are neither texts nor records.

    Source:
        arXiv:2506.11024, initial alignment; there the anchor's bases are random, A is fitted by gradient descent and B
        rotated inside its random column space. Why ours differs is told in docs/design/first_experiment.md.
    """
    chosen: Rule[Any] = rule or Canonical()
    if anchor not in models:
        raise ValueError(f"`anchor` must name one of the models {sorted(models)}, but is `{anchor}`.")
    if held_out < 2:
        raise ValueError(f"`held_out` must be at least 2 (every how-manyth text is not fitted), but is {held_out}.")
    everyone = {name: Watched(name, model, _sites(model)) for name, model in models.items()}
    _check_ranks(everyone, anchor)
    base = _base_identities(models)
    own = everyone.pop(anchor)
    students = {name: watched.only(own.sites) for name, watched in everyone.items()}
    if not students:
        raise ValueError(f"Aligning needs two models at least, but there is only the anchor `{anchor}`.")
    for name, watched in everyone.items():
        if not students[name].sites:
            raise ValueError(
                f"`{name}` has no layer in common with the anchor `{anchor}`: {sorted(watched.sites)[:4]} ... against "
                f"{sorted(own.sites)[:4]} .... Adapt the same towers and roles in both (`blocks`, `roles`)."
            )
    shared = [layer for layer in own.sites if any(layer in student.sites for student in students.values())]
    groups = list(_groups(shared, own, students, chosen, max_bytes))
    public = PublicData(data, list(models), tokenizers, ask_for_words=loss is None, held_out=held_out)
    public.check_passes(len(groups) * chosen.passes, f"{type(chosen).__name__} within max_bytes={max_bytes}")
    loss = loss or _default_loss

    before = {name: _bases(watched) for name, watched in {anchor: own, **everyone}.items()}
    after = {name: dict(bases) for name, bases in before.items()}
    counts: dict[tuple[str, str], int] = {}
    for layers in groups:
        sinks = _gather(own.only(layers), {n: w.only(layers) for n, w in students.items()}, public, chosen, loss)
        for layer in layers:
            having = {name: of_layers[layer] for name, of_layers in sinks.items() if layer in of_layers}
            fitted = chosen.fit(having, own.sites[layer], {name: students[name].sites[layer] for name in having})
            after[anchor][layer] = fitted.anchor
            for name, sink in having.items():
                after[name][layer] = fitted.students[name]
                counts[name, layer] = sink.count
        del sinks, having, sink  # before the next group's are made
    measured = _measure(own.only(shared), students, public.kept, (before, after), loss)
    report = tuple(
        LayerFit(base[name], layer, counts[name, layer], *errors) for (name, layer), errors in measured.items()
    )
    for fit in report:
        log.info("%s %s: before %s, after %s.", fit.model, fit.layer, fit.before, fit.after)
    unaligned = {base[name]: sorted(set(watched.sites) - set(own.sites)) for name, watched in everyone.items()}
    for identity, layers in unaligned.items():
        if layers:
            log.warning("`%s` has layers that the anchor lacks; they keep bases of their own: %s.", identity, layers)
    covered = {
        base[name]: {layer: pair for layer, pair in bases.items() if layer in own.sites}
        for name, bases in after.items()
    }
    return Alignment(base[anchor], covered, report, unaligned)


def _gather(
    anchor: Watched, students: Mapping[str, Watched], public: PublicData, rule: Rule[Any], loss: Loss
) -> dict[str, dict[str, Sink]]:
    """Let a rule keep what it wants of all public data, per student and layer."""
    sinks: dict[str, dict[str, Sink]] = {
        name: {layer: rule.sink(anchor.sites[layer], site) for layer, site in student.sites.items()}
        for name, student in students.items()
    }
    for _ in range(rule.passes):
        held_out = dict.fromkeys(((n, layer) for n, of_layers in sinks.items() for layer in of_layers), 0)
        for record, is_held_out in public.records():
            for name, layer, seen in look(anchor, students, record, loss=loss):
                sinks[name][layer].add(seen, is_held_out=is_held_out)
                held_out[name, layer] += is_held_out * len(seen.places)
        for (_, layer), count in held_out.items():
            if count < 2:
                raise ValueError(
                    f"Too little public data for layer `{layer}`: no held-out text has a position that both models "
                    "have read. Give more texts, or check that both models read the same ones."
                )
    return sinks


def _measure(
    anchor: Watched,
    students: Mapping[str, Watched],
    records: Sequence[Record],
    bases: Sequence[Mapping[str, Mapping[str, Bases]]],
    loss: Loss,
) -> dict[tuple[str, str], tuple[Errors, ...]]:
    """What is missed under several sets of bases, by student and layer."""
    found = {
        (name, layer): [Fidelity(of[name][layer], of[anchor.name][layer]) for of in bases]
        for name, student in students.items()
        for layer in student.sites
    }
    for record in records:
        for name, layer, seen in look(anchor, students, record, loss=loss):
            for fidelity in found[name, layer]:
                fidelity.add(seen)
    return {key: tuple(fidelity.errors() for fidelity in held) for key, held in found.items()}


def _default_loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    return contrast_loss(model, inputs) if "contrast" in inputs else causal_lm_loss(model, inputs)


def _groups(
    layers: Sequence[str], anchor: Watched, students: Mapping[str, Watched], rule: Rule[Any], max_bytes: int
) -> Iterator[list[str]]:
    """Layers that fit into memory together."""
    group: list[str] = []
    used = 0
    for layer in layers:
        sites = [student.sites[layer] for student in students.values() if layer in student.sites]
        size = sum(rule.num_bytes(anchor.sites[layer], site) for site in sites)
        if group and used + size > max_bytes:
            yield group
            group, used = [], 0
        group.append(layer)
        used += size
    if group:
        yield group


def _bases(watched: Watched) -> dict[str, Bases]:
    return {layer: (site.A.float().cpu(), site.B.float().cpu()) for layer, site in watched.sites.items()}


def _sites(model: nn.Module) -> dict[str, Site]:
    bases = bases_of(model)
    layers = {str(layer.colora_address[ADAPTER]): layer.base_layer for _, layer in adapted_layers(model)}
    sites = {}
    for address, (A, B) in bases.items():
        base = layers[address]
        assert isinstance(base, nn.Module), "an adapted layer holds the layer that it adapts"
        sites[address] = Site(base, A, B)
    return sites


def _base_identities(models: Mapping[str, nn.Module]) -> dict[str, str]:
    base: dict[str, str] = {}
    for name, model in models.items():
        identity = config_of(model).base_identity
        assert identity is not None, "injection resolves the config"
        if identity in base.values():
            raise ValueError(
                f"`{name}` and `{next(other for other in base if base[other] == identity)}` are the same base model "
                f"(`{identity}`), for which there is one set of bases. Leave one out if they have the same weights; "
                "else inject one of them with a `base_identity` of its own in its CoLoraConfig."
            )
        base[name] = identity
    return base


def _check_ranks(everyone: Mapping[str, Watched], anchor: str) -> None:
    rank = next(iter(everyone[anchor].sites.values())).A.shape[0]
    for name, watched in everyone.items():
        for layer, site in watched.sites.items():
            if site.A.shape[0] != rank:
                raise ValueError(
                    f"All models must have one rank, but `{anchor}` has {rank} and `{name}` has {site.A.shape[0]} in "
                    f"`{layer}`. Give all of them the same `rank`."
                )
