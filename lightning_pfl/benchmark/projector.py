"""Projectors pre-trained on public captions, whose concepts no task uses.

Start at `load_projector`, which trains one for a packaged language model in about a minute and keeps it in the cache.
What is learned is to say a picture's name: the language model is frozen, and the projector alone is trained so that the
name's first token is the likeliest after the picture and "This is a picture of a", among the first tokens of all names.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_pfl.benchmark import drawings, photographs
from lightning_pfl.benchmark.batches import IMAGE_ID
from lightning_pfl.benchmark.features import TOKENS_PER_IMAGE, FeatureStore
from lightning_pfl.benchmark.images import Picture, View, of_split
from lightning_pfl.benchmark.packages import cache_dir
from lightning_pfl.benchmark.vlm import Projector, VisionLanguageModule, embedding_rms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PROMPT = "This is a picture of a"


@dataclass(frozen=True)
class Caption:
    """A picture and what it shows, in a few words."""

    view: View
    name: str


def public_captions(*, cache: Path | None = None) -> list[Caption]:
    """Named pictures of the public split: emoji of four artists, Art4Apps, Tux Paint stamps.

    Raises:
        PackageUnavailableError: a package could not be fetched.
    """
    pictures: list[Picture] = []
    for domain in drawings.EMOJI_DOMAINS:
        pictures += [picture for picture in drawings.emoji(domain, cache=cache) if picture.kind != "flag"]
    pictures += drawings.art4apps(cache=cache) + photographs.stamps(cache=cache)
    return [Caption(View(picture.path), picture.concept) for picture in of_split(pictures, "public")]


def pretrain_projector(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: FeatureStore,
    captions: Sequence[Caption],
    *,
    num_steps: int = 200,
    batch_size: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> Projector:
    """Train a projector to make a frozen language model name public pictures.

    Args:
        language_model: stays as it is.
        tokenizer: its tokenizer.
        store: gives the pictures' tokens.
        captions: public pictures with names.
        num_steps: of AdamW, with a tenth of warm-up and a cosine to zero.
        batch_size: captions per step.
        lr: highest learning rate.
        seed: of the first weights and of the order.
        report: called with (step, loss).

    Returns:
        The trained projector, frozen, in eval mode.

    Raises:
        ValueError: no captions.
    """
    if not captions:
        raise ValueError("`captions` must hold at least one picture with a name, but is empty.")
    firsts = [tokenizer(" " + caption.name, add_special_tokens=False)["input_ids"][0] for caption in captions]
    candidates = sorted(set(firsts))
    targets = torch.tensor([candidates.index(token) for token in firsts])
    features = store.tokens([caption.view for caption in captions])
    start = tokenizer("", add_special_tokens=True)["input_ids"][:1]
    prompt = [*start, *[IMAGE_ID] * TOKENS_PER_IMAGE, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(store.encoder.width, language_model.config.hidden_size, embedding_rms(language_model))
    module = VisionLanguageModule(language_model, projector, train_projector=True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.1)
    for step in range(num_steps):
        rows = torch.randint(len(captions), (batch_size,), generator=generator)
        loss = nn.functional.cross_entropy(module(_batch(features[rows], prompt, candidates)), targets[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
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
        language_model: of any depth.
        tokenizer: its tokenizer.
        store: its encoder's identity is part of the file name.
        name: of the language model; with its depth, part of the file name.
        cache: cache folder; `cache_dir()` by default.
        report: called with (step, loss) while it is trained.
    """
    depth = language_model.config.num_hidden_layers
    label = hashlib.sha256(name.encode()).hexdigest()[:8]
    folder = (cache or cache_dir()) / "projectors"
    path = folder / f"{Path(name).name}-{label}-{depth}-{store.encoder.name}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{path.name}.lock"):
        if not path.exists():
            logger.info("training the projector of %s (%d layers) on public captions, once", name, depth)
            trained = pretrain_projector(language_model, tokenizer, store, public_captions(cache=cache), report=report)
            partial = path.with_suffix(".partial")
            save_file({key: value.contiguous() for key, value in trained.state_dict().items()}, partial)
            os.replace(partial, path)
    projector = Projector(store.encoder.width, language_model.config.hidden_size, 1.0)
    projector.load_state_dict(load_file(path))
    return projector.requires_grad_(False).eval()


def _batch(features: Tensor, prompt: Sequence[int], candidates: Sequence[int]) -> dict[str, Tensor]:
    size = len(features)
    ids = torch.tensor(prompt).expand(size, -1)
    return {
        "features": features,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "option_ids": torch.tensor(candidates).expand(size, -1),
    }
