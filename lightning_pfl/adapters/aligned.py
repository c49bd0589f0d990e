"""`Alignment`: bases of several base models in one coordinate system, as `align` makes them, as files and as a report.

The files are JSON and safetensors, so reading an alignment that came from elsewhere runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_pfl.adapters.injection import config_of
from lightning_pfl.adapters.tensors import bases_of, set_bases

__all__ = ["Alignment", "Bases", "LayerFit"]

_VERSION = 1

Bases = tuple[Tensor, Tensor]
"""A ``[r, d_in]`` and B ``[d_out, r]`` of one layer, float32, as `set_bases` takes them."""


@dataclass(frozen=True)
class LayerFit:
    """How well one layer of one model follows the anchor, on texts that the fit has not seen.

    Attributes:
        model: base identity of the model.
        layer: address, ``tower/block/role``.
        tokens: how many positions the fit saw.
        missed_A: error of the model's A x against the anchor's z, as a share of how z varies; 0 is perfect, 1 as good
            as z's mean.
        missed_B: error of the model's B' g against the anchor's, as a share of the latter; 1 is as good as zero.
    """

    model: str
    layer: str
    tokens: int
    missed_A: float
    missed_B: float


@final
@dataclass(frozen=True, eq=False)
class Alignment:
    """Bases of the Co-LoRA layers of several base models, in one coordinate system.

    Attributes:
        anchor: base identity of the model that the others are aligned to.
        bases: per base identity and address.
        report: one `LayerFit` per aligned layer.
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
            ValueError: a base model that this alignment does not cover, or other layers or ranks than it was made for.
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
        set_bases(module, self.bases[base])

    def save(self, path: str | Path) -> None:
        """Write a folder with ``alignment.json`` (what it covers) and ``alignment.safetensors`` (the bases)."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{base}|{layer}|{name}": tensor.contiguous()
            for base, layers in self.bases.items()
            for layer, (A, B) in layers.items()
            for name, tensor in (("A", A), ("B", B))
        }
        save_file(tensors, folder / "alignment.safetensors")
        about = {
            "version": _VERSION,
            "anchor": self.anchor,
            "layers": {base: sorted(layers) for base, layers in self.bases.items()},
            "unaligned": {base: list(layers) for base, layers in self.unaligned.items()},
            "report": [asdict(fit) for fit in self.report],
        }
        (folder / "alignment.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Alignment:
        """Read what `save` wrote; no code in the files is run.

        Raises:
            FileNotFoundError: no alignment in this folder.
            ValueError: written by a newer version, or tensors that do not fit the description.
        """
        folder = Path(path)
        about = json.loads((folder / "alignment.json").read_text(encoding="utf-8"))
        if about["version"] != _VERSION:
            raise ValueError(
                f"`{folder}` holds an alignment of format {about['version']}, but this release reads {_VERSION}. Make "
                "it again with align(), or install the release that wrote it."
            )
        tensors = load_file(folder / "alignment.safetensors")
        names = {
            f"{base}|{layer}|{name}" for base, layers in about["layers"].items() for layer in layers for name in "AB"
        }
        if names != set(tensors):
            raise ValueError(
                f"The two files in `{folder}` do not belong together: only one of them has "
                f"{sorted(names ^ set(tensors))[:4]}. Copy both files of one alignment."
            )
        bases = {
            base: {layer: (tensors[f"{base}|{layer}|A"], tensors[f"{base}|{layer}|B"]) for layer in layers}
            for base, layers in about["layers"].items()
        }
        return Alignment(about["anchor"], bases, tuple(LayerFit(**fit) for fit in about["report"]), about["unaligned"])
