"""Named sets of methods. Learning rates per structure come from the validation split (see ``tune``)."""

from __future__ import annotations

from dataclasses import replace

from .collaborate import Method

LR = {"plain": 1e-2, "mix": 1e-2, "add": 1e-2}


def _m(name: str, use: str, rows: str = "", warm: str = "", **kw: object) -> Method:
    return replace(Method(name, use, rows, warm, lr=LR[use]), **kw)  # type: ignore[arg-type]


def coarse(n: int) -> list[Method]:
    """Everything, once."""
    out = [_m("local", "plain"), _m("fedavg", "plain", warm="uniform"), _m("mix own", "mix", own=True), _m("mix zero", "mix")]
    for rows in ("uniform", "t0.5", "t0.05", "z0.5", "oracle"):
        out.append(_m(f"mix {rows}", "mix", rows))
    out += [_m("add own", "add", own=True)]
    for rows in ("uniform", "t0.05", "oracle"):
        out.append(_m(f"add {rows}", "add", rows))
    for warm in ("t0.05", "z0.5", "oracle"):
        out.append(_m(f"warm {warm}", "plain", warm=warm))
    for rows, warm in (("t0.05", "uniform"), ("oracle", "uniform"), ("uniform", "uniform"), ("t0.05", "t0.05"), ("oracle", "oracle")):
        out.append(_m(f"mix {rows} warm {warm}", "mix", rows, warm))
    for rows, warm in (("t0.05", "uniform"), ("oracle", "oracle"), ("oracle", "uniform")):
        out.append(_m(f"add {rows} warm {warm}", "add", rows, warm))
    return out


def tune(n: int) -> list[Method]:
    """Learning rates, on the validation side."""
    return [replace(m, name=f"{m.name} lr {lr:g}", lr=lr) for m in (_m("local", "plain"), _m("mix own", "mix", own=True)) for lr in (3e-3, 1e-2, 3e-2, 1e-1)]


GRIDS = {"coarse": coarse, "tune": tune}
