"""EfficientNet-Lite0 features of a picture as five visual tokens: the mean of all cells and the four quadrants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import Tensor

_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def encoder(weights: str) -> torch.nn.Module:
    """The frozen vision encoder."""
    return (
        EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
        .eval()
        .to(memory_format=torch.channels_last)
    )


@torch.no_grad()
def tokens(model: torch.nn.Module, images: Sequence[Image.Image], batch: int = 32) -> Tensor:
    """[n, 5, 1280] float32."""
    out = []
    for i in range(0, len(images), batch):
        x = torch.from_numpy(np.stack([np.asarray(im, np.float32) / 255 for im in images[i : i + batch]]))
        x = ((x - _MEAN) / _STD).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        f = model.extract_features(x)
        quads = torch.nn.functional.adaptive_avg_pool2d(f, 2).flatten(2).transpose(1, 2)
        out.append(torch.cat([f.mean((2, 3))[:, None], quads], 1))
    return torch.cat(out)
