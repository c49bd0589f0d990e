"""`Alignment`: bases of several base models in one coordinate system, as `align` makes them, as files and as a report.

The files are JSON and safetensors, so reading an alignment that came from elsewhere runs no code. What is read is
checked before it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_pfl.adapters.fidelity import Errors, table
from lightning_pfl.adapters.injection import config_of
from lightning_pfl.adapters.placement import Address
from lightning_pfl.adapters.tensors import bases_of, set_bases
from lightning_pfl.documents import Schema

__all__ = ["Alignment", "Bases", "LayerFit"]

_VERSION = 2
_TABLE, _ABOUT, _BASES = "report.md", "alignment.json", "alignment.safetensors"


def _object(**properties: object) -> dict[str, object]:
    """Schema of an object with these entries and no others."""
    return {
        "type": "object",
        "required": list(properties),
        "additionalProperties": False,
        "properties": properties,
    }


_PART = {"type": "string", "pattern": "^[^/]+\\Z"}
_SIZE = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
_BLOCK = {"type": "integer", "minimum": 0, "maximum": 10**9 - 1}
_ADDRESS = {"type": "string", "pattern": "^[^/]+/(0|[1-9][0-9]{0,8})/[^/]+\\Z"}
_LAYER = _object(tower=_PART, block=_BLOCK, role=_PART, rank=_SIZE, d_in=_SIZE, d_out=_SIZE)
_ERRORS = _object(**{name: {"type": ["number", "null"]} for name in Errors.__dataclass_fields__})  # null: infinite
_FORMAT = Schema("An alignment", {"type": "object", "required": ["version"]})
_SCHEMA = Schema(
    "An alignment",
    _object(
        version={"const": _VERSION},
        anchor={"type": "string"},
        models={
            "type": "object",
            "additionalProperties": _object(
                layers={"type": "array", "items": _LAYER}, unaligned={"type": "array", "items": _ADDRESS}
            ),
        },
        report={
            "type": "array",
            "items": _object(model={"type": "string"}, layer=_ADDRESS, tokens=_COUNT, before=_ERRORS, after=_ERRORS),
        },
    ),
)

Bases = tuple[Tensor, Tensor]
"""A ``[r, d_in]`` and B ``[d_out, r]`` of one layer, float32, as `set_bases` takes them."""


@dataclass(frozen=True)
class LayerFit:
    """How well one layer of one model follows the anchor, on held-out texts, which chose ridges and weights.

    Attributes:
        model: base identity of the model.
        layer: address, ``tower/block/role``.
        tokens: how many positions the fit saw.
        before: what was missed under the bases that both models had.
        after: what is missed under those of the alignment.
    """

    model: str
    layer: str
    tokens: int
    before: Errors
    after: Errors


@final
@dataclass(frozen=True, eq=False)
class Alignment:
    """Bases of the Co-LoRA layers of several base models, in one coordinate system.

    Attributes:
        anchor: base identity of the model that the others are aligned to.
        bases: per base identity and address.
        report: one `LayerFit` per aligned layer of every model but the anchor; `table` shows it.
        unaligned: per base identity, addresses that the anchor does not have; they keep bases of their own, so that
            their P and Q mean nothing to models of another base.

    Example:
        >>> import torch
        >>> alignment = Alignment("tiny", {"tiny": {"main/0/q": (torch.eye(1, 2), torch.eye(3, 1))}}, (), {})
        >>> [tensor.shape for tensor in alignment.bases["tiny"]["main/0/q"]]
        [torch.Size([1, 2]), torch.Size([3, 1])]
    """

    anchor: str
    bases: Mapping[str, Mapping[str, Bases]]
    report: Sequence[LayerFit]
    unaligned: Mapping[str, Sequence[str]]

    def apply(self, module: nn.Module) -> None:
        """Give a module with adapters the bases of its base model, in place.

        Raises:
            ValueError: a base model that this alignment does not cover, or other layers or another rank than it was
                made for.
        """
        base = config_of(module).base_identity
        if base is None or base not in self.bases:
            raise ValueError(
                f"This alignment covers the base models {sorted(self.bases)}, but the {type(module).__name__} is a "
                f"`{base}`. Run align() again with that model among the others, or leave `aligned` out."
            )
        known = {*self.bases[base], *self.unaligned.get(base, ())}
        if others := sorted(set(bases_of(module)) - known):
            raise ValueError(
                f"The {type(module).__name__} has Co-LoRA layers that the alignment was not made for: {others[:4]}. "
                f"It knows {sorted(known)[:4]}. Use the num_blocks, target_modules and roles that align() was run with."
            )
        rank = config_of(module).r
        for layer, (A, _) in self.bases[base].items():
            if A.shape[0] != rank:
                raise ValueError(
                    f"This alignment was made for rank {A.shape[0]} (`{layer}`), but the adapters of the "
                    f"{type(module).__name__} have rank {rank}. Use rank={A.shape[0]}, or align again."
                )
        set_bases(module, self.bases[base])

    def table(self) -> str:
        """The report as a Markdown table: per model, tower, block and role what was and is missed.

        Example:
            >>> nothing = Errors(missed_A=1, missed_B=1, missed_P=1, agreement_P=0)
            >>> perfect = Errors(missed_A=0, missed_B=0, missed_P=0, agreement_P=1)
            >>> report = (LayerFit("tiny", "main/0/q", 100, nothing, perfect),)
            >>> print(Alignment("small", {}, report, {}).table())
            | model | tower | block | role | z missed | B' g missed | P missed | P agrees |
            | --- | --- | --- | --- | --- | --- | --- | --- |
            | tiny | main | 0 | q | 1.00 → 0.00 | 1.00 → 0.00 | 1.00 → 0.00 | 0.00 → 1.00 |
        """
        return table({(fit.model, fit.layer): (fit.before, fit.after) for fit in self.report})

    def save(self, path: str | Path) -> None:
        """Write a folder.

        It holds ``alignment.json`` (base models, towers, blocks, roles, widths, the anchor, the report),
        ``alignment.safetensors`` (the bases) and ``report.md`` (the report for readers).
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{base}|{layer}|{name}": tensor.contiguous()
            for base, layers in self.bases.items()
            for layer, pair in layers.items()
            for name, tensor in zip("AB", pair, strict=True)
        }
        save_file(tensors, folder / _BASES)
        about = {
            "version": _VERSION,
            "anchor": self.anchor,
            "models": {
                base: {
                    "layers": [_described(layer, *pair) for layer, pair in sorted(layers.items())],
                    "unaligned": list(self.unaligned.get(base, ())),
                }
                for base, layers in self.bases.items()
            },
            "report": [
                {**asdict(fit), "before": _finite(fit.before), "after": _finite(fit.after)} for fit in self.report
            ],
        }
        (folder / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        (folder / _TABLE).write_text(f"Anchor: {self.anchor}\n\n{self.table()}\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Alignment:
        """Read what `save` wrote; no code in the files is run.

        Raises:
            FileNotFoundError: no alignment in this folder.
            ValueError: files that are damaged, of another format, or do not belong together.
        """
        folder = Path(path)
        for name in (_ABOUT, _BASES):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"An alignment is a folder with {_ABOUT} and {_BASES}, but `{folder}` has no {name}. Name the "
                    "folder that Alignment.save or `lightning-pfl align --output` wrote."
                )
        text, where = (folder / _ABOUT).read_bytes(), str(folder / _ABOUT)
        about = _FORMAT.read(text, where)
        if about["version"] != _VERSION:
            raise ValueError(
                f"`{folder}` holds an alignment of format {about['version']!r:.50}, but this release reads {_VERSION}. "
                "Make it again with align(), or install the release that wrote it."
            )
        _SCHEMA.check(about, where)
        shapes = {
            f"{base}|{_address(layer)}|{name}": shape
            for base, model in about["models"].items()
            for layer in model["layers"]
            for name, shape in (("A", [layer["rank"], layer["d_in"]]), ("B", [layer["d_out"], layer["rank"]]))
        }
        report = tuple(
            LayerFit(**{**fit, "before": _errors(fit["before"]), "after": _errors(fit["after"])})
            for fit in about["report"]
        )
        unaligned = {base: list(model["unaligned"]) for base, model in about["models"].items()}
        anchor = about["anchor"]
        try:
            tensors = load_file(folder / _BASES)
        except SafetensorError as error:
            raise ValueError(f"`{folder / _BASES}` is damaged ({error}). Copy the folder again.") from error
        if set(shapes) != set(tensors):
            raise ValueError(
                f"The two files in `{folder}` do not belong together: only one of them has "
                f"{sorted(set(shapes) ^ set(tensors))[:4]}. Copy both files of one alignment."
            )
        for name, shape in shapes.items():
            if list(tensors[name].shape) != shape:
                raise ValueError(
                    f"The two files in `{folder}` do not belong together: `{name}` must be {shape}, but is "
                    f"{list(tensors[name].shape)}. Copy both files of one alignment."
                )
            if tensors[name].dtype != torch.float32:
                raise ValueError(
                    f"`{name}` in `{folder / _BASES}` must be float32, but is {tensors[name].dtype}. Make the "
                    "alignment again."
                )
            if not torch.isfinite(tensors[name]).all():
                raise ValueError(f"`{name}` in `{folder / _BASES}` is not finite. Make the alignment again.")
        if anchor not in unaligned:
            raise ValueError(f"`{folder}` names the anchor `{anchor}`, but has bases of {sorted(unaligned)} only.")
        bases: dict[str, dict[str, Bases]] = {base: {} for base in unaligned}
        for base, model in about["models"].items():
            for layer in map(_address, model["layers"]):
                bases[base][layer] = (tensors[f"{base}|{layer}|A"], tensors[f"{base}|{layer}|B"])
        return Alignment(anchor, bases, report, {base: layers for base, layers in unaligned.items() if base != anchor})


def _described(layer: str, A: Tensor, B: Tensor) -> dict[str, object]:
    address = Address.parse(layer)
    return {**asdict(address), "rank": A.shape[0], "d_in": A.shape[1], "d_out": B.shape[0]}


def _address(described: Mapping[str, Any]) -> str:
    return str(Address(described["tower"], described["block"], described["role"]))


def _finite(errors: Errors) -> dict[str, float | None]:
    """As JSON has it, which knows no infinity."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(errors).items()}


def _errors(described: Mapping[str, float | None]) -> Errors:
    return Errors(**{name: math.inf if value is None else value for name, value in described.items()})
