"""Weighted means of what clients share: flat vectors in, fresh flat vectors out.

Start at `mix` (every client gets a mixture of its own) or `weighted_mean` (one mixture for all). Clients need not
hold the same names: a name is mixed over those that hold it, with their weights scaled up to sum to 1. Where all
layouts are equal, which is the usual case, a whole round is one matrix product, taken in chunks of columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from lightning_pfl.types import FlatTensors, Layout

__all__ = ["by_holders", "mix", "select", "weighted_mean", "write_names"]

_AT_ONCE = 2**20  # numbers of all clients together that are gathered for one product: 4 MiB, and as much comes out
_COLUMNS = 1024  # at least, as the rows of weights are read again for every product; two times 4 KiB per client
_ROWS = 512
_MANY, _SPARSE = 256, 16  # from so many clients on, and if only every so-many-th weight is not zero, zeros are skipped


def mix(flats: Sequence[FlatTensors], rows: Tensor) -> list[FlatTensors]:
    """Give every client its own weighted mean of all clients' tensors.

    Args:
        flats: what each of N clients shares; names may differ, but a name has one shape.
        rows: shape ``[N, N]``, entries >= 0; row i is how client i's mixture weighs the clients. Only ratios matter.

    Returns:
        N fresh vectors, in each client's own layout, summed in float32. A name that a client's row gives no weight to
        any holder of keeps the client's own values.

    Raises:
        ValueError: ``rows`` has another shape, a negative or non-finite entry, or a name has two shapes.

    Example:
        >>> flats = [FlatTensors.pack({"P": torch.tensor([0.0])}), FlatTensors.pack({"P": torch.tensor([4.0])})]
        >>> [flat.vector for flat in mix(flats, torch.tensor([[0.0, 1.0], [0.25, 0.75]]))]
        [tensor([4.]), tensor([3.])]
    """
    count = len(flats)
    _require_weights(rows, (count, count))
    if len({flat.layout for flat in flats}) == 1:
        return _mix_alike(flats, rows)
    mixed = [flat.vector.clone() for flat in flats]
    for holders, names, values in by_holders(flats):
        masses = rows.double()[holders][:, holders]
        totals = masses.sum(dim=1, keepdim=True)
        means = (masses / totals.where(totals > 0, 1.0)).float() @ values
        for row, (holder, total) in enumerate(zip(holders, totals.flatten().tolist(), strict=True)):
            if total > 0:
                write_names(mixed[holder], flats[holder].layout, names, means[row])
    return [FlatTensors(flat.layout, vector) for flat, vector in zip(flats, mixed, strict=True)]


def _mix_alike(flats: Sequence[FlatTensors], rows: Tensor) -> list[FlatTensors]:
    """Mix clients of one layout, some columns of all of them at a time; beside its result it needs little memory."""
    count, numel = len(flats), flats[0].layout.numel
    totals = rows.sum(dim=1, dtype=torch.float64)
    weights = _scaled(rows, totals)
    mixed = [torch.empty_like(flat.vector) for flat in flats]
    width = max(1, min(max(_AT_ONCE // count, _COLUMNS), numel))
    gathered, product = torch.empty(count * width), torch.empty(count * width)  # kept, as new memory costs time
    for start in range(0, numel, width):
        size = min(width, numel - start)
        values = gathered[: count * size].view(count, size)
        torch.stack([flat.vector[start : start + size] for flat in flats], out=values)
        if weights.is_sparse:
            means = weights @ values
        else:
            means = torch.mm(weights, values, out=product[: count * size].view(count, size))
        torch._foreach_copy_([vector[start : start + size] for vector in mixed], list(means.unbind()))
    for index in (totals <= 0).nonzero()[:, 0].tolist():
        mixed[index].copy_(flats[index].vector)
    return [FlatTensors(flat.layout, vector) for flat, vector in zip(flats, mixed, strict=True)]


def _scaled(rows: Tensor, totals: Tensor) -> Tensor:
    """Rows that sum to one, float32; stored without zeros where most are, as a product then skips them."""
    weights = torch.empty(rows.shape)
    for start in range(0, len(rows), _ROWS):  # in float64, but not all at once
        end = start + _ROWS
        weights[start:end] = rows[start:end].double() / totals[start:end, None].where(totals[start:end, None] > 0, 1.0)
    if len(rows) >= _MANY and int(weights.count_nonzero()) * _SPARSE <= weights.numel():
        return weights.to_sparse()
    return weights


def weighted_mean(flats: Sequence[FlatTensors], weights: Sequence[float] | Tensor) -> FlatTensors:
    r"""Average over clients, :math:`\sum_k (n_k / n)\, w_k`, per name over those that hold it.

    Args:
        flats: what each client shares; names may differ, but a name has one shape.
        weights: one number per client, >= 0, usually its count of training examples. Only ratios matter.

    Returns:
        A fresh vector in the order of names, of all names whose holders have any weight, summed in float32.

    Raises:
        ValueError: no client, weights that are negative, not finite or all zero, or a name with two shapes.

    Source:
        McMahan et al., AISTATS 2017, arXiv:1602.05629, Algorithm 1, server side.

    Example:
        >>> one, two = {"P": torch.zeros(2)}, {"P": torch.ones(2), "Q": torch.ones(1)}
        >>> mean = weighted_mean([FlatTensors.pack(one), FlatTensors.pack(two)], [1, 3])
        >>> mean.layout.names, mean.vector
        (('P', 'Q'), tensor([0.7500, 0.7500, 1.0000]))
    """
    masses = torch.as_tensor(weights, dtype=torch.float64)
    _require_weights(masses, (len(flats),))
    if not masses.sum() > 0:
        raise ValueError(f"A mean needs a client with a positive weight, but the weights are {masses.tolist()}.")
    parts: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    own = flats[0].layout
    if own.names == tuple(sorted(own.names)) and all(flat.layout == own for flat in flats):
        # one after another: a copy of all would take ten times as long
        vector = torch.zeros_like(flats[0].vector)
        for flat, share in zip(flats, (masses / masses.sum()).tolist(), strict=True):
            vector.add_(flat.vector, alpha=share)
        return FlatTensors(own, vector)
    for holders, names, values in by_holders(flats):
        if not (total := masses[holders].sum()) > 0:
            continue
        mean = ((masses[holders] / total).float()[None, :] @ values)[0]
        layout = flats[holders[0]].layout
        own_shapes = dict(zip(layout.names, layout.shapes, strict=True))
        sub = Layout(names, tuple(own_shapes[name] for name in names))
        for name, (start, stop) in sub.spans.items():
            parts[name] = mean[start:stop]
            shapes[name] = own_shapes[name]
    order = tuple(sorted(parts))
    vector = torch.cat([parts[name] for name in order]) if order else torch.zeros(0)
    return FlatTensors(Layout(order, tuple(shapes[name] for name in order)), vector)


def select(flat: FlatTensors, names: Collection[str]) -> FlatTensors:
    """Copy the tensors whose name is asked for; names that are not there are passed over.

    Example:
        >>> select(FlatTensors.pack({"P": torch.ones(2), "Q": torch.zeros(1)}), ["Q", "R"]).layout.names
        ('Q',)
    """
    kept = tuple(
        (name, shape)
        for name, shape in zip(flat.layout.names, flat.layout.shapes, strict=True)
        if name in frozenset(names)
    )
    spans = flat.layout.spans
    vector = torch.cat([flat.vector[slice(*spans[name])] for name, _ in kept]) if kept else torch.zeros(0)
    return FlatTensors(Layout(tuple(name for name, _ in kept), tuple(shape for _, shape in kept)), vector)


def by_holders(flats: Sequence[FlatTensors]) -> Iterator[tuple[list[int], tuple[str, ...], Tensor]]:
    """Names that the same clients hold, with those clients' values as one matrix ``[holders, numbers]``."""
    layouts = {flat.layout for flat in flats}
    if len(layouts) == 1:
        yield list(range(len(flats))), flats[0].layout.names, torch.stack([flat.vector for flat in flats])
        return
    shapes: dict[str, tuple[int, ...]] = {}
    holders: dict[str, list[int]] = {}
    for index, flat in enumerate(flats):
        for name, shape in zip(flat.layout.names, flat.layout.shapes, strict=True):
            if shapes.setdefault(name, shape) != shape:
                first = holders[name][0]
                raise ValueError(
                    f"`{name}` must have one shape on all clients, but is {shapes[name]} on client {first} and {shape} "
                    f"on client {index}. Mix only tensors that do not depend on a model's width (Co-LoRA's P and Q)."
                )
            holders.setdefault(name, []).append(index)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(holders):
        groups.setdefault(tuple(holders[name]), []).append(name)
    spans = {layout: layout.spans for layout in layouts}
    for group, names in groups.items():
        rows = [
            torch.cat([flats[index].vector[slice(*spans[flats[index].layout][name])] for name in names])
            for index in group
        ]
        yield list(group), tuple(names), torch.stack(rows)


def write_names(vector: Tensor, layout: Layout, names: tuple[str, ...], values: Tensor) -> None:
    """Put the values of ``names``, which lie one after another, where the layout wants them; in place."""
    if names == layout.names:
        vector.copy_(values)
        return
    spans = layout.spans
    taken = 0
    for name in names:
        start, stop = spans[name]
        vector[start:stop] = values[taken : taken + stop - start]
        taken += stop - start


def _require_weights(weights: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(weights.shape) != shape or not shape[0]:
        raise ValueError(
            f"There must be one weight per client (at least one), shape {shape}, but it is {tuple(weights.shape)}."
        )
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError(f"Weights must be finite and not negative, but are {weights.tolist()}.")
