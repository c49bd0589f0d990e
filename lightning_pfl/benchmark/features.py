"""Frozen image features, five tokens per picture, computed once and kept on disk.

Start at `FeatureStore`. Its keys are digests of the image file, the edits, the size and the encoder, so a store may be
shared by tasks, runs and processes. `EfficientNetTokens` is the encoder of the benchmark; anything with the same three
attributes and `encode` works in its place.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_pfl.benchmark.images import View
from lightning_pfl.benchmark.packages import cache_dir
from lightning_pfl.benchmark.weights import EFFICIENTNET_LITE0, load_image_encoder

TOKENS_PER_IMAGE = 5
"""The mean over the picture, then the means of its four quarters (top left, top right, bottom left, bottom right)."""

_ENCODING = threading.Lock()


class ImageEncoder(Protocol):
    """What turns pixels into tokens.

    Attributes:
        name: identity of the weights, part of the cache key.
        size: side in pixels of the square it reads.
        width: features per token.
    """

    name: str
    size: int
    width: int

    def encode(self, pixels: Tensor) -> Tensor:
        """Map pixels [n, 3, size, size] in 0..1 to tokens [n, 5, width]."""
        ...


@final
class EfficientNetTokens:
    """EfficientNet-Lite's last feature map, pooled over the whole picture and over its quarters.

    Args:
        name: `weights.EFFICIENTNET_LITE0` or `_LITE1`; both have width 1280.
        size: side in pixels; 128 gives a 4 x 4 map at a quarter of the cost of 224.
        model: the network; loaded from its package on first use when None.
    """

    def __init__(self, name: str = EFFICIENTNET_LITE0, *, size: int = 128, model: nn.Module | None = None) -> None:
        self.name = f"{name}-{size}"
        self.size = size
        self.width = 1280
        self._weights_name = name
        self._model = model

    def encode(self, pixels: Tensor) -> Tensor:
        """Map pixels [n, 3, size, size] in 0..1 to float32 tokens [n, 5, 1280]."""
        if self._model is None:
            self._model = load_image_encoder(self._weights_name)
        mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        normal = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            extract: Callable[[Tensor], Tensor] = self._model.extract_features  # type: ignore[assignment]
            return pool_tokens(extract(normal)).clone()


def pool_tokens(feature_map: Tensor) -> Tensor:
    """Pool a map [n, c, h, w] (h, w >= 2) to tokens [n, 5, c]: its mean, then the means of its quarters by rows.

    Example:
        >>> pool_tokens(torch.arange(4.0).view(1, 1, 2, 2)).flatten().tolist()
        [1.5, 0.0, 1.0, 2.0, 3.0]
    """
    quarters = nn.functional.adaptive_avg_pool2d(feature_map, 2).flatten(2)
    whole = feature_map.mean(dim=(2, 3)).unsqueeze(2)
    return torch.cat([whole, quarters], dim=2).transpose(1, 2)


@final
class FeatureStore:
    """Tokens of views, from disk where they are and computed where they are not.

    Args:
        encoder: computes what is missing.
        folder: where float16 files lie; `<cache>/features/<encoder>` by default.
        batch_size: pictures encoded at a time.
    """

    def __init__(self, encoder: ImageEncoder, *, folder: Path | None = None, batch_size: int = 64) -> None:
        self.encoder = encoder
        self.folder = folder or cache_dir() / "features" / encoder.name
        self.batch_size = batch_size

    def tokens(self, views: Sequence[View], *, report: Callable[[int, int], None] | None = None) -> Tensor:
        """Tokens of views, float16 [len(views), 5, width].

        Args:
            views: what to encode; repeats cost nothing.
            report: called with (views done, views to compute) while some are computed.

        Raises:
            FileNotFoundError: an image that does not exist.
            ValueError: a damaged image; the message names the file.
        """
        paths = {view: self._path(view) for view in dict.fromkeys(views)}
        with _ENCODING:  # who waited finds what the other has made
            missing = [view for view, path in paths.items() if not path.exists()]
            for start in range(0, len(missing), self.batch_size):
                self._compute({view: paths[view] for view in missing[start : start + self.batch_size]})
                if report is not None:
                    report(min(start + self.batch_size, len(missing)), len(missing))
        shape = (TOKENS_PER_IMAGE, self.encoder.width)
        found = {view: np.fromfile(path, dtype=np.float16).reshape(shape) for view, path in paths.items()}
        return torch.from_numpy(np.stack([found[view] for view in views]))

    def _path(self, view: View) -> Path:
        key = view.key(self.encoder.size)
        return self.folder / key[:2] / key

    def _compute(self, paths: dict[View, Path]) -> None:
        pixels = torch.stack([_pixels(view.render(self.encoder.size)) for view in paths])
        for row, path in zip(self.encoder.encode(pixels).to(torch.float16).numpy(), paths.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}.part")
            row.tofile(partial)
            os.replace(partial, path)


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
