"""Visual tokens meet a body: the projector, its pre-training on public captions, prompts and cached hidden states."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bodies import Body, attention_mask
from .suite import Public, Task, load_public

VISUAL = 5
LENGTH = 15  # longest sequence: beginning-of-sequence token, five visual tokens, prompt


class Projector(nn.Module):
    """LayerNorm - Linear - GELU - Linear, scaled to the RMS of the body's own token embeddings."""

    def __init__(self, width: int, rms: float, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.LayerNorm(1280), nn.Linear(1280, width), nn.GELU(), nn.Linear(width, width))
        self.norm, self.rms = nn.LayerNorm(width, elementwise_affine=False), rms

    def forward(self, x: Tensor) -> Tensor:
        """[n, 5, 1280] -> [n, 5, width]."""
        return self.norm(self.net(x.float())) * self.rms


def prefix(body: Body) -> list[int]:
    """Token ids before the picture."""
    return [body.tokenizer.bos_token_id] if body.gemma else []


def sequence(body: Body, projector: Projector, x: Tensor, text: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """Left-padded embeddings [n, length, width] bf16 and validity [n, length] of picture + text."""
    vis, pre = projector(x).to(torch.bfloat16), prefix(body)
    out, valid = (
        torch.zeros(len(text), length, body.width, dtype=torch.bfloat16),
        torch.zeros(len(text), length, dtype=torch.bool),
    )
    rows = []
    for v, t in zip(vis, text, strict=True):
        e = torch.cat([body.embed(torch.tensor(pre, dtype=torch.long)), v, body.embed(torch.tensor(t))])
        rows.append(F.pad(e, (0, 0, length - len(e), 0)))
    for i, t in enumerate(text):
        valid[i, length - len(pre) - VISUAL - len(t) :] = True
    return torch.stack(rows) if rows else out, valid


def caption(public: Public, i: int) -> str:
    """The public text of one picture."""
    return f" a {public.captions[i]}, {public.groups[i]}"


def whitened(x: Tensor, k: int = 64) -> Tensor:
    """Leading principal coordinates of the visual tokens, unit variance: [n, 5, 1280] -> [n, 5, k]."""
    flat = x.float().flatten(0, 1)
    flat = flat - flat.mean(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, _, V = torch.pca_lowrank(flat, k, center=False)
    z = flat @ V
    return (z / z.std(0)).view(*x.shape[:2], k)


def pretrain(
    body: Body,
    public: Public,
    steps: int,
    batch: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    keep: float = 1.0,
    start: Path | None = None,
) -> Projector:
    """Projector-only captioning; the loss looks at the rows of tokens that occur in public captions.

    ``keep`` weighs a second, label-free term: a linear map must recover the picture's principal coordinates from the
    projected tokens. Captions alone drop what they never mention (blur, light), and no adapter above can bring it back.
    """
    proj, g = Projector(body.width, body.rms, seed), torch.Generator().manual_seed(seed)
    if start is not None:
        proj.load_state_dict(torch.load(start))
    goal = whitened(public.x)
    back = nn.Linear(body.width, goal.shape[-1])
    with torch.no_grad():  # from the least-squares solution, so that its gradient speaks of what the tokens lack
        z = torch.cat([(proj(x) / body.rms).flatten(0, 1) for x in public.x.split(256)])
        z1 = torch.cat([z, torch.ones(len(z), 1)], 1)
        sol = torch.linalg.solve(z1.T @ z1 + 1e-3 * len(z) * torch.eye(z1.shape[1]), z1.T @ goal.flatten(0, 1))
        back.weight.copy_(sol[:-1].T), back.bias.copy_(sol[-1])
    lead = body.ids("This is a picture of")
    text = [body.ids(caption(public, i))[:10] for i in range(len(public.captions))]
    vocab = torch.tensor(sorted({t for row in text for t in row}))
    where = {int(t): i for i, t in enumerate(vocab)}
    rows = body.embedding[vocab].float()
    opt = torch.optim.AdamW([*proj.parameters(), *back.parameters()], lr=lr, weight_decay=0.01)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.1)
    mean = 0.0
    for step in range(steps):
        pick = torch.randint(len(text), (batch,), generator=g).tolist()
        seqs = [lead + text[i][:-1] for i in pick]
        length = max(map(len, seqs)) + VISUAL + len(prefix(body))
        h, valid = sequence(body, proj, public.x[pick], seqs, length)
        mask = attention_mask(valid)
        for i in range(body.depth):
            h = body.layer(i, h, mask, body.plain)
        x, y = [], []
        for r, i in enumerate(pick):
            n = len(text[i])
            x.append(h[r, length - n :])
            y += [where[t] for t in text[i]]
        z = torch.cat(x).float()
        z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + body.eps) * body.final
        loss = F.cross_entropy(z @ rows.T, torch.tensor(y))
        mse = F.mse_loss(back(proj(public.x[pick]) / body.rms), goal[pick])
        opt.zero_grad()
        (loss + keep * mse).backward()
        nn.utils.clip_grad_norm_(proj.parameters(), 1.0)
        opt.step()
        sched.step()
        mean = 0.95 * mean + 0.05 * loss.item() if step else loss.item()
        if step % 50 == 0:
            print(
                f"step {step} loss {mean:.3f} of {len(vocab)} rows, unexplained variance {mse.item():.3f}", flush=True
            )
    return proj.eval().requires_grad_(False)


@torch.no_grad()
def hidden(
    body: Body, proj: Projector, x: Tensor, prompt: str, length: int = LENGTH, batch: int = 64
) -> tuple[Tensor, Tensor]:
    """Cached states entering the first adapted layer [n, length, width] bf16, and the validity row [length]."""
    text, out = body.ids(prompt), []
    for i in range(0, len(x), batch):
        e, valid = sequence(body, proj, x[i : i + batch], [text] * len(x[i : i + batch]), length)
        out.append(body.below(e, attention_mask(valid)))
    return torch.cat(out), valid[0]


def task_hidden(body: Body, proj: Projector, task: Task) -> dict[str, Tensor]:
    """Cached states of every side of a task, and its validity row under ``valid``."""
    out = {}
    for side, x in task.x.items():
        out[side], out["valid"] = hidden(body, proj, x, task.prompt)
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    raw, cache, name, depth, steps = (
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        sys.argv[3],
        int(sys.argv[4]),
        int(sys.argv[5]),
    )
    first = cache / f"projector_{name}_{depth}.pt"
    more = {"start": first, "lr": 7e-4, "seed": 1} if first.exists() else {}
    torch.save(pretrain(Body(raw / name, depth), load_public(cache), steps, **more).state_dict(), first)
