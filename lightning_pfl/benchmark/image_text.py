"""Models of the hub that read pictures and text, as a LightningModule.

Start at `load_image_text` (a hub id or a folder) and `ImageTextModule`. Whatever transformers' own
``AutoModelForImageTextToText`` loads can be trained on a task and asked it; batches are those of `image_text_data`.
"""

from __future__ import annotations

import inspect
from typing import Any, cast, final

import lightning as L
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from lightning_pfl.adapters import adapter_parameters, prompt_positions
from lightning_pfl.functional.likelihood import choice_log_probs, continuation_log_likelihood
from lightning_pfl.metrics import ChoiceScores, OpenAnswers

__all__ = ["ImageTextModule", "ModelUnavailableError", "load_image_text"]


class ModelUnavailableError(OSError):
    """A model that cannot be loaded; the message names it and the ways out."""


def load_image_text(
    model_id: str, *, dtype: torch.dtype | None = None, revision: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """A model and its processor, from the hub or from a folder.

    Args:
        model_id: such as ``thkim0305/llama3.2_1B_vl``, or a folder that ``save_pretrained`` has written.
        dtype: of the weights; None: as they were saved.
        revision: branch, tag or commit on the hub; pin it, for ids can change what they hold.

    Returns:
        The model, frozen and in evaluation mode, and the processor.

    Raises:
        ModelUnavailableError: no such model, no network, a gated one without a token, or one that does not read
            pictures and text.
    """
    try:
        processor = AutoProcessor.from_pretrained(model_id, revision=revision or "main")
        model = AutoModelForImageTextToText.from_pretrained(
            model_id, dtype=dtype or "auto", revision=revision or "main"
        )
    except (OSError, ValueError) as error:
        raise ModelUnavailableError(
            f"{model_id} cannot be loaded as a model of pictures and text: {error}. It must be the id of one on the "
            "hub (which needs the network, and `hf auth login` for gated ones), or a folder with the model and its "
            "processor."
        ) from error
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise ModelUnavailableError(f"{model_id} has no processor for both pictures and text.")
    return model.requires_grad_(False).eval(), processor


@final
class ImageTextModule(L.LightningModule):
    """Trains on the answers, and scores choices by the likelihood of each whole answer.

    The model is frozen; what a callback such as `CoLoRA` adds to it is trained. Validation and test log ``*_loss``
    (minus the log-probability of the right choice; of an open answer its mean per token), ``*_acc`` of questions with
    choices and ``*_f1`` of open ones, which are generated.

    Args:
        model: from `load_image_text`.
        processor: its own.
        lr: learning rate of AdamW.
        lr_pq: of P and Q of Co-LoRA adapters; None: as ``lr``.
        max_new_tokens: of a generated answer.

    Source:
        The loss is the mean over answer tokens, end of turn included, as Co-LoRA's (arXiv:2506.11024). It generates
        every answer and reads it; here choices are scored without generating, and `GeneratedChoices` reads texts from
        `generate` where that is wanted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        lr: float = 2e-5,
        lr_pq: float | None = None,
        max_new_tokens: int = 32,
    ) -> None:
        super().__init__()
        self.model: nn.Module = model
        self.processor = processor
        self.lr, self.lr_pq = lr, lr_pq
        self.max_new_tokens = max_new_tokens

    def log_likelihood(self, inputs: dict[str, Tensor], continuation: Tensor) -> Tensor:
        """Log-likelihood of one continuation per prompt, all its tokens.

        Args:
            inputs: of prompts, from `ImageTextCollator`.
            continuation: token ids ``[b, t]``, -1 on padding.

        Returns:
            In nats, shape ``[b]``.
        """
        prompt = inputs["input_ids"]
        follows = continuation >= 0
        ids = torch.cat([prompt, continuation.clamp(min=0)], dim=1)
        extended = {
            name: torch.cat([value, torch.zeros_like(continuation, dtype=value.dtype)], dim=1)
            for name, value in inputs.items()
            if value.shape == prompt.shape and name not in ("input_ids", "attention_mask")
        }
        mask = torch.cat([inputs["attention_mask"], follows.to(inputs["attention_mask"])], dim=1)
        readable = mask.bool()
        readable[:, prompt.shape[1] :] = False
        kept = continuation.shape[1] + 1
        arguments: dict[str, Any] = {**inputs, **extended, "input_ids": ids, "attention_mask": mask}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            arguments["logits_to_keep"] = kept  # the vocabulary is wide: only rows that predict an answer
        with prompt_positions(cast(Any, self.model).get_decoder(), readable):  # a vision tower has positions of its own
            logits = cast(Any, self.model)(**arguments, use_cache=False).logits[:, -kept:]
        chosen = torch.cat([torch.zeros_like(follows[:, :1]), follows], dim=1)
        return continuation_log_likelihood(logits, ids[:, -kept:], chosen)

    @torch.no_grad()
    def score_choices(self, batch: dict[str, Any]) -> Tensor:
        """Log-likelihood of every choice ``[b, c]``, minus infinity where fewer are offered."""
        candidates = batch["candidate_ids"]
        scores = [self.log_likelihood(batch["inputs"], candidates[:, index]) for index in range(candidates.shape[1])]
        missing: Tensor = (candidates < 0).all(dim=2)
        return torch.stack(scores, dim=1).masked_fill(missing, -torch.inf)

    @torch.no_grad()
    def generate(self, batch: dict[str, Any]) -> list[str]:
        """Greedy answers as text, without special tokens."""
        inputs = batch["inputs"]
        written = cast(Any, self.model).generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        answers = written[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(answers, skip_special_tokens=True)]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean negative log-likelihood per answer token."""
        tokens = (batch["answer_ids"] >= 0).sum()
        loss: Tensor = -self.log_likelihood(batch["inputs"], batch["answer_ids"]).sum() / tokens
        self.log("train_loss", loss, batch_size=len(batch["answer"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the scores of a batch."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the scores of a batch, per loader where there are several."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        """Generated answers."""
        return self.generate(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over whatever is trainable by now.

        Raises:
            ValueError: nothing is trainable.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("ImageTextModule has nothing to train: its model is frozen. Add adapters with CoLoRA.")
        fast = set() if self.lr_pq is None else {id(one) for one in adapter_parameters(self).pq.values()}
        groups = [
            {"params": [one for one in parameters if id(one) not in fast], "lr": self.lr},
            {"params": [one for one in parameters if id(one) in fast], "lr": self.lr_pq or self.lr},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)

    @torch.no_grad()
    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        closed = batch["answer"] >= 0
        losses = -self.log_likelihood(batch["inputs"], batch["answer_ids"]) / (batch["answer_ids"] >= 0).sum(dim=1)
        if closed.any():
            scores = self.score_choices(batch)[closed]
            right = batch["answer"][closed]
            losses[closed] = -choice_log_probs(scores).gather(1, right[:, None]).squeeze(1)
            metric = ChoiceScores().to(scores.device)
            metric.update(scores, right)
            self.log(f"{stage}_acc", metric.compute()["accuracy"], batch_size=len(right), prog_bar=True)
        if not closed.all():
            texts = [
                (text, target)
                for text, target, is_closed in zip(self.generate(batch), batch["texts"], closed.tolist(), strict=True)
                if not is_closed
            ]
            answers = OpenAnswers(special_tokens=self.processor.tokenizer.all_special_tokens)
            answers.update([text for text, _ in texts], [target for _, target in texts])
            self.log(f"{stage}_f1", answers.compute()["f1"], batch_size=len(texts), prog_bar=True)
        self.log(f"{stage}_loss", losses.mean(), batch_size=len(losses), prog_bar=True)
