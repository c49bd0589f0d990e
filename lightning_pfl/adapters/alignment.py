r"""Bases under which one model's P and Q mean the same in models of other widths, depths and families.

Start at `align`: models with Co-LoRA adapters and public data in, an `Alignment` out, which is saved once and given to
every client (``CoLoRA(aligned=...)``). One model is the anchor; bases are chosen layer by layer
with the same address, over positions that have read the same (`lightning_pfl.adapters.readings`), by a rule
(`lightning_pfl.adapters.rules`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from lightning_pfl.adapters.aligned import Alignment, Bases, LayerFit
from lightning_pfl.adapters.contrasts import contrast_loss, draw_contrast, shared_words
from lightning_pfl.adapters.gathering import LayerSums, Loss, Site, causal_lm_loss, gather
from lightning_pfl.adapters.injection import ADAPTER, adapted_layers, config_of
from lightning_pfl.adapters.readings import Reading, TextReader
from lightning_pfl.adapters.rules import Canonical, CcaB, FitB, GradientB, LeastSquares, Rule
from lightning_pfl.adapters.tensors import bases_of

__all__ = [
    "Alignment",
    "Bases",
    "Canonical",
    "CcaB",
    "FitB",
    "GradientB",
    "LayerFit",
    "LeastSquares",
    "Rule",
    "align",
]

log = logging.getLogger(__name__)


def align(
    models: Mapping[str, nn.Module],
    data: Iterable[str] | Iterable[Mapping[str, Reading]],
    *,
    anchor: str,
    tokenizers: Mapping[str, Any] | None = None,
    rule: Rule | None = None,
    loss: Loss | None = None,
    held_out: int = 5,
    max_bytes: int = 2**31,
) -> Alignment:
    """Fit the bases of several models to those of one of them.

    Args:
        models: per name, a model with Co-LoRA adapters (`inject`) of the same rank and number of blocks. They are left
            as they are; to use the result, hand it to ``CoLoRA(aligned=...)`` or to `set_bases`.
        data: public data: texts (then ``tokenizers`` must name one for each model), or records with a `Reading` for
            each model. A few hundred texts do; each is read by all models.
        anchor: name of the model that the others are compared with, usually the smallest.
        tokenizers: per name of a model, its tokenizer; for texts only.
        rule: how bases are chosen. None: `Canonical()`, by which the anchor gets new bases too. The paper's is
            ``LeastSquares(CcaB(), orthonormal_only=True)``.
        loss: whose gradients B follows: a scalar of a model and `Reading.inputs`, summed (not averaged) over what the
            model predicts. None: for texts, how much the model prefers one word to another after the text
            (`lightning_pfl.adapters.contrasts`); for records, the cross entropy of their ``labels``.
        held_out: every how-manyth text is used to choose ridges and to measure, not to fit.
        max_bytes: of sums held at once. Models that need more are read in several passes, for which ``data`` must be
            something that can be iterated over again.

    Returns:
        The alignment, with the anchor's bases in it; its `report` says per layer what is missed on held-out texts.

    Raises:
        ValueError: a name without a model, ranks that differ, models without a common address, too little data, or
            one-shot data where several passes are needed.
        TypeError: texts without tokenizers.

    Source:
        arXiv:2506.11024, initial alignment; there the anchor's bases are random, A is fitted by gradient descent and B
        rotated inside its random column space. Why ours differs is told in docs/design/first_experiment.md.
    """
    rule = rule or Canonical()
    if anchor not in models:
        raise ValueError(f"`anchor` must name one of the models {sorted(models)}, but is `{anchor}`.")
    if held_out < 2:
        raise ValueError(f"`held_out` must be at least 2 (every how-manyth text is not fitted), but is {held_out}.")
    sites = {name: _sites(model) for name, model in models.items()}
    _check_ranks(sites, anchor)
    base = _base_identities(models)
    students = {name: (model, sites[name]) for name, model in models.items() if name != anchor}
    shared = [layer for layer in sites[anchor] if any(layer in theirs for _, theirs in students.values())]
    for name, (_, theirs) in students.items():
        if not set(theirs) & set(sites[anchor]):
            raise ValueError(
                f"`{name}` has no layer in common with the anchor `{anchor}`: {sorted(theirs)[:4]} ... against "
                f"{sorted(sites[anchor])[:4]} .... Adapt the same towers and roles in both (`blocks`, `roles`)."
            )
    bases = {
        base[anchor]: {layer: (site.A.float().cpu(), site.B.float().cpu()) for layer, site in sites[anchor].items()}
    }
    bases |= {base[name]: {} for name in students}
    report: list[LayerFit] = []
    groups = list(_groups(shared, students, max_bytes, keeps_anchor=rule.keeps_anchor))
    if len(groups) > 1 and iter(data) is data:
        raise ValueError(
            f"The sums need {len(groups)} passes over the public data within max_bytes={max_bytes}, but `data` can be "
            "iterated over once only. Pass a list or a dataset, or raise max_bytes."
        )
    for layers in groups:
        records = _records(data, tokenizers, models, ask_for_words=loss is None)
        sums = gather(
            (anchor, models[anchor], sites[anchor]),
            students,
            records,
            loss=loss or _default_loss,
            layers=layers,
            held_out=held_out,
            projected=rule.keeps_anchor,
        )
        for layer in layers:
            having = {name: of_layers[layer] for name, of_layers in sums.items() if layer in of_layers}
            _check_enough(having, layer)
            fitted = rule.fit(having, sites[anchor][layer], {name: sites[name][layer] for name in having})
            bases[base[anchor]][layer] = fitted.anchor
            for name, found in having.items():
                bases[base[name]][layer] = fitted.students[name]
                fit = LayerFit(base[name], layer, found.inputs.count, *fitted.missed[name])
                report.append(fit)
                log.info(
                    "%s %s: A misses %.3f, B misses %.3f of the anchor's.", name, layer, fit.missed_A, fit.missed_B
                )
    unaligned = {base[name]: sorted(set(theirs) - set(sites[anchor])) for name, (_, theirs) in students.items()}
    for name, layers in unaligned.items():
        if layers:
            log.warning("`%s` has layers that the anchor lacks; they keep bases of their own: %s.", name, layers)
    return Alignment(base[anchor], bases, tuple(report), unaligned)


def _check_enough(sums: Mapping[str, LayerSums], layer: str) -> None:
    for found in sums.values():
        if found.held_out_inputs.count < 2:
            raise ValueError(
                f"Too little public data for layer `{layer}`: no held-out text has a position that both models have "
                "read. Give more texts, or check that both models read the same ones."
            )


def _default_loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    return contrast_loss(model, inputs) if "contrast" in inputs else causal_lm_loss(model, inputs)


def _records(
    data: Iterable[str] | Iterable[Mapping[str, Reading]],
    tokenizers: Mapping[str, Any] | None,
    models: Mapping[str, nn.Module],
    *,
    ask_for_words: bool,
) -> Iterator[Mapping[str, Reading]]:
    words: dict[str, Tensor] = {}
    for index, item in enumerate(data):
        if not isinstance(item, str):
            yield cast(Mapping[str, Reading], item)
            continue
        if missing := sorted(set(models) - set(tokenizers or {})):
            raise TypeError(
                f"Public data that is text needs a tokenizer for each model, but there is none for {missing}. Pass "
                "tokenizers={name: tokenizer}, or give records of one Reading per model instead of texts."
            )
        assert tokenizers is not None
        record = {name: TextReader(tokenizers[name])([item]) for name in models}
        if ask_for_words:
            words = words or shared_words({name: tokenizers[name] for name in models})
            for name, contrast in draw_contrast(words, index).items():
                record[name] = replace(record[name], inputs={**record[name].inputs, "contrast": contrast})
        yield record


def _groups(
    layers: Sequence[str],
    students: Mapping[str, tuple[nn.Module, Mapping[str, Site]]],
    max_bytes: int,
    *,
    keeps_anchor: bool,
) -> Iterator[list[str]]:
    """Layers whose sums fit into memory together."""
    group: list[str] = []
    used = 0
    for layer in layers:
        sites = [sites[layer] for _, sites in students.values() if layer in sites]
        size = sum(2 * 8 * (site.A.shape[1] ** 2 + site.B.shape[0] ** 2) for site in sites)
        if not keeps_anchor:  # the anchor's whole vectors: sums of about three times the size
            size *= 3
        if group and used + size > max_bytes:
            yield group
            group, used = [], 0
        group.append(layer)
        used += size
    if group:
        yield group


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


def _check_ranks(sites: Mapping[str, Mapping[str, Site]], anchor: str) -> None:
    rank = next(iter(sites[anchor].values())).A.shape[0]
    for name, theirs in sites.items():
        for layer, site in theirs.items():
            if site.A.shape[0] != rank:
                raise ValueError(
                    f"All models must have one rank, but `{anchor}` has {rank} and `{name}` has {site.A.shape[0]} in "
                    f"`{layer}`. Give all of them the same `rank`."
                )
