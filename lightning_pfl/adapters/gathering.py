"""Run two models over public data and sum up what aligning one to the other needs.

Start at `gather`. It looks at the inputs of the adapted layers and at the loss gradients at their outputs, keeps
neither, and leaves the models as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pfl.adapters.readings import Reading, match
from lightning_pfl.functional.alignment import PairedSums

__all__ = ["LayerSums", "Site", "causal_lm_loss", "gather"]

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


@dataclass(frozen=True, eq=False)
class Site:
    """One Co-LoRA layer of one model.

    Attributes:
        base: the layer under the adapter; it is watched, so that the adapter itself plays no part.
        A: the frozen down projection, ``[r, d_in]``.
        B: the frozen up projection, ``[d_out, r]``.
    """

    base: nn.Module
    A: Tensor
    B: Tensor


@dataclass(frozen=True, eq=False)
class LayerSums:
    """What one layer of a student has in common with the anchor's layer of the same address.

    Attributes:
        inputs: the student's inputs ``[d_in]`` and the anchor's z = A x ``[r]``; its whole inputs if not projected.
        gradients: the student's gradients at the output ``[d_out]`` and the anchor's B' g ``[r]``; its whole gradients
            if not projected.
        held_out_inputs: as `inputs`, over other records.
        held_out_gradients: as `gradients`, over other records.
        raw: the student's and the anchor's inputs before anything was taken off; only their means are read.
    """

    inputs: PairedSums
    gradients: PairedSums
    held_out_inputs: PairedSums
    held_out_gradients: PairedSums
    raw: Means

    @property
    def mean(self) -> Tensor:
        """The student's mean input, ``[d_in]``."""
        return self.raw.x / max(self.raw.count, 1)

    @property
    def anchor_mean(self) -> Tensor:
        """The anchor's mean input, ``[d_in of the anchor]``."""
        return self.raw.z / max(self.raw.count, 1)


@final
class Means:
    """Running sums of paired vectors.

    Args:
        num_inputs: length of the student's.
        num_targets: length of the anchor's.
        device: where the sums live.
    """

    def __init__(self, num_inputs: int, num_targets: int, *, device: torch.device | str | None = None) -> None:
        self.count = 0
        self.x = torch.zeros(num_inputs, dtype=torch.float64, device=device)
        self.z = torch.zeros(num_targets, dtype=torch.float64, device=device)

    def add(self, x: Tensor, z: Tensor) -> None:
        """Add rows."""
        self.count += len(x)
        self.x += x.to(self.x).sum(0)
        self.z += z.to(self.z).sum(0)


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


def gather(
    anchor: tuple[str, nn.Module, Mapping[str, Site]],
    students: Mapping[str, tuple[nn.Module, Mapping[str, Site]]],
    records: Iterable[Mapping[str, Reading]],
    *,
    loss: Loss,
    layers: Collection[str],
    held_out: int,
    projected: bool = True,
) -> dict[str, dict[str, LayerSums]]:
    """Sum over public data, one record at a time.

    Args:
        anchor: its name, its model, and its sites by address.
        students: per name, the model and its sites by address.
        records: per record, each model's `Reading`, by name.
        loss: of a model and a reading's inputs, summed over what is predicted.
        layers: addresses to look at in this pass; memory is O(d^2) for each.
        held_out: every how-manyth record goes to the held-out sums.
        projected: sum the anchor's z and B' g. False: its whole vectors; and of the inputs, only what varies between
            the rows of a record at one place (what the picture changes, not which question was asked or how far it
            was read), at places on which the loss of both models depends.

    Returns:
        Per student and address, its sums.

    Raises:
        ValueError: a record without a reading for a model, or a layer that does not see one vector per place.
    """
    name_of_anchor, anchor_model, anchor_sites = anchor
    wanted = {name: [layer for layer in layers if layer in sites] for name, (_, sites) in students.items()}
    sums = {
        name: {layer: _empty(students[name][1][layer], anchor_sites[layer], projected) for layer in wanted[name]}
        for name in students
    }
    anchor_layers = {layer: anchor_sites[layer] for layer in layers if layer in anchor_sites}
    for index, record in enumerate(records):
        if missing := {name_of_anchor, *students} - set(record):
            raise ValueError(f"Record {index} of the public data has no reading for {sorted(missing)}.")
        reading = record[name_of_anchor]
        seen = _watch(name_of_anchor, anchor_model, anchor_layers, reading, loss)
        z = {
            layer: (x @ anchor_sites[layer].A.T.to(x), g @ anchor_sites[layer].B.to(g)) if projected else (x, g)
            for layer, (x, g) in seen.items()
        }
        for name, (model, sites) in students.items():
            ours, theirs = match(record[name].places.cpu(), reading.places.cpu())
            if not len(ours.last):
                continue
            seen = _watch(name, model, {layer: sites[layer] for layer in wanted[name]}, record[name], loss)
            for layer, (x, g) in seen.items():
                into = sums[name][layer]
                is_held_out = index % held_out == held_out - 1
                inputs, gradients = (
                    (into.held_out_inputs, into.held_out_gradients) if is_held_out else (into.inputs, into.gradients)
                )
                read = (ours.states(x), theirs.states(z[layer][0]).to(x.device))
                effects = (ours.effects(g), theirs.effects(z[layer][1]).to(g.device))
                gradients.add(*effects)
                if not projected:
                    counted = effects[0].any(1) & effects[1].any(1)
                    read = (read[0][counted], read[1][counted])
                    if not is_held_out:
                        into.raw.add(*read)
                    places = reading.places.flatten()[theirs.last].to(x.device)[counted]
                    read = (_within(read[0], places), _within(read[1], places))
                inputs.add(*read)
    return sums


def _empty(site: Site, anchor: Site, projected: bool) -> LayerSums:
    (rank, d_in), d_out, device = site.A.shape, site.B.shape[0], site.A.device
    reads, steps = (rank, rank) if projected else (anchor.A.shape[1], anchor.B.shape[0])
    sizes = ((d_in, reads), (d_out, steps), (d_in, reads), (d_out, steps))
    sums = [PairedSums(own, other, device=device) for own, other in sizes]
    return LayerSums(sums[0], sums[1], sums[2], sums[3], Means(d_in, reads, device=device))


def _within(values: Tensor, places: Tensor) -> Tensor:
    """Deviations from the mean over a record's rows at one place; where only one row has the place, the row itself."""
    _, group, sizes = places.unique(return_inverse=True, return_counts=True)
    means = values.new_zeros(len(sizes), values.shape[1]).index_add_(0, group, values) / sizes[:, None]
    deviations = (values - means[group]) * (sizes / (sizes - 1).clamp_min(1)).sqrt()[group, None].to(values)
    return torch.where((sizes[group] > 1)[:, None], deviations, values)


def _watch(
    name: str, model: nn.Module, sites: Mapping[str, Site], reading: Reading, loss: Loss
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per layer, its inputs and the loss gradients at its outputs, ``[batch, positions, d]`` in at least float32."""
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
