"""Pictures of a report as SVG text, to be put into its page. Needs matplotlib (an extra)."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_pfl.comparison.record import Rows
from lightning_pfl.comparison.report.findings import Cost, Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["costs", "curves", "heat_map", "heat_maps"]

_COLOURS = {"ours": "#b2182b", "local": "#4d4d4d", "control": "#2166ac", "baseline": "#e08214", "ablation": "#9970ab"}
_FAINT = "#c8c8c8"


def curves(lines: Sequence[Curve], named: Sequence[str], *, along: str = "rounds") -> str:
    """A score by round with intervals over seeds; methods that are not named stay grey.

    Args:
        lines: of one measure.
        named: methods to be told apart.
        along: what is counted on the horizontal axis.
    """
    figure, seen = _figure(8.0, 3.6), Counter[str]()
    axes = figure.add_subplot()
    for line in sorted(lines, key=lambda line: line.method in named):
        rounds = list(line.points)
        means = [line.points[round].mean for round in rounds]
        if line.method not in named:
            axes.plot(rounds, means, color=_FAINT, linewidth=0.9, zorder=1)
            continue
        errors = [0.0 if math.isnan(point.half) else point.half for point in line.points.values()]
        style: dict[str, Any] = {"linestyle": "--"} if line.role in ("local", "control") else {}
        style["marker"] = "osD^v"[seen[line.role] % 5]  # methods of one role share a colour
        seen[line.role] += 1
        axes.errorbar(
            rounds, means, errors, label=line.method, color=_colour(line.role), markersize=4,
            linewidth=1.6, capsize=3, zorder=2, **style,
        )  # fmt: skip
    axes.set_xticks(sorted({round for line in lines for round in line.points}))
    axes.set_xlabel(along)
    axes.set_ylabel(f"{lines[0].measure}, % right" if lines else "")
    _plain(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)


def heat_map(rows: Rows, names: Sequence[str], *, across: str, down: str, digits: int = 0) -> str:
    """A matrix with its numbers in the cells; NaN is an empty cell.

    Args:
        rows: ``[N][N]``.
        names: of rows and columns.
        across: what columns are.
        down: what rows are.
        digits: after the point.
    """
    return heat_maps({"": rows}, names, across=across, down=down, digits=digits)


def heat_maps(matrices: Mapping[str, Rows], names: Sequence[str], *, across: str, down: str, digits: int = 2) -> str:
    """Matrices side by side, each on a scale of its own; see `heat_map`."""
    size = max(2.4, 0.42 * len(names))
    figure = _figure((size + 0.5) * len(matrices) + 0.8, size + 1.0)
    for place, (title, rows) in enumerate(matrices.items()):
        axes = figure.add_subplot(1, len(matrices), place + 1)
        known = [value for row in rows for value in row if not math.isnan(value)]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        axes.imshow([list(row) for row in rows], cmap="YlGnBu", vmin=low, vmax=max(high, low + 1e-9))
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    dark = (value - low) / max(high - low, 1e-9) > 0.6
                    text = f"{value:.{digits}f}".replace("0.", ".", 1) if digits > 1 else f"{value:.{digits}f}"
                    axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names if place == 0 else [""] * len(names), fontsize=7)
        axes.tick_params(length=0)
        axes.set_xlabel(across, fontsize=8)
        if place == 0:
            axes.set_ylabel(down, fontsize=8)
        axes.set_title(title, fontsize=9)
    return _svg(figure)


def costs(found: Sequence[Cost], named: Sequence[str]) -> str:
    """Self against bytes and against operations, side by side."""
    figure = _figure(7.6, 3.6)
    against: Sequence[tuple[str, Callable[[Cost], float]]] = (
        ("MB sent and received per client", lambda cost: (cost.sent + cost.received) / 1e6),
        ("operations, local only = 1", lambda cost: cost.operations),
    )
    for place, (label, value) in enumerate(against):
        axes = figure.add_subplot(1, 2, place + 1)
        for cost in found:
            named_here = cost.method in named
            axes.scatter(value(cost), cost.scores[0], s=26 if named_here else 14, color=_colour(cost.role), zorder=2)
            if named_here:
                axes.annotate(
                    cost.method, (value(cost), cost.scores[0]), xytext=(4, 3), textcoords="offset points", fontsize=7
                )
        axes.set_xlabel(label)
        if place == 0:
            axes.set_ylabel("Self, % right")
        _plain(axes)
    return _svg(figure)


def _colour(role: str) -> str:
    return _COLOURS.get(role, "#000000")


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG  # an extra, and slow to import
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A report's pictures need matplotlib: pip install 'lightning-pfl[benchmark]'."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    """SVG that may stand in HTML: no prologue, no date, the same bytes for the same numbers."""
    from matplotlib import rc_context

    sink = io.StringIO()
    with rc_context({"svg.hashsalt": "lightning-pfl", "svg.fonttype": "none"}):
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg)", "", sink.getvalue(), flags=re.DOTALL)
