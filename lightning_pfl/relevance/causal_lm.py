r"""`CausalLMProbe`: what a task asks of a small frozen language model, as one gradient in closed form.

The gradient is that of the mean cross entropy over the answer tokens, in the output projection of the last MLP. It
needs no backward pass: every answer position contributes one outer product. Which layers lie between that projection
and the loss is read from the model itself (`tail.py`) and checked once against autograd; a model that does not pass
is differentiated by ``torch.func`` instead, never approximated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_pfl.functional.privacy import clip_rows
from lightning_pfl.relevance import _compat
from lightning_pfl.relevance.base import ExampleProbe, Reader
from lightning_pfl.relevance.gradient import examples_of, gradient_of
from lightning_pfl.relevance.prompt_states import prompt_states
from lightning_pfl.relevance.sketches import CountSketch, Projection
from lightning_pfl.relevance.tail import Tail, UnknownTailError, capture, find_target, is_linear, trace_tail, widened

__all__ = ["CausalLMProbe"]

_logger = logging.getLogger(__name__)
_IGNORED = -100


@final
class CausalLMProbe(ExampleProbe, Reader):
    r"""Sketches a task by the gradient of a small frozen causal language model.

    A batch is a mapping of what the model's ``forward`` takes (``input_ids`` or ``inputs_embeds``, ``attention_mask``,
    images ...) and ``labels``, ``[n, T]``, with -100 where a token is not part of the answer. As in transformers,
    position t predicts ``labels[:, t + 1]``. Each example counts the same, however long its answer.

    Args:
        model: a causal language model, put into evaluation mode and frozen in place by `prepare`; or a folder or a hub
            id to load one from; or a function without arguments that makes one. The same for all clients.
        size: k, the length of a sketch; 16,384 numbers are 64 KiB.
        seed: of the projection; the same for all clients.
        projection: of gradients to sketches, instead of a `CountSketch` of ``size`` and ``seed``.
        max_norm: C, each example's sketch is scaled down to this norm; None: not at all. Noise needs it.
        target: name of the linear in whose weight the gradient is taken; None: the output projection of the last MLP.
        dtype: of the frozen weights; the tail is computed in float32 at least. None: float32 for a model that is
            loaded, and what it is for one that is handed over.

    Raises:
        ValueError: in `prepare`, no projection to take a gradient in; in `sketch`, a batch that the model cannot use.

    Source:
        Co-LoRA, arXiv:2506.11024. Its code keeps only the diagonal of the final norm's Jacobian; this is exact.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> probe = CausalLMProbe(LlamaForCausalLM(config), size=64)
        >>> probe.prepare()
        >>> probe.closed_form
        True
        >>> probe.sketch({"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[-100, 2, 3]])}).shape
        torch.Size([64])
    """

    def __init__(
        self,
        model: nn.Module | str | PathLike[str] | Callable[[], nn.Module],
        *,
        size: int = 16_384,
        seed: int = 0,
        projection: Projection | None = None,
        max_norm: float | None = None,
        target: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"`max_norm` must be positive, but is {max_norm}.")
        self._source = model
        self._project = CountSketch(size, seed=seed) if projection is None else projection
        self._max_norm = max_norm
        self._dtype = dtype
        self._model: nn.Module | None = None
        self._target = target
        self._tail: Tail | None = None

    @property
    def size(self) -> int:
        """k."""
        return self._project.size

    @property
    def max_norm(self) -> float | None:
        """C."""
        return self._max_norm

    @property
    def closed_form(self) -> bool:
        """Whether gradients come without a backward pass; known after `prepare`."""
        return self._tail is not None

    def prepare(self) -> None:
        """Load and freeze the model, read its tail, and check the closed form once against autograd."""
        if self._model is not None:
            return
        with torch.random.fork_rng(devices=[]):
            model = self._load()
        model.eval().requires_grad_(False)
        trial = _trial_batch(model)

        def run() -> object:
            return model(**_inputs(trial), **_compat.keyword_arguments(model))

        try:
            with _undisturbed(model), _in_float32(model):
                tail = trace_tail(model, run, self._target)
                error = self._error_of(model, tail, trial)
            if error > 1e-4:
                raise UnknownTailError(f"the closed form differs from autograd by {error:.1e} of the gradient's norm")
            self._tail, self._target = tail, tail.target
        except UnknownTailError as reason:
            self._target = self._target or _last_projection(model)
            _logger.warning(
                "The gradient of %s in `%s` is taken by autograd, since %s.", type(model).__name__, self._target, reason
            )
        self._source = self._model = model  # what made it need not travel with it

    def sketch(self, batch: Mapping[str, Any]) -> Tensor:
        """Mean over a batch's examples with an answer of each one's projected (and clipped) gradient, float32 ``[k]``.

        Raises:
            ValueError: a batch that the model cannot use, or one without any answer.
        """
        if self._max_norm is not None:
            rows = self.sketches(batch)
            _require_answers(answered := _answered(batch["labels"]))
            return rows[answered.cpu()].mean(dim=0)
        return self._project(self.gradient(batch))

    def sketches(self, batch: Mapping[str, Any]) -> Tensor:
        """Each example's projected (and clipped) gradient, float32 ``[n, k]``; zeros where there is no answer.

        Raises:
            ValueError: a batch that the model cannot use.
        """
        model, batch = self._checked(batch)
        answered = _answered(batch["labels"])
        rows = torch.zeros(len(answered), self.size)
        if bool(answered.any()):
            with _undisturbed(model):
                gradients = self._gradients(model, _kept(batch, answered))
                projected = torch.stack([self._project(gradient) for gradient in gradients])
            rows[answered.cpu()] = projected if self._max_norm is None else clip_rows(projected, self._max_norm)
        return rows

    def gradient(self, batch: Mapping[str, Any]) -> Tensor:
        """The unprojected gradient, mean over the batch's examples with an answer, in the shape of the target's weight.

        Returns:
            float32, or float64 where the model is float64.

        Raises:
            ValueError: a batch that the model cannot use, or one without any answer.
        """
        model, batch = self._checked(batch)
        _require_answers(answered := _answered(batch["labels"]))
        batch = _kept(batch, answered)
        with _undisturbed(model):
            if self._tail is None:
                return torch.stack(list(self._gradients(model, batch))).mean(dim=0)
            a, u, _ = self._factors(model, self._tail, batch)
            return self._in_shape(model, a.T @ u / batch["labels"].shape[0])

    def read(self, batch: Mapping[str, Any]) -> Tensor:
        """What stands before each example's answer, as the last block finds it: float32 ``[n, hidden]``.

        See `prompt_states`; ``labels`` may be left out of the batch, and all of it is then the question.

        Raises:
            ValueError: a model that is not built of blocks.
        """
        self.prepare()
        assert self._model is not None
        assert self._target is not None
        with _undisturbed(self._model):
            return prompt_states(self._model, self._target, batch)

    def _load(self) -> nn.Module:
        if isinstance(self._source, nn.Module):
            model = self._source
        elif isinstance(self._source, str | PathLike):
            model = _compat.load_causal_lm(self._source, self._dtype or torch.float32)
        else:
            model = self._source()
        if self._dtype is not None:
            for parameter in model.parameters():  # buffers such as rotary frequencies keep their precision
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(self._dtype)
        return model

    def _checked(self, batch: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        """The model, ready, and the batch on its device."""
        self.prepare()
        model = self._model
        assert model is not None
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.ndim != 2:
            found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                "A probe batch must be a mapping with `labels` of shape [examples, tokens], -100 outside the answer, "
                f"beside what the probe's model takes, but is {found}. Make it so in the callback's `to_probe=`."
            )
        words = getattr(_compat.output_head(model), "out_features", None)
        ids = batch.get("input_ids")
        highest = max(int(each.max()) for each in (labels, ids) if isinstance(each, Tensor) and each.numel())
        if isinstance(words, int) and highest >= words:
            raise ValueError(
                f"The probe's model knows {words} tokens, but the batch holds token {highest}: it was made by another "
                "tokenizer. Tokenise the text again in the callback's `to_probe=`."
            )
        silent = int((~_answered(labels)).sum())
        if silent:
            _logger.info("%d examples of a probe batch have no answer.", silent)
        device, dtype = next(model.parameters()).device, _dtype_of(model)
        return model, {
            name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _gradients(self, model: nn.Module, batch: dict[str, Any]) -> Iterator[Tensor]:
        """Each example's gradient; all have an answer."""
        assert self._target is not None
        name = f"{self._target}.weight"
        if self._tail is None:
            for example in examples_of(batch):
                yield widened(gradient_of(model, [name], _answer_loss, example)[name])
            return
        a, u, owner = self._factors(model, self._tail, batch)
        for index in range(batch["labels"].shape[0]):
            yield self._in_shape(model, a[owner == index].T @ u[owner == index])

    def _in_shape(self, model: nn.Module, gradient: Tensor) -> Tensor:
        """A gradient ``[d_out, d_in]`` in the shape of the target's weight."""
        assert self._target is not None
        return gradient.T if _compat.is_conv1d(model.get_submodule(self._target)) else gradient

    def _factors(self, model: nn.Module, tail: Tail, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Per answer position ``a`` (over its example's number of positions), ``u``, and whose position it is."""
        labels = batch["labels"]
        names = [tail.target, *(step.name for step in tail.steps)]
        with torch.no_grad(), _head_spared(model, tail), capture(model, names) as captured:
            model(**_inputs(batch), **_compat.keyword_arguments(model))
        rows = captured[tail.target][0].numel() // captured[tail.target][0].shape[-1]
        if rows != labels.numel():
            raise ValueError(
                f"`labels` must have one entry per position of the model, but have {labels.numel()} in all and the "
                f"model has {rows} positions. Where images become tokens inside the model, give those -100 too."
            )
        answer = torch.zeros_like(labels, dtype=torch.bool)
        answer[:, :-1] = labels[:, 1:] != _IGNORED
        owner = answer.nonzero()[:, 0]
        with torch.no_grad():
            a, u = tail.factors(
                model, captured, answer.flatten().nonzero()[:, 0], labels[:, 1:][labels[:, 1:] != _IGNORED]
            )
        return a / answer.sum(dim=1)[owner, None], u, owner

    def _error_of(self, model: nn.Module, tail: Tail, batch: dict[str, Any]) -> float:
        """Norm of closed form minus autograd over the norm of autograd, on one batch."""
        a, u, _ = self._factors(model, tail, batch)
        closed = a.T @ u / batch["labels"].shape[0]
        closed = closed.T if _compat.is_conv1d(model.get_submodule(tail.target)) else closed
        name = f"{tail.target}.weight"
        parts = [widened(gradient_of(model, [name], _answer_loss, example)[name]) for example in examples_of(batch)]
        exact = torch.stack(parts).mean(dim=0)
        return float((closed - exact).norm() / exact.norm().clamp(min=1e-30))


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run without the caller's autocast."""
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        yield


@contextmanager
def _head_spared(model: nn.Module, tail: Tail) -> Iterator[None]:
    """Let the head see one position: the tail makes the few logits that count itself.

    Contiguous, since torch's CPU matmul of a sliced batch with a frozen bfloat16 vocabulary takes seconds.
    """

    def last_only(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][..., -1:, :].contiguous(), *args[1:])

    hook = model.get_submodule(tail.head).register_forward_pre_hook(last_only)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Lend the model float32 copies of its weights: autograd in bfloat16 is itself off by several percent."""
    lent = {tensor: tensor.data for tensor in model.parameters() if tensor.dtype in (torch.bfloat16, torch.float16)}
    for tensor, own in lent.items():
        tensor.data = own.float()
    try:
        yield
    finally:
        for tensor, own in lent.items():
            tensor.data = own


def _answer_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Mean cross entropy over the answer positions of a batch of one example."""
    output = model(**_inputs(batch), **_compat.keyword_arguments(model))
    logits = widened(_compat.logits_of(output)[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=_IGNORED)


def _answered(labels: Tensor) -> Tensor:
    """bool ``[n]``: which examples have a token to predict."""
    return (labels[:, 1:] != _IGNORED).any(dim=1)


def _require_answers(answered: Tensor) -> None:
    if not bool(answered.any()):
        raise ValueError("No example of the probe batch has an answer: all `labels` behind the first token are -100.")


def _kept(batch: dict[str, Any], answered: Tensor) -> dict[str, Any]:
    """The examples that have an answer."""
    if bool(answered.all()):
        return batch
    kept = [example for example, full in zip(examples_of(batch), answered.tolist(), strict=True) if full]
    return {
        name: torch.cat([example[name] for example in kept]) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _trial_batch(model: nn.Module) -> dict[str, Any]:
    """Two short random texts, of which the first two tokens are no answer."""
    head = _compat.output_head(model)
    words = getattr(head, "out_features", None) or 2
    device = next(model.parameters()).device
    ids = torch.randint(words, (2, 6), generator=torch.Generator().manual_seed(0)).to(device)
    labels = ids.clone()
    labels[:, :2] = _IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _last_projection(model: nn.Module) -> str:
    """The target of a model whose tail is unknown: the last projection in the order of definition."""
    try:
        return find_target([name for name, module in model.named_modules() if is_linear(module)])
    except UnknownTailError as reason:
        raise ValueError(
            f"The probe found nothing to take a gradient in: in {type(model).__name__} {reason}. "
            "Name a linear layer, for example `CausalLMProbe(..., target='model.layers.11.mlp.down_proj')`."
        ) from reason


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
