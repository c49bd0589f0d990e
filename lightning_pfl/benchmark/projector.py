"""Projectors pre-trained on public captions, whose concepts no task uses.

Start at `load_projector`, which trains one for a language model in some seconds and keeps it in the cache. Two things
are learned, without running the language model: a picture's tokens point, on the mean, towards the embedding of its
name and away from those of other names; and a linear map can still read the picture's features out of each token.
Captions alone drop what they never mention (blur, number, place), and no adapter above can bring that back.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_pfl.benchmark.features import FeatureStore
from lightning_pfl.benchmark.packages import cache_dir
from lightning_pfl.benchmark.public import Caption, public_captions, varied
from lightning_pfl.benchmark.vlm import Projector, embedding_rms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_RECIPE = "names-and-features-1"  # changes with the training below, so that a stale projector is not read


def pretrain_projector(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: FeatureStore,
    captions: Sequence[Caption],
    *,
    num_steps: int = 400,
    batch_size: int = 64,
    lr: float = 1e-3,
    keep: float = 10.0,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> Projector:
    """Train a projector to name public pictures in a language model's embedding space, and to forget nothing of them.

    Args:
        language_model: only its token embeddings are read.
        tokenizer: its tokenizer.
        store: gives the pictures' tokens.
        captions: public pictures with names.
        num_steps: of AdamW, with a tenth of warm-up and a cosine to zero.
        batch_size: captions per step.
        lr: highest learning rate.
        keep: weight of the squared error of reading the standardised features back, against the naming loss in nats.
        seed: of the first weights and of the order.
        report: called with (step, loss).

    Returns:
        The trained projector, frozen, in eval mode.

    Raises:
        ValueError: no captions.
    """
    if not captions:
        raise ValueError("`captions` must hold at least one picture with a name, but is empty.")
    names = sorted({caption.name for caption in captions})
    directions = _name_directions(names, language_model, tokenizer)
    targets = torch.tensor([names.index(caption.name) for caption in captions])
    features = store.tokens([caption.view for caption in captions])
    mean, spread = features.float().mean(dim=(0, 1)), features.float().std(dim=(0, 1)) + 0.1

    generator = torch.Generator().manual_seed(seed)
    hidden, rms = language_model.config.hidden_size, embedding_rms(language_model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(store.encoder.width, hidden, rms)
        reader = nn.Linear(hidden, store.encoder.width)
    log_scale = nn.Parameter(torch.tensor(10.0).log())
    parameters = [*projector.parameters(), *reader.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.1)
    for step in range(num_steps):
        rows = torch.randint(len(captions), (batch_size,), generator=generator)
        seen = features[rows].float()
        projected = projector(seen) / rms
        similarity = nn.functional.normalize(projected.mean(dim=1), dim=1) @ directions.T
        naming = nn.functional.cross_entropy(similarity * log_scale.exp(), targets[rows])
        loss = naming + keep * nn.functional.mse_loss(reader(projected), (seen - mean) / spread)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step, float(loss.detach()))
    return projector.requires_grad_(False).eval()


def load_projector(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: FeatureStore,
    *,
    name: str,
    cache: Path | None = None,
    report: Callable[[int, float], None] | None = None,
) -> Projector:
    """The projector for a language model and an encoder, trained on public captions once and kept in the cache.

    Args:
        language_model: of any depth; a model cut short shares the projector of the whole one.
        tokenizer: its tokenizer.
        store: its encoder's identity is part of the file name.
        name: of the language model; part of the file name.
        cache: cache folder; `cache_dir()` by default.
        report: called with (step, loss) while it is trained.
    """
    label = hashlib.sha256(f"{name}/{_RECIPE}".encode()).hexdigest()[:8]
    folder = (cache or cache_dir()) / "projectors"
    path = folder / f"{Path(name).name}-{label}-{store.encoder.name}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{path.name}.lock"):
        if not path.exists():
            logger.info("training the projector of %s on public captions, once", name)
            trained = pretrain_projector(language_model, tokenizer, store, public_captions(cache=cache), report=report)
            partial = path.with_suffix(".partial")
            save_file({key: value.contiguous() for key, value in trained.state_dict().items()}, partial)
            os.replace(partial, path)
    projector = Projector(store.encoder.width, language_model.config.hidden_size, 1.0)
    projector.load_state_dict(load_file(path))
    return projector.requires_grad_(False).eval()


@torch.no_grad()
def _name_directions(
    names: Sequence[str], language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """Unit vectors [n, hidden]: the mean embedding of each name's tokens, less the mean over all names."""
    embed = language_model.get_input_embeddings()
    tokens = [torch.tensor(tokenizer(" " + name, add_special_tokens=False)["input_ids"]) for name in names]
    means = torch.stack([embed(ids).float().mean(dim=0) for ids in tokens])
    return nn.functional.normalize(means - means.mean(dim=0), dim=1)
