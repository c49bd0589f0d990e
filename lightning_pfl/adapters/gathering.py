"""Run models over public data and look at what their adapted layers do.

Start at `look`. It shows one record to all models and yields, layer by layer, the inputs and the loss gradients at the
outputs that a student and the anchor have at the same places. It keeps nothing and leaves the models as they were; what
is kept of it is a rule's business, in a `Sink`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pfl.adapters.readings import Reading, match

__all__ = ["Loss", "Seen", "Sink", "Site", "Watched", "causal_lm_loss", "look"]

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


@dataclass(frozen=True, eq=False)
class Site:
    """One Co-LoRA layer of one model.

    Attributes:
        base: the layer under the adapter; it is watched, so that the adapter itself plays no part.
        A: the frozen down projection, ``[r, d_in]``.
        B: the frozen up projection, ``[d_out, r]``.

    Raises:
        ValueError: a convolution.
    """

    base: nn.Module
    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        if isinstance(self.base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise ValueError(
                f"align() reads layers that see one vector per position, but {self.base} slides over its input. "
                "Leave convolutions out (`target_modules`, `exclude_modules`), or share them between models of one "
                "architecture only, which need no alignment."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """d_in, d_out, r."""
        return self.A.shape[1], self.B.shape[0], self.A.shape[0]


@dataclass(frozen=True, eq=False)
class Watched:
    """A model and those of its layers that are looked at.

    Attributes:
        name: of the model.
        model: left as it is.
        sites: by address.
    """

    name: str
    model: nn.Module
    sites: Mapping[str, Site]

    def only(self, layers: Collection[str]) -> Watched:
        """The same model with fewer layers."""
        return Watched(self.name, self.model, {layer: site for layer, site in self.sites.items() if layer in layers})


@dataclass(frozen=True, eq=False)
class Seen:
    """What one layer of a student and the anchor's layer of the same address did at the places that both have read.

    Row by row the same place. Vectors are at least float32.

    Attributes:
        inputs: of the student's layer, ``[n, d_in]``.
        anchor_inputs: of the anchor's, ``[n, d_in of the anchor]``.
        gradients: of the loss at the output of the student's layer, ``[n, d_out]``, summed over the positions that lead
            up to a place.
        anchor_gradients: of the anchor's, ``[n, d_out of the anchor]``.
        places: ``[n]``.
    """

    inputs: Tensor
    anchor_inputs: Tensor
    gradients: Tensor
    anchor_gradients: Tensor
    places: Tensor


class Sink(ABC):
    """What a rule keeps of everything that is seen of one layer of one student."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many places the fit has seen."""

    @abstractmethod
    def add(self, seen: Seen, *, is_held_out: bool) -> None:
        """Take in one record.

        Args:
            seen: of the record.
            is_held_out: whether it serves to measure and not to fit.
        """


def causal_lm_loss(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The summed cross entropy of the next token, in nats.

    Summed, not averaged: per text, models that cut it into more or fewer tokens then answer to the same question.

    Args:
        model: called with the inputs except ``labels``; its answer has ``.logits`` ``[batch, tokens, vocabulary]``.
        inputs: with ``labels`` ``[batch, tokens]``, -100 where there is nothing to predict.

    Raises:
        ValueError: no labels.
    """
    if "labels" not in inputs:
        raise ValueError(
            "The default loss of align() predicts the next token and needs `labels` in Reading.inputs, but there are "
            f"only {sorted(inputs)}. Add them, or pass loss=, a function of (model, inputs) that gives a summed loss."
        )
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    targets = inputs["labels"][:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum")


def look(
    anchor: Watched, students: Mapping[str, Watched], record: Mapping[str, Reading], *, loss: Loss
) -> Iterator[tuple[str, str, Seen]]:
    """Show one record to all models.

    Args:
        anchor: the anchor.
        students: by name.
        record: each model's `Reading`, by name.
        loss: of a model and a reading's inputs, summed over what is predicted.

    Yields:
        Name of a student, address of a layer that it shares with the anchor, and what was seen there.

    Raises:
        ValueError: a reading is missing, or a layer does not see one vector per place.
    """
    if missing := {anchor.name, *students} - set(record):
        raise ValueError(
            f"A record of the public data has no reading for {sorted(missing)}, only for {sorted(record)}."
        )
    reading = record[anchor.name]
    theirs_seen = _watch(anchor, reading, loss)
    for name, student in students.items():
        ours, theirs = match(record[name].places.cpu(), reading.places.cpu())
        if not len(ours.last) or not student.sites:
            continue
        for layer, (x, g) in _watch(student, record[name], loss).items():
            anchor_x, anchor_g = theirs_seen[layer]
            yield (
                name,
                layer,
                Seen(
                    inputs=ours.states(x),
                    anchor_inputs=theirs.states(anchor_x).to(x.device),
                    gradients=ours.effects(g),
                    anchor_gradients=theirs.effects(anchor_g).to(g.device),
                    places=reading.places.flatten().to(x.device)[theirs.last.to(x.device)],
                ),
            )


def _watch(watched: Watched, reading: Reading, loss: Loss) -> dict[str, tuple[Tensor, Tensor]]:
    """Per layer, its inputs and the loss gradients at its outputs, ``[batch, positions, d]`` in at least float32."""
    name, model, sites = watched.name, watched.model, watched.sites
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    device = next(iter(sites.values())).A.device

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if layer in inputs:
                raise ValueError(
                    f"Layer `{layer}` of `{name}` runs more than once per forward; exclude it from adapting."
                )
            inputs[layer] = args[0].detach()
            outputs[layer] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[layer].clone()  # what comes after may work in place

        return hook

    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in reading.inputs.items()}
    with _evaluating(model), torch.enable_grad():
        handles = [site.base.register_forward_hook(watch(layer)) for layer, site in sites.items()]
        try:
            value = loss(model, moved)
        finally:
            for handle in handles:
                handle.remove()
        if missed := sorted(set(sites) - set(outputs)):
            raise ValueError(f"The forward of `{name}` did not reach its layers {missed}; exclude them from adapting.")
        gradients = torch.autograd.grad(value, list(outputs.values()))
    result = {}
    for (layer, x), g in zip(inputs.items(), gradients, strict=True):
        for tensor in (x, g):
            if tensor[..., 0].numel() != reading.places.numel():
                raise ValueError(
                    f"Layer `{layer}` of `{name}` sees {list(tensor.shape[:-1])} vectors, but Reading.places names "
                    f"{list(reading.places.shape)} positions. Name one place for each, or exclude the layer."
                )
        wide = torch.promote_types(x.dtype, torch.float32)
        result[layer] = (_by_row(x.to(wide), reading), _by_row(g.to(wide), reading))
    return result


def _by_row(values: Tensor, reading: Reading) -> Tensor:
    return values.reshape(*reading.places.shape, values.shape[-1])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
