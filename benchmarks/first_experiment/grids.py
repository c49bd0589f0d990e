"""Named sets of methods. Learning rates per structure come from the validation split (see ``tune``)."""

from __future__ import annotations

from dataclasses import replace

from .collaborate import Method

LR = {"plain": 4e-2, "mix": 4e-2, "add": 4e-2}


def _m(name: str, use: str, rows: str = "", warm: str = "", **kw: object) -> Method:
    return replace(Method(name, use, rows, warm, lr=LR[use]), **kw)  # type: ignore[arg-type]


def coarse(n: int) -> list[Method]:
    """Everything, once."""
    out = [
        _m("local", "plain"),
        _m("fedavg", "plain", warm="uniform"),
        _m("mix own", "mix", own=True),
        _m("mix zero", "mix"),
    ]
    out += [_m(f"mix {rows}", "mix", rows) for rows in ("uniform", "t0.5", "t0.05", "z0.5", "oracle")]
    out += [_m("add own", "add", own=True)]
    out += [_m(f"add {rows}", "add", rows) for rows in ("uniform", "t0.05", "oracle")]
    out += [_m(f"warm {warm}", "plain", warm=warm) for warm in ("t0.05", "z0.5", "oracle")]
    for rows, warm in (
        ("t0.05", "uniform"),
        ("oracle", "uniform"),
        ("uniform", "uniform"),
        ("t0.05", "t0.05"),
        ("oracle", "oracle"),
    ):
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


def short(n: int) -> list[Method]:
    """What the seeds are spent on after a first pass of ``final``."""
    named = {m.name: m for m in final(n)}
    more = [
        _m("warm z0.5", "plain", warm="z0.5"),
        _m("warm z1", "plain", warm="z1"),
        _m("half z1", "plain", warm="z1", pull=0.5),
    ]
    first = (
        "local",
        "mix own",
        "fedavg",
        "mix uniform",
        "warm oracle",
        "early uniform",
        "mix oracle",
        "mix t0.05",
        "half uniform",
    )
    return (
        [named[k] for k in first[:4]]
        + [named["warm oracle"], *more[:2], named["early uniform"]]
        + [named[k] for k in first[6:]]
        + more[2:]
    )


def few(n: int) -> list[Method]:
    """Controls and one of each kind: for comparing alignments."""
    named = {m.name: m for m in final(n)}
    return [named[k] for k in ("local", "fedavg", "mix uniform", "warm oracle")]


def rates(n: int) -> list[Method]:
    """Learning rates of the control alone."""
    return [replace(Method("local"), name=f"local lr {lr:g}", lr=lr) for lr in (1e-2, 2e-2, 4e-2, 8e-2)]


def higher(n: int) -> list[Method]:
    """Higher learning rates, on the validation side: at 64 samples the first two left every method under-trained."""
    named = {m.name: m for m in short(n)}
    return [
        replace(named[k], name=f"{k} lr {lr:g}", lr=lr)
        for lr in (1e-1, 2.5e-1)
        for k in ("local", "fedavg", "mix uniform", "warm oracle")
    ]


def tuned(n: int) -> list[Method]:
    """``short`` at the learning rates that the validation split preferred: averaging needs higher ones."""
    if n < 64:
        return short(n)
    return [replace(m, lr=0.25 if m.name in ("fedavg", "half uniform") else 0.1) for m in short(n)]


def strangers(n: int) -> list[Method]:
    """Controls of the warm start: a stranger in the relative's place, and nobody."""
    lr = {"lr": 0.1} if n >= 64 else {}
    return [
        _m("warm wrong", "plain", warm="wrong", **lr),
        _m("warm shrink", "plain", warm="shrink", **lr),
        _m("mix wrong", "mix", "wrong", **lr),
        _m("mix zero", "mix", **lr),
    ]


GRIDS = {
    "coarse": coarse,
    "tune": tune,
    "final": final,
    "short": short,
    "few": few,
    "rates": rates,
    "higher": higher,
    "tuned": tuned,
    "strangers": strangers,
}
