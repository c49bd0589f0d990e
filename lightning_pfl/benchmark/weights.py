"""Pretrained language models and image encoders, from packages or from anywhere transformers loads.

Start at `load_language_model`. The packaged models come as 4-bit GGUF files, whose reading is slow; each is converted
once to bfloat16 safetensors in the cache and read from there. Anything else that is named, a folder or a hub id, goes
to `from_pretrained` as it is.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lightning_pfl.benchmark import sources
from lightning_pfl.benchmark._compat import forget_gguf, keep_first_layers
from lightning_pfl.benchmark.download import Report
from lightning_pfl.benchmark.packages import Package, PyPIWheel, cache_dir, unpack

logger = logging.getLogger(__name__)

SMOLLM2_135M = "SmolLM2-135M-Instruct"
GEMMA3_270M = "gemma-3-270m"
EFFICIENTNET_LITE0 = "efficientnet-lite0"
EFFICIENTNET_LITE1 = "efficientnet-lite1"

_LANGUAGE_MODELS: dict[str, Sequence[PyPIWheel]] = {
    SMOLLM2_135M: (sources.SMOLLM2,),
    GEMMA3_270M: sources.GEMMA3_PARTS,
}
_ENCODERS: dict[str, PyPIWheel] = {
    EFFICIENTNET_LITE0: sources.EFFICIENTNET_LITE0,
    EFFICIENTNET_LITE1: sources.EFFICIENTNET_LITE1,
}


def load_language_model(
    name: str,
    num_layers: int | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    cache: Path | None = None,
    report: Report | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, frozen and in eval mode.

    Args:
        name: `SMOLLM2_135M` or `GEMMA3_270M` (packaged), a folder, or a hub id.
        num_layers: keep only the first so many decoder layers; all by default.
        dtype: of the weights in memory.
        cache: cache folder; `cache_dir()` by default.
        report: progress callback of the downloads.

    Returns:
        The model (its body under `.model`, its layers under `.model.layers`) and the tokenizer.

    Raises:
        PackageUnavailableError: a packaged model could not be fetched.
        ValueError: `num_layers` is not between 1 and the model's depth.
        OSError: transformers finds nothing under a folder or hub id.
    """
    place: str | Path = name
    if name in _LANGUAGE_MODELS and not Path(name).exists():
        place = convert_language_model(name, cache=cache, report=report)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    depth = len(model.model.layers)
    if num_layers is not None:
        if not 1 <= num_layers <= depth:
            raise ValueError(f"`num_layers` must be between 1 and {depth}, the depth of {name}, but is {num_layers}.")
        keep_first_layers(model, num_layers)
    return model.requires_grad_(False).eval(), load_tokenizer(str(place))


@functools.lru_cache(maxsize=8)
def load_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer once per process (a vocabulary of 262,144 takes seconds to read)."""
    return AutoTokenizer.from_pretrained(place)


def language_model_folder(name: str, *, cache: Path | None = None) -> Path:
    """Where the converted copy of a packaged language model lies, or will lie."""
    digest = hashlib.sha256("".join(package.sha256 for package in _LANGUAGE_MODELS[name]).encode()).hexdigest()[:12]
    return (cache or cache_dir()) / "models" / f"{name}-{digest}"


def convert_language_model(name: str, *, cache: Path | None = None, report: Report | None = None) -> Path:
    """Convert a packaged model from GGUF to a folder of bfloat16 safetensors, once.

    The folder also keeps the packages' licence texts. Gemma's terms bind whoever passes on what is derived from it.

    Returns:
        A folder that `from_pretrained` reads.
    """
    folder = language_model_folder(name, cache=cache)
    if folder.is_dir():
        return folder
    unpacked = [unpack(package, cache=cache, report=report) for package in _LANGUAGE_MODELS[name]]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():
            return folder
        logger.info("converting %s from GGUF to safetensors, once", name)
        partial = folder.parent / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        gguf = _joined(unpacked, partial / "model.gguf")
        tokenizer = AutoTokenizer.from_pretrained(partial, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(partial, gguf_file=gguf.name, dtype=torch.bfloat16)
        forget_gguf(model)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        gguf.unlink()
        _copy_terms(unpacked, partial)
        os.replace(partial, folder)
    return folder


def load_image_encoder(
    name: str = EFFICIENTNET_LITE0, *, cache: Path | None = None, report: Report | None = None
) -> nn.Module:
    """Load a frozen EfficientNet-Lite with its ImageNet weights, in channels-last layout and eval mode.

    Raises:
        ValueError: another name than the two packaged encoders.
        ImportError: the extra `benchmark` is not installed.
    """
    if name not in _ENCODERS:
        raise ValueError(f"`name` must be one of {sorted(_ENCODERS)}, but is {name!r}.")
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "EfficientNet-Lite needs efficientnet-lite-pytorch, which is not installed: "
            "pip install 'lightning-pfl[benchmark]'."
        ) from error
    (weights,) = unpack(_ENCODERS[name], cache=cache, report=report).rglob("*.pth")
    encoder: nn.Module = EfficientNet.from_name(name)
    state: dict[str, Any] = torch.load(weights, map_location="cpu", weights_only=True)
    encoder.load_state_dict(state)
    return encoder.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def packages_of(name: str) -> tuple[Package, ...]:
    """The pinned packages behind a packaged language model or encoder; empty for anything else."""
    if name in _ENCODERS:
        return (_ENCODERS[name],)
    return tuple(_LANGUAGE_MODELS.get(name, ()))


def _joined(folders: Sequence[Path], target: Path) -> Path:
    """Join the parts of a GGUF file, in the order of the packages."""
    with target.open("wb") as sink:
        for folder in folders:
            for part in sorted([*folder.rglob("*.gguf"), *folder.rglob("*.gguf.part*")]):
                with part.open("rb") as source:
                    shutil.copyfileobj(source, sink, 1 << 20)
    return target


def _copy_terms(folders: Sequence[Path], target: Path) -> None:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and any(word in path.name.upper() for word in ("LICENSE", "NOTICE", "TERMS")):
                shutil.copy(path, target / path.name)
