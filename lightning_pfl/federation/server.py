"""`ServerModule`: the module that Lightning's own loops run on the driver. One training step is one round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.federation._compat import copy_hparams_flags, is_dry_run, log_under_any_name
from lightning_pfl.federation.forwarding import replay
from lightning_pfl.federation.history import RelevanceFile
from lightning_pfl.federation.metrics import per_client
from lightning_pfl.federation.rounds import Rounds
from lightning_pfl.federation.scope import of_server

__all__ = ["KEY", "ServerModule"]

KEY = "federated"
"""Where the federation lies in a checkpoint."""


@final
class ServerModule(L.LightningModule):
    """Stands in for the user's module while Lightning's loops run on the driver.

    Its weights, hyperparameters and checkpoint hooks are the user's module's; its steps are rounds. The user's module
    is no child of it and none of its training hooks run here.

    Args:
        module: the user's, with its layers built.
        rounds: the engine.
        validating: who is evaluated after aggregation.
        training: whether this is ``trainer.fit``.
        summaries: callbacks that describe the user's module.
    """

    def __init__(
        self,
        module: L.LightningModule,
        rounds: Rounds,
        *,
        validating: frozenset[str],
        training: bool,
        summaries: list[ModelSummary],
    ) -> None:
        super().__init__()
        object.__setattr__(self, "user_module", module)  # past torch's own, so that it is no child
        self.user_module: L.LightningModule
        copy_hparams_flags(module, self)
        self.rounds = rounds
        self._validating = validating
        self._training = training
        self._summaries = summaries
        self._file: RelevanceFile | None = None

    # -- what is asked about the module is answered by the user's ------------------------------------------------------

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.user_module.state_dict(*args, **kwargs)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.user_module.load_state_dict(state_dict, strict=strict)

    @property
    @override
    def strict_loading(self) -> bool:
        return self.user_module.strict_loading

    @strict_loading.setter
    def strict_loading(self, strict_loading: bool) -> None:
        self.user_module.strict_loading = strict_loading

    @property
    @override
    def hparams(self) -> Any:
        return self.user_module.hparams

    @property
    @override
    def hparams_initial(self) -> Any:
        return self.user_module.hparams_initial

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.user_module.on_save_checkpoint(checkpoint)
        checkpoint[KEY] = self.rounds.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if KEY not in checkpoint:
            raise CheckpointMismatchError(
                "The checkpoint was not written by a federated run: it has no entry 'federated'. Load such "
                "weights into the module before (`Module.load_from_checkpoint`), and start without `ckpt_path=`."
            )
        self.rounds.load_state_dict(checkpoint[KEY], training=self._training)
        self.user_module.on_load_checkpoint(checkpoint)

    @override
    def configure_callbacks(self) -> list[L.Callback]:
        wanted = self.user_module.configure_callbacks()
        return of_server([wanted] if isinstance(wanted, L.Callback) else wanted)

    # -- rounds --------------------------------------------------------------------------------------------------------

    @override
    def configure_optimizers(self) -> None:
        return None

    @override
    def on_fit_start(self) -> None:
        for summary in self._summaries:
            summary.on_fit_start(self.trainer, self.user_module)
        folder = self.trainer.log_dir
        if self.trainer.loggers and folder is not None and "://" not in folder and not is_dry_run(self.trainer):
            self._file = RelevanceFile(f"{folder}/relevance.jsonl")

    @override
    def on_train_start(self) -> None:
        if self._file is not None:
            self._file.restart(self.rounds.state.relevance)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        report = self.rounds.train(self.trainer.current_epoch, self.user_module)
        self._log_all(report.metrics)
        self._log_all({**report.counts, **report.spent}, prog_bar=False)
        for client_id, records in report.logs.items():
            replay(client_id, records, self.trainer.loggers)
        if self._file is not None and (report.relevance.weights is not None or report.relevance.similarity is not None):
            self._file.append(report.relevance)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        asked = tuple(self.rounds.plan.snapshot_of)
        if self.trainer.state.fn is TrainerFn.FITTING:
            asked = tuple(client_id for client_id in self.rounds.participants if client_id in self._validating)
        self._evaluate(asked, TrainerFn.VALIDATING)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(tuple(self.rounds.plan.snapshot_of), TrainerFn.TESTING)

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        everyone = tuple(self.rounds.plan.snapshot_of)
        return self.rounds.evaluate(everyone, TrainerFn.PREDICTING, self.trainer.current_epoch).predictions

    def _evaluate(self, client_ids: tuple[str, ...], stage: TrainerFn) -> None:
        evaluation = self.rounds.evaluate(client_ids, stage, self.trainer.current_epoch)
        self._log_all(evaluation.means)
        self._log_all(per_client(evaluation.metrics), prog_bar=False)

    def _log_all(self, metrics: Mapping[str, float], *, prog_bar: bool = True) -> None:
        for name, value in metrics.items():
            tensor: Tensor = torch.tensor(value, dtype=torch.float32)
            if "/dataloader_idx_" in name:  # Lightning's own names for several loaders, which `self.log` refuses
                log_under_any_name(self.trainer, name, tensor)
            else:
                self.log(name, tensor, on_step=False, on_epoch=True, prog_bar=prog_bar, batch_size=1)
