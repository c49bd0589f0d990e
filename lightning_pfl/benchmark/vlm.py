"""A small vision-language model as a LightningModule: frozen features, a projector, a frozen language model.

Start at `VisionLanguageModule`. Nothing but the projector is trainable by itself; adapters in the language model are
what a PEFT callback adds. The loss looks only at the first tokens of the offered answers, which is exact for choosing
among them and spares the product with a vocabulary of up to 262,144 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast, final

import lightning as L
import torch
from torch import Tensor, nn

from lightning_pfl.adapters import adapter_parameters
from lightning_pfl.benchmark.batches import IMAGE_ID
from lightning_pfl.benchmark.last_position import ends_in_one_layer, last_state


@dataclass(frozen=True)
class Scores:
    """How a batch was answered, one entry per example.

    Attributes:
        predicted: index of the likeliest choice [b].
        correct: whether it is the right one [b], bool.
        log_likelihood: of the right choice among the choices [b], in nats.
    """

    predicted: Tensor
    correct: Tensor
    log_likelihood: Tensor


@final
class Projector(nn.Module):
    """Map visual tokens into the space of a language model's token embeddings.

    First to the leading principal coordinates of public pictures, which are fixed and the same for every language model
    with the same image encoder: so all models are told the same of a picture. Then by a linear map and a perceptron
    beside it. The output has the root mean square of the token embeddings as the model feeds them, which differs
    60-fold between families; without it small models do not learn from pictures at all.

    Args:
        width: features per visual token.
        hidden: width of the language model.
        rms: root mean square of its token embeddings.
        num_coordinates: how many coordinates of a picture the language model is told.
    """

    def __init__(self, width: int, hidden: int, rms: float, *, num_coordinates: int = 64) -> None:
        super().__init__()
        self.hidden = hidden
        num_coordinates = min(num_coordinates, width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("basis", torch.eye(width, num_coordinates))
        self.linear = nn.Linear(num_coordinates, hidden)
        self.perceptron = nn.Sequential(nn.Linear(num_coordinates, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.register_buffer("rms", torch.tensor(rms))

    def coordinates(self, features: Tensor) -> Tensor:
        """What is told of a picture: [..., width] to float32 [..., num_coordinates]."""
        return (features.float() - cast(Tensor, self.mean)) @ cast(Tensor, self.basis)

    def forward(self, features: Tensor) -> Tensor:
        """Map [..., width] to float32 [..., hidden]."""
        told = self.coordinates(features)
        projected: Tensor = self.norm(self.linear(told) + self.perceptron(told))
        return projected * cast(Tensor, self.rms)


@final
class VisionLanguageModule(L.LightningModule):
    """Answers closed questions about pictures; batches are those of `batches`.

    Args:
        language_model: a causal language model of transformers; frozen here, its linear layers are what an adapter
            callback adapts. Its tokenizer is not needed.
        projector: maps visual tokens to its width; pre-trained by `projector.pretrain_projector`.
        lr: learning rate of AdamW.
        lr_pq: of P and Q of Co-LoRA adapters, which see few numbers and bear a higher one; None: as `lr`.
        weight_decay: of AdamW.
        warmup_steps: optimizer steps of linear warm-up; constant afterwards.
        train_projector: train the projector too; off, it stays as it was pre-trained.

    Attributes:
        only_last_position: where one layer is left, which goes on from ``states``, compute nothing of it that does not
            bear on the answer (`last_position`); off unless it is set. What reads that layer at all positions, such as
            an alignment, needs it off.

    Raises:
        ValueError: the projector's width is not the language model's.
    """

    def __init__(
        self,
        language_model: nn.Module,
        projector: Projector,
        *,
        lr: float = 5e-4,
        lr_pq: float | None = None,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        train_projector: bool = False,
    ) -> None:
        super().__init__()
        self.language_model = language_model.requires_grad_(False)
        self.projector = projector.requires_grad_(train_projector)
        self.lr = lr
        self.lr_pq = lr_pq
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.only_last_position = False
        hidden = self._head().shape[1]
        if projector.hidden != hidden:
            raise ValueError(
                f"`projector` must map to the language model's width, {hidden}, but maps to {projector.hidden}."
            )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Score the offered answers: logits [b, c] in float32, minus infinity where an example offers fewer."""
        last = self.last_states(batch).float()
        logits = torch.einsum("bch,bh->bc", self.answer_rows(batch["option_ids"].clamp(min=0)), last)
        cap = getattr(self._config(), "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits.masked_fill(batch["option_ids"] < 0, -torch.inf)

    def answer_rows(self, tokens: Tensor) -> Tensor:
        """The head's rows of some tokens, float32 [..., hidden]; against a last hidden state they give its logits."""
        return self._head()[tokens].float()

    def last_states(self, batch: dict[str, Tensor]) -> Tensor:
        """The language model's last hidden state at the last position [b, hidden], where the answer is read."""
        body = self._body()
        if self.only_last_position and "states" in batch and ends_in_one_layer(body):
            return last_state(body, batch["states"].to(self._head().dtype), batch["attention_mask"])
        return self.hidden_states(batch)[:, -1]

    def hidden_states(self, batch: dict[str, Tensor]) -> Tensor:
        """The language model's last hidden states [b, t, hidden] over pictures and question.

        Where a batch has ``states`` [b, t, hidden], the model goes on from those (see `states`).
        """
        mask = batch["attention_mask"]
        begun = (
            batch["states"].to(self._head().dtype)
            if "states" in batch
            else self.embed(batch["features"], batch["input_ids"])
        )
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return cast(
            Tensor,
            self._body()(
                inputs_embeds=begun, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state,
        )

    def embed(self, features: Tensor, input_ids: Tensor) -> Tensor:
        """Token embeddings [b, t, hidden], with the projected features, in order, where `input_ids` is `IMAGE_ID`."""
        words = cast(Tensor, self._embedding()(input_ids.clamp(min=0)))
        is_image = input_ids == IMAGE_ID
        if not features.shape[1]:
            return words
        visual = self.projector(features).to(words.dtype)
        order = (is_image.cumsum(dim=1) - 1).clamp(min=0, max=visual.shape[1] - 1)
        placed = visual.gather(1, order.unsqueeze(-1).expand(-1, -1, visual.shape[2]))
        return torch.where(is_image.unsqueeze(-1), placed, words)

    @torch.no_grad()
    def score(self, batch: dict[str, Tensor]) -> Scores:
        """How each example of a batch is answered."""
        log_probs = self(batch).log_softmax(dim=1)
        predicted = log_probs.argmax(dim=1)
        right = log_probs.gather(1, batch["answer"].unsqueeze(1)).squeeze(1)
        return Scores(predicted, predicted == batch["answer"], right)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy over the offered answers."""
        loss = nn.functional.cross_entropy(self(batch), batch["answer"])
        self.log("train_loss", loss, batch_size=len(batch["answer"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log `val_loss` and `val_acc`."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log `test_loss` and `test_acc`, per loader where there are several."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Scores:
        """Answer per example."""
        return self.score(batch)

    def configure_optimizers(self) -> Any:
        """AdamW over whatever is trainable by now, with linear warm-up.

        Raises:
            ValueError: nothing is trainable.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError(
                "VisionLanguageModule has nothing to train: its language model is frozen. Add adapters to it with the "
                "CoLoRA callback, or pass train_projector=True."
            )
        pq = [] if self.lr_pq is None else list(adapter_parameters(self).pq.values())
        fast = {id(parameter) for parameter in pq}
        groups = [
            {"params": [parameter for parameter in parameters if id(parameter) not in fast], "lr": self.lr},
            {"params": [parameter for parameter in parameters if id(parameter) in fast], "lr": self.lr_pq or self.lr},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=self.weight_decay)
        if not self.warmup_steps:
            return optimizer
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1 / (self.warmup_steps + 1), total_iters=self.warmup_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        scores = self.score(batch)
        size = len(batch["answer"])
        self.log(f"{stage}_loss", -scores.log_likelihood.mean(), batch_size=size, prog_bar=True)
        self.log(f"{stage}_acc", scores.correct.float().mean(), batch_size=size, prog_bar=True)

    def _config(self) -> Any:
        return self.language_model.config

    def _body(self) -> nn.Module:
        """The language model without its head, also below a PEFT wrapper."""
        return cast(nn.Module, cast(Any, self.language_model).get_decoder())

    def _embedding(self) -> nn.Module:
        return cast(nn.Module, cast(Any, self.language_model).get_input_embeddings())

    def _head(self) -> Tensor:
        return cast(Tensor, cast(Any, self.language_model).get_output_embeddings().weight)


def embedding_rms(language_model: nn.Module) -> float:
    """Root mean square of token embeddings as the model feeds them, over every 16th token of its vocabulary.

    Gemma multiplies its embeddings by the square root of its width; asking the layer itself sees that.
    """
    embedding = cast(nn.Module, cast(Any, language_model).get_input_embeddings())
    num_tokens = cast(Tensor, embedding.weight).shape[0]
    with torch.no_grad():
        return float(embedding(torch.arange(0, num_tokens, 16)).float().pow(2).mean().sqrt())
