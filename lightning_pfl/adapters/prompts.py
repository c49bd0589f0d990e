"""Which positions of an input a gate may read, and what it remembers while tokens are decoded one by one.

Start at `PromptContext`, which the layers of a model have in common; `lightning_pfl.adapters.listening` has it told of
every pass through a transformers model. The positions that `InputGate` averages over are, in this order:

- those that the caller named with `prompt_positions`;
- in a causal model that is decoding (a key-value cache is passed): the unmasked positions of the first pass; later
  passes reuse the openings of the first, which follow the cache when beams are reordered;
- in a causal model with labels per token: the unmasked positions before the first label. Later ones, averaged, would
  tell a token's layer of the tokens to come;
- in any other pass through a causal model: the first unmasked position only, for the same reason;
- in every other model: all unmasked positions; of an image, all positions.

An encoder-decoder model has its prompt in the encoder, whose layers read all unmasked positions of it, as do the keys
and values of cross-attention, which are given the encoder's output. Every other layer of the decoder reads its first
position only, always: what stands there has attended to the whole prompt from the first cross-attention on, and it is
the same position in training, in teacher forcing and while decoding, with however many tokens a decoder has to begin.

A module that is no transformers model is taken for the last kind; a causal model of your own needs `prompt_positions`.

Two things cannot be seen from here: that tokens are generated without a cache (each pass then looks like scoring, so
the first position is read), and that a last piece of a prompt is one position long (it looks like a decoded token).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pfl.adapters._compat import in_backward, remember_in, remembered_in

__all__ = ["PromptContext", "prompt_positions"]

_IGNORED = -100  # the label that transformers and torch's cross entropy leave out


@dataclass
class _Pass:
    """One pass through a model.

    Attributes:
        shape: (batch, length) of the sequence; None when it is not known.
        mask: bool, of that shape: the positions that a gate may read. None: all.
        first_only: without a mask, read the first position only.
        memory: openings by layer and adapter, kept with the key-value cache while decoding.
        is_decoding: whether the openings are in the memory already.
    """

    shape: tuple[int, int] | None = None
    mask: Tensor | None = None
    first_only: bool = False
    memory: dict[Any, Tensor] | None = None
    is_decoding: bool = False


class PromptContext:
    """What the layers of one model know about the sequence that passes through.

    Args:
        is_causal: whether a position of the model must not learn of later ones.
        follows: whether the sequence is what a decoder writes after a prompt that stands elsewhere; only its first
            position is read then.
        tokens: names of the arguments, one of which holds the sequence.
        attended: name of the argument that holds its mask.
    """

    def __init__(
        self,
        is_causal: bool = False,
        follows: bool = False,
        tokens: tuple[str, ...] = ("input_ids", "inputs_embeds"),
        attended: str = "attention_mask",
    ) -> None:
        self.is_causal = is_causal
        self.follows = follows
        self.tokens = tokens
        self.attended = attended
        self.named: Tensor | None = None  # by `prompt_positions`
        self._now: _Pass | None = None
        self._depth = 0
        self._trained: _Pass | None = None  # the last pass that a backward may recompute
        self._is_ambiguous = False  # passes that differ wait for their backward
        self._was_recomputed = False

    def __getstate__(self) -> dict[str, Any]:  # passes are of the moment
        return {name: getattr(self, name) for name in ("is_causal", "follows", "tokens", "attended")}

    def __setstate__(self, state: Mapping[str, bool]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a fresh context of the same kind

    def beta(self, layer: Any, adapter_name: str, x: Tensor, parameter: Tensor) -> Tensor:
        """The opening of a layer's gate for an input.

        Args:
            layer: the adapted layer.
            adapter_name: PEFT's name of the adapter.
            x: the layer's input, ``[batch, ..., d_in]``, or ``[batch * length, d_in]`` where a model flattens.
            parameter: the layer's trained gate tensor.

        Returns:
            One number per row of x's first dimension.

        Raises:
            ValueError: x does not have the positions of the sequence that the model was given.
        """
        now = self._pass()
        key = (id(layer), adapter_name)
        if now.is_decoding:
            assert now.memory is not None
            if key not in now.memory:
                raise ValueError(
                    f"The cache was filled without the gate of adapter `{adapter_name}`, so its openings are unknown. "
                    "Start decoding with an empty cache after the adapter is active."
                )
            return _per_row(now.memory[key], x)
        beta: Tensor = layer.colora_config[adapter_name].gate.beta(parameter, self._summary(now, x))
        if now.memory is not None and not in_backward():
            now.memory[key] = beta.detach()
        return _per_row(beta, x)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A model of this context is called; only the outermost call counts."""
        if self._now is None:
            self._now = self._read(_arguments(model, args, kwargs))
            self._note(self._now)
        self._depth += 1

    def begin_around(self) -> None:
        """A model is called that will call one of this context: the pass of that lasts until this one's `end`."""
        self._depth += 1

    def end(self, output: Any) -> None:
        """A model of this context has returned, or raised."""
        self._depth = max(0, self._depth - 1)
        if self._depth == 0 and self._now is not None:
            cache = getattr(output, "past_key_values", None)
            if cache is not None and self._now.memory is not None and remembered_in(cache) is None:
                remember_in(cache, self._now.memory)  # a cache that the model made itself
            self._now = None

    def _pass(self) -> _Pass:
        """The pass that a layer is called in, or, when activations are recomputed, was called in."""
        if not in_backward():
            if self._now is None:  # a layer that is called by itself, or a model that tells nothing
                now = self._untold()
                self._note(now)
                return now
            return self._now
        self._was_recomputed = True
        if self._is_ambiguous:
            raise ValueError(
                "With activation checkpointing and a gate that reads the input, a model must not be called twice, with "
                "different prompts, before the backward of the first call: what is recomputed would read the second "
                "prompt. Make one call with both batches, call backward in between, or use StaticGate()."
            )
        return self._trained or self._untold()

    def _untold(self) -> _Pass:
        """What a layer reads of a pass that no model told of."""
        if self.named is not None and not self.follows:
            return _Pass((self.named.shape[0], self.named.shape[1]), self.named)
        return _Pass(first_only=self.is_causal)

    def _note(self, now: _Pass) -> None:
        """Remember a pass that a backward may recompute, and whether there is more than one to mix up."""
        if not torch.is_grad_enabled():
            return
        if self._was_recomputed:
            self._is_ambiguous, self._was_recomputed, self._trained = False, False, None
        self._is_ambiguous |= self._trained is not None and not _alike(self._trained, now)
        self._trained = now

    def _read(self, given: Mapping[str, Any]) -> _Pass:
        tokens = next((given[name] for name in self.tokens if given.get(name) is not None), None)
        if tokens is None:  # images and the like: no positions to tell apart
            return _Pass()
        shape = (tokens.shape[0], tokens.shape[1])
        attended, cache = given.get(self.attended), given.get("past_key_values")
        if self.is_causal and cache is not None and int(cache.get_seq_length()) > 0:
            return self._decoding(cache, shape)
        if self.named is not None and not self.follows:
            return _Pass(shape, self._named(shape), memory={} if self.is_causal else None)
        mask = _two_dimensional(attended, shape)
        if not self.is_causal:
            return _Pass(shape, mask)
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=tokens.device)
        first = mask & (mask.cumsum(dim=1) == 1)
        labels = given.get("labels")
        if cache is None and not self.follows:
            before = torch.zeros_like(mask)
            if labels is not None and tuple(labels.shape) == shape:
                before = (labels != _IGNORED).cumsum(dim=1) == 0
            prompt = mask & before
            return _Pass(shape, torch.where(prompt.any(dim=1, keepdim=True), prompt, first), memory={})
        memory: dict[Any, Tensor] = {}
        if cache is not None:
            remember_in(cache, memory)
        return _Pass(shape, first if self.follows else mask, memory=memory)

    def _decoding(self, cache: Any, shape: tuple[int, int]) -> _Pass:
        memory = remembered_in(cache)
        if memory is None:
            raise ValueError(
                "The key-value cache was filled without these adapters, so the gate's opening is unknown. Start "
                "decoding with an empty cache."
            )
        if shape[1] > 1 and not self.follows:
            raise ValueError(
                f"A gate that reads the prompt needs it in one piece, but {shape[1]} more positions came after the "
                "first pass (chunked prefill, a second turn, or assisted decoding). Generate without "
                "prefill_chunk_size and from an empty cache, or use StaticGate()."
            )
        return _Pass(shape, memory=memory, is_decoding=True)

    def _named(self, shape: tuple[int, int]) -> Tensor:
        assert self.named is not None
        if tuple(self.named.shape) != shape:
            raise ValueError(
                f"`prompt_positions` was given a mask of shape {tuple(self.named.shape)}, "
                f"but the sequence has the shape {shape}."
            )
        return self.named

    def _summary(self, now: _Pass, x: Tensor) -> Tensor:
        """Mean of x over the positions that may be read, ``[batch, d_in]``."""
        if now.shape is not None and x.dim() == 2 and x.shape[0] == now.shape[0] * now.shape[1]:
            x = x.unflatten(0, now.shape)  # some models flatten batch and length
        if x.dim() == 2:
            return x
        mask = now.mask
        if mask is None and now.first_only:
            mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            mask[:, 0] = True
        if mask is None:
            return x.flatten(1, -2).mean(dim=1)
        if x.shape[:2] != mask.shape:
            raise ValueError(
                f"A gate that reads the input needs the sequence's positions, batch and length {tuple(mask.shape)}, but"
                f" a layer is given an input of shape {tuple(x.shape)}. Exclude that layer with exclude_modules, or "
                "use StaticGate()."
            )
        weights = mask.to(x.dtype).reshape(*mask.shape, *[1] * (x.dim() - 2))
        total = (x * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return total.flatten(1, -2).mean(dim=1) if total.dim() > 2 else total


@contextmanager
def prompt_positions(module: nn.Module, mask: Tensor) -> Iterator[None]:
    """Say which positions of a sequence gates may read, for the passes inside the block.

    Args:
        module: a module with adapters whose gate is an `InputGate`.
        mask: bool, ``[batch, length]``; True where a gate may read. At least one per row. Of an encoder-decoder model,
            positions of the encoder's sequence.

    Raises:
        ValueError: a row without any position.

    Example:
        >>> with prompt_positions(nn.Linear(2, 2), torch.tensor([[True, False]])):
        ...     pass
    """
    if not bool(mask.any(dim=1).all()):
        raise ValueError("`prompt_positions` needs at least one True in every row of its mask.")
    contexts = {id(c): c for m in module.modules() if (c := getattr(m, "colora_context", None)) is not None}
    for context in contexts.values():
        context.named = mask.bool()
    try:
        yield
    finally:
        for context in contexts.values():
            context.named = None


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with, by name."""
    named = dict(zip(list(inspect.signature(model.forward).parameters), args, strict=False))
    return {**named, **kwargs}


def _two_dimensional(mask: Any, shape: tuple[int, int]) -> Tensor | None:
    """An attention mask as bool of a sequence's shape; a longer one (of a preallocated cache) is cut at the end."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
        what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"as a {type(mask).__name__}"
        raise ValueError(
            f"A gate that reads the input needs an attention mask of shape {shape}, but it came {what}. "
            "Name the positions with `prompt_positions(module, mask)`, or use StaticGate()."
        )
    return mask[:, : shape[1]].bool()


def _per_row(beta: Tensor, x: Tensor) -> Tensor:
    """One number per sample as one per row of an input that may be flattened."""
    if x.shape[0] == beta.shape[0]:
        return beta
    if x.dim() == 2 and x.shape[0] % beta.shape[0] == 0:
        return beta.repeat_interleave(x.shape[0] // beta.shape[0])
    raise ValueError(
        f"A gate's openings are known for a batch of {beta.shape[0]}, but a layer is given an input of shape "
        f"{tuple(x.shape)}. Start decoding with an empty cache."
    )


def _alike(one: _Pass, other: _Pass) -> bool:
    """Whether two passes read the same positions."""
    if one.mask is None or other.mask is None:
        return one.mask is other.mask
    return one.mask.shape == other.mask.shape and bool(torch.equal(one.mask, other.mask))
