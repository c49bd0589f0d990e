"""Projectors pre-trained on public captions, whose concepts no task uses.

Start at `load_projector`, which trains one for a language model in some minutes and keeps it in the cache. The frozen
language model reads a public question, a picture and the beginning of its caption, and the projector learns to let it
say the rest: so the model carries what captions speak of up to where answers are given, which is where adapters find
it. Beside that, a linear map must still be able to read the picture's coordinates out of its tokens.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_pfl.benchmark._compat import plain_attention
from lightning_pfl.benchmark.batches import ANSWER, IMAGE_ID, left_padded, start_id
from lightning_pfl.benchmark.features import TOKENS_PER_IMAGE, FeatureStore
from lightning_pfl.benchmark.packages import cache_dir
from lightning_pfl.benchmark.public import QUESTIONS, Caption, public_captions, varied
from lightning_pfl.benchmark.vlm import Projector, VisionLanguageModule, embedding_rms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

VERSIONS = 3
"""How often a projector sees every public picture, each time edited in another way."""

_RECIPE = "captions-through-the-model-2"  # changes with the training below, so that a stale projector is not read
_WORDS = 6  # tokens of a caption; the rest is cut off
_DRAWING = threading.Lock()  # first weights come from the global generator, which threads share


def pretrain_projector(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: FeatureStore,
    captions: Sequence[Caption],
    *,
    num_steps: int = 150,
    batch_size: int = 16,
    lr: float = 1e-3,
    keep: float = 1.0,
    seed: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> Projector:
    """Train a projector so that a frozen language model can caption public pictures, and nothing of them is forgotten.

    The principal coordinates that the projector begins with depend on the pictures alone: language models that are
    given the same ones are told the same.

    Args:
        language_model: of any depth; gradients pass through it.
        tokenizer: its tokenizer.
        store: gives the pictures' tokens.
        captions: public pictures with names.
        num_steps: of AdamW, with a tenth of warm-up and a cosine to zero.
        batch_size: captions per step.
        lr: highest learning rate.
        keep: weight of the squared error of reading the picture's coordinates back, against the captions' cross entropy
            in nats over the tokens that occur in captions.
        seed: of the first weights and of the order.
        report: called with (steps done, steps in all).

    Returns:
        The trained projector, frozen, in eval mode.

    Raises:
        ValueError: no captions.
    """
    if not captions:
        raise ValueError("`captions` must hold at least one picture with a name, but is empty.")
    features = store.tokens([caption.view for caption in captions])
    names = [tokenizer(" " + caption.name, add_special_tokens=False)["input_ids"][:_WORDS] for caption in captions]
    known = torch.tensor(sorted({token for name in names for token in name}))
    place = {int(token): index for index, token in enumerate(known)}
    hidden = language_model.config.hidden_size
    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(store.encoder.width, hidden, embedding_rms(language_model))
        reader = nn.Linear(hidden, projector.linear.in_features)
    _set_coordinates(projector, features)
    module = VisionLanguageModule(language_model, projector, train_projector=True)
    questions = [tokenizer(question, add_special_tokens=False)["input_ids"] for question in QUESTIONS]
    answer = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    image = [IMAGE_ID] * TOKENS_PER_IMAGE

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([*projector.parameters(), *reader.parameters()], lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.1)
    for step in range(num_steps):
        rows = torch.randint(len(captions), (batch_size,), generator=generator)
        asked = questions[step % len(questions)]
        prompt = [start_id(tokenizer), *asked, *image, *answer]
        ids, mask = left_padded([[*prompt, *names[row][:-1]] for row in rows.tolist()])
        seen = features[rows]
        with plain_attention(language_model):
            states = module.hidden_states({"features": seen, "input_ids": ids, "attention_mask": mask})
        said = torch.cat([states[i, -len(names[row]) :] for i, row in enumerate(rows.tolist())]).float()
        wanted = torch.tensor([place[token] for row in rows.tolist() for token in names[row]])
        captioning = nn.functional.cross_entropy(said @ module.answer_rows(known).T, wanted)
        read = reader(projector(seen) / projector.rms)
        loss = captioning + keep * nn.functional.mse_loss(read, projector.coordinates(seen))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report is not None:
            report(step + 1, num_steps)
    return projector.requires_grad_(False).eval()


def load_projector(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: FeatureStore,
    *,
    name: str,
    cache: Path | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Projector:
    """The projector for a language model and an encoder, trained on public captions once and kept in the cache.

    Args:
        language_model: the model; its depth is part of the file name.
        tokenizer: its tokenizer.
        store: its encoder's identity is part of the file name.
        name: of the language model; part of the file name.
        cache: cache folder; `cache_dir()` by default.
        report: called with (steps done, steps in all) while it is trained.
    """
    depth = language_model.config.num_hidden_layers
    label = hashlib.sha256(f"{name}/{depth}/{_RECIPE}".encode()).hexdigest()[:8]
    folder = (cache or cache_dir()) / "projectors"
    path = folder / f"{Path(name).name}-{depth}-{label}-{store.encoder.name}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{path.name}.lock"):
        if not path.exists():
            logger.info("training the projector of %s on public captions, once", name)
            captions = varied(public_captions(cache=cache), VERSIONS)
            trained = pretrain_projector(language_model, tokenizer, store, captions, report=report)
            partial = path.with_suffix(".partial")
            save_file({key: value.contiguous() for key, value in trained.state_dict().items()}, partial)
            os.replace(partial, path)
    projector = Projector(store.encoder.width, language_model.config.hidden_size, 1.0)
    projector.load_state_dict(load_file(path))
    return projector.requires_grad_(False).eval()


@torch.no_grad()
def _set_coordinates(projector: Projector, features: Tensor) -> None:
    """The leading principal coordinates of all visual tokens, with unit variance."""
    tokens = features.flatten(0, 1).double()
    mean = tokens.mean(dim=0)
    values, vectors = torch.linalg.eigh((tokens - mean).T @ (tokens - mean) / len(tokens))
    count = projector.linear.in_features
    leading = vectors.flip(1)[:, :count] / values.flip(0)[:count].clamp_min(1e-12).sqrt()
    cast(Tensor, projector.mean).copy_(mean)
    cast(Tensor, projector.basis).copy_(leading)
