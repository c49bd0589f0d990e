"""Named sets of methods. Learning rates per structure come from the validation split (see ``tune``)."""

from __future__ import annotations

from dataclasses import replace

from .collaborate import Method

LR = {"plain": 4e-2, "mix": 4e-2, "add": 4e-2}


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


def contenders() -> list[Method]:
    """One of each kind, for tuning and for the tables."""
    return [
        _m("local", "plain"),
        _m("mix own", "mix", own=True),
        _m("add own", "add", own=True),
        _m("fedavg", "plain", warm="uniform"),
        _m("mix uniform", "mix", "uniform"),
        _m("mix t0.5", "mix", "t0.5"),
        _m("mix t0.05", "mix", "t0.05"),
        _m("mix oracle", "mix", "oracle"),
        _m("add t0.05", "add", "t0.05"),
        _m("add oracle", "add", "oracle"),
        _m("warm t0.05", "plain", warm="t0.05"),
        _m("warm oracle", "plain", warm="oracle"),
        _m("mix t0.05 warm uniform", "mix", "t0.05", "uniform"),
        _m("mix oracle warm oracle", "mix", "oracle", "oracle"),
        _m("add oracle warm uniform", "add", "oracle", "uniform"),
        _m("half uniform", "plain", warm="uniform", pull=0.5),
    ]


def tune(n: int) -> list[Method]:
    """Two learning rates for each, on the validation side."""
    return [replace(m, name=f"{m.name} lr {lr:g}", lr=lr) for m in contenders() for lr in (1e-2, 4e-2)]


def final(n: int) -> list[Method]:
    """The table: controls, rows of G in both structures, warm starts."""
    return [
        _m("local", "plain"),
        _m("mix own", "mix", own=True),
        _m("add own", "add", own=True),
        _m("fedavg", "plain", warm="uniform"),
        _m("mix uniform", "mix", "uniform"),
        _m("mix t0.05", "mix", "t0.05"),
        _m("mix oracle", "mix", "oracle"),
        _m("add uniform", "add", "uniform"),
        _m("add t0.05", "add", "t0.05"),
        _m("add oracle", "add", "oracle"),
        _m("warm oracle", "plain", warm="oracle"),
        _m("early uniform", "plain", warm="uniform", until=4),
        _m("early oracle", "plain", warm="oracle", until=4),
        _m("early z0.5", "plain", warm="z0.5", until=4),
        _m("mix t0.05 warm uniform", "mix", "t0.05", "uniform"),
        _m("half uniform", "plain", warm="uniform", pull=0.5),
    ]


GRIDS = {"coarse": coarse, "tune": tune, "final": final}
