"""Draw who takes how much of whom: the relevance matrix of a round as a picture. Needs matplotlib (an extra)."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from torch import Tensor

__all__ = ["draw_relevance"]

_MOST_NUMBERS = 16  # more clients than this, and numbers in the cells no longer help


def draw_relevance(
    weights: Tensor,
    client_ids: Sequence[str],
    path: str | PathLike[str],
    *,
    title: str = "Who takes how much of whom",
) -> Path:
    """Draw an N x N matrix of weights (or of similarities) as a PNG, SVG or PDF, by the path's ending.

    Up to 16 clients have numbers in their cells. The scale's mark "uniform" is where every weight would lie if all
    others counted alike.

    Args:
        weights: shape ``[N, N]``; row i is client i's mixture. NaN is drawn as an empty cell.
        client_ids: N names, in the order of rows and columns.
        path: where to; folders are made.
        title: above the picture.

    Returns:
        The path.

    Raises:
        ValueError: no square matrix, or another number of names.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> draw_relevance(torch.eye(2), ["ward-3", "ward-7"], f"{folder}/round-0.png").name
        'round-0.png'
    """
    count = len(client_ids)
    if tuple(weights.shape) != (count, count) or not count:
        raise ValueError(
            f"There must be one row and one column per client, {count}, but the shape is {tuple(weights.shape)}."
        )
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # an extra, and slow to import
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Drawing the relevance matrix needs matplotlib: pip install 'lightning-pfl[benchmark]'."
        ) from error

    values = weights.detach().float().cpu()
    known = values[~values.isnan()]
    low = min(0.0, float(known.min())) if known.numel() else 0.0
    high = max(float(known.max()), low + 1e-6) if known.numel() else 1.0
    longest = max(len(client) for client in client_ids)
    cell = 0.55 if count <= _MOST_NUMBERS else max(0.16, 9.0 / count)
    margin = 0.9 + 0.075 * min(longest, 24)
    size = max(cell * count, 2.0)

    figure = Figure(figsize=(size + margin + 1.3, size + margin + 0.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values.numpy(), cmap="YlGnBu", vmin=low, vmax=high, aspect="equal")
    names = [client if len(client) <= 24 else f"{client[:11]}…{client[-12:]}" for client in client_ids]
    font = 8 if count <= _MOST_NUMBERS else max(4.0, min(8.0, cell * 72 * 0.6))
    axes.set_xticks(range(count), names, rotation=90, fontsize=font)
    axes.set_yticks(range(count), names, fontsize=font)
    axes.tick_params(length=0)
    axes.set_xlabel("... of this client's adapter", fontsize=9)
    axes.set_ylabel("this client takes ...", fontsize=9)
    axes.set_title(title, fontsize=10)
    line = min(0.8, cell)
    for edge in range(count + 1):
        axes.axhline(edge - 0.5, color="0.85", linewidth=line)
        axes.axvline(edge - 0.5, color="0.85", linewidth=line)
    if count <= _MOST_NUMBERS:
        for row in range(count):
            for column in range(count):
                value = float(values[row, column])
                if value == value:
                    dark = (value - low) / (high - low) > 0.6
                    axes.text(
                        column, row, _short(value), ha="center", va="center",
                        fontsize=7, color="white" if dark else "black",
                    )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.ax.tick_params(labelsize=7)
    if count > 1 and low <= (uniform := 1 / (count - 1)) <= high:
        bar.ax.axhline(uniform, color="white", linewidth=2.5)
        bar.ax.axhline(uniform, color="red", linewidth=1.2)
        bar.ax.text(
            -0.15, uniform, "uniform", ha="right", va="center", fontsize=6, transform=bar.ax.get_yaxis_transform()
        )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def _short(value: float) -> str:
    """Two digits without the zero before the point."""
    return "0" if value == 0 else f"{value:.2f}".replace("0.", ".", 1)
