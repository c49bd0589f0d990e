"""`run_job`: one client's turn, from data to data. The same in every pool.

A turn unpickles its own trainer, module and datamodule, runs the user's real ``trainer.fit`` (a segment of it),
``validate``, ``test`` or ``predict``, and hands back what may leave the client. The pool has seeded the random
generators with the client's seed by then, so that ``setup`` splits data alike in every turn; training goes on from the
generators in the client's state.
"""

from __future__ import annotations

import time
import traceback
import weakref
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.trainer.states import TrainerFn

from lightning_pfl.callbacks.federated import KeySource, SketchSource
from lightning_pfl.federation._compat import (
    FitLoop,
    callbacks_of,
    loaders,
    quiet,
    resume_from_memory,
    skip_prepare_data,
    training_batches,
)
from lightning_pfl.federation.client_strategy import IN, ClientInterrupted, ClientStrategy
from lightning_pfl.federation.forwarding import ForwardingLogger
from lightning_pfl.federation.frozen import checksums
from lightning_pfl.federation.jobs import Failure, Job, JobResult, LogRecord
from lightning_pfl.federation.metrics import local_name
from lightning_pfl.federation.post import write_update
from lightning_pfl.federation.privacy import release, require_within
from lightning_pfl.federation.segment import SegmentLoop
from lightning_pfl.federation.snapshot import Snapshot
from lightning_pfl.federation.sources import ClientData
from lightning_pfl.federation.state_bytes import pack, unpack
from lightning_pfl.functional.wire import LargestChanges
from lightning_pfl.types import ClientUpdate, SharedTensors

__all__ = ["build_client", "introduce_client", "run_job", "unpack_state"]

_BASES: weakref.WeakKeyDictionary[Snapshot, dict[str, int]] = weakref.WeakKeyDictionary()


def run_job(snapshot: Snapshot, job: Job) -> JobResult:
    """Run one turn.

    Args:
        snapshot: of (trainer, module, `ClientData`), the trainer holding a `ClientStrategy`.
        job: whose turn, and what to do.

    Returns:
        The result, or a result with a `Failure` that holds the client's own traceback.

    Raises:
        KeyboardInterrupt: Ctrl-C during the turn.
        SystemExit: SIGTERM during the turn, as Lightning does.
    """
    begun = time.perf_counter()
    try:
        with quiet():
            turn = _Turn(snapshot, job)
            try:
                result = turn.fit() if job.stage is TrainerFn.FITTING else turn.evaluate()
            finally:
                turn.forget()
            return replace(result, seconds=time.perf_counter() - begun)
    except ClientInterrupted as error:
        raise KeyboardInterrupt from error
    except Exception as error:
        lost = isinstance(error, torch.AcceleratorError)  # the device is gone, and with it this process' use of it
        return JobResult(job.assignment.client_id, failure=Failure(traceback.format_exc(), lost=lost))


def build_client(snapshot: Snapshot, job: Job) -> tuple[L.Trainer, L.LightningModule]:
    """The client's model as its next turn would find it, with its private state and what the server sent.

    Args:
        snapshot: as in `run_job`.
        job: whose model; its stage says which ``setup`` hooks run.

    Returns:
        The client's trainer, for its callbacks, and the module, which belongs to nobody else.
    """
    with quiet():
        turn = _Turn(snapshot, job, only_build=True)
        turn.run()
    turn.module.__dict__["_trainer"] = None  # the module outlives the turn, and should be free to be pickled
    return turn.trainer, turn.module


def introduce_client(snapshot: Snapshot, job: Job) -> tuple[L.Trainer, L.LightningModule, ClientUpdate]:
    """A client as it is before its first turn, and what it can tell of itself without training.

    One epoch of its training data (or `local_steps` of it) passes its sketching callback, and nothing else.

    Args:
        snapshot: as in `run_job`.
        job: the client's first turn.

    Returns:
        The client's trainer, for its callbacks, the module, and what the client would send: its untrained tensors, and
        the sketch of its task, None without a callback that sketches.
    """
    with quiet():
        turn = _Turn(snapshot, job, only_build=True)
        turn.run()
        update = turn.introduce()
    turn.module.__dict__["_trainer"] = None
    return turn.trainer, turn.module, update


class _Turn:
    def __init__(self, snapshot: Snapshot, job: Job, *, only_build: bool = False) -> None:
        self.trainer: L.Trainer
        self.module: L.LightningModule
        data: ClientData
        self.trainer, self.module, data = snapshot.load()
        self.job = job
        self.client_id = job.assignment.client_id
        self.incoming = None if job.state is None else unpack_state(job.state)
        assert isinstance(self.trainer.strategy, ClientStrategy)
        self.strategy = self.trainer.strategy
        if snapshot not in _BASES:
            _BASES[snapshot] = checksums(self.module)
        self.strategy.begin(
            self.client_id,
            job.assignment.round,
            incoming=self.incoming,
            personalized=job.assignment.personalized,
            base=_BASES[snapshot],
            terms=job.terms,
            only_build=only_build,
            keep_known=self._noises_updates or self._tells_changes,
        )
        self.arguments = data.arguments(self.client_id, job.stage)
        self.logger = next((one for one in self.trainer.loggers if isinstance(one, ForwardingLogger)), None)
        if self.logger is not None:
            self.logger.begin(self.client_id, self.trainer)
        skip_prepare_data(self.trainer)
        resume_from_memory(self.trainer, IN)

    def run(self) -> Any:
        path = None if self.incoming is None else IN
        if self.job.stage is TrainerFn.FITTING:
            return self.trainer.fit(self.module, **self.arguments, ckpt_path=path)
        if self.job.stage is TrainerFn.PREDICTING:
            return self.trainer.predict(self.module, **self.arguments, ckpt_path=path, return_predictions=True)
        verb = self.trainer.validate if self.job.stage is TrainerFn.VALIDATING else self.trainer.test
        return verb(self.module, **self.arguments, ckpt_path=path, verbose=False)

    def fit(self) -> JobResult:
        sketch: torch.Tensor | None = None
        keys: torch.Tensor | None = None
        sources = [one for one in callbacks_of(self.trainer) if isinstance(one, KeySource)]
        sketches = [one for one in callbacks_of(self.trainer) if isinstance(one, SketchSource)]

        def save(carried: dict[str, Any]) -> None:
            nonlocal sketch, keys
            # before the checkpoint: what is still in it then would count again in the next turn's mean
            sketch = sketches[0].take_sketch() if sketches else None
            keys = sources[0].take_keys() if sources else None
            self.strategy.save_with(carried)

        loop = SegmentLoop(
            self.trainer,
            epochs=self.strategy.local_epochs,
            steps=self.strategy.local_steps,
            carried=self.strategy.carried,
            save=save,
        )
        self.trainer.fit_loop = loop
        self.run()
        metrics = self._metrics()
        exchange = self.strategy.exchange_of(callbacks_of(self.trainer))
        update = ClientUpdate(
            client_id=self.client_id,
            round=self.job.assignment.round,
            num_examples=_num_examples(loop),
            architecture=exchange.architecture(self.module),
            shared=exchange.upload(self.module),
            sketch=sketch,
            keys=keys,
            metrics=metrics,
        )
        letter, held_back, trained = None, None, self.strategy.saved is not None
        if self.job.permit is not None:
            bound = sketches[0].take_bound() if sketches else None
            update = release(update, self.job.permit, known=self.strategy.known, bound=bound, trained=trained)
        if self.job.terms is not None:  # after the noise, so that rounding sees only what may be seen
            copy, owed = (self.strategy.known, self.strategy.owed) if self._tells_changes else (None, None)
            letter, update, held_back = write_update(update, self.job.terms, copy=copy, owed=owed)
        if self.job.permit is not None:
            require_within(update, self.job.permit)
        if self._noises_updates or self._tells_changes:
            self.strategy.sent(update.shared, held_back)
        state = self.job.state
        if self.strategy.saved is not None:
            state = pack(self.strategy.saved, check=state is None)
        elif held_back is not None and self.incoming is not None:
            state = pack(self.incoming)
        if letter is not None:
            update = replace(update, shared=SharedTensors(), sketch=None, keys=None)
        return JobResult(self.client_id, update, letter, state=state, metrics=metrics, logs=self._logs())

    def introduce(self) -> ClientUpdate:
        exchange = self.strategy.exchange_of(callbacks_of(self.trainer))
        sketches = [one for one in callbacks_of(self.trainer) if isinstance(one, SketchSource)]
        for index, batch in training_batches(self.trainer, self.module) if sketches else ():
            sketches[0].on_train_batch_start(self.trainer, self.module, batch, index)
            if self.strategy.local_steps is not None and self.trainer.global_step + 1 >= self.strategy.local_steps:
                break
        return ClientUpdate(
            client_id=self.client_id,
            round=self.job.assignment.round,
            num_examples=max(1, _num_examples(self.trainer.fit_loop)),
            architecture=exchange.architecture(self.module),
            shared=exchange.upload(self.module),
            sketch=sketches[0].take_sketch() if sketches else None,
        )

    def evaluate(self) -> JobResult:
        if self.incoming is not None:  # so that `current_epoch` and `global_step` say how far the client is
            self.trainer.fit_loop.load_state_dict(self.incoming["loops"]["fit_loop"])
        results = self.run()
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        if self.job.stage is TrainerFn.PREDICTING:
            return JobResult(self.client_id, predictions=move_data_to_device(results, torch.device("cpu")))
        return JobResult(self.client_id, metrics=metrics)

    def forget(self) -> None:
        """Break the cycles between trainer, module and callbacks, so that memory is free when the turn is over."""
        for callback in callbacks_of(self.trainer):
            vars(callback).pop("log", None)
            vars(callback).pop("log_dict", None)
        vars(self.module).clear()
        vars(self.strategy).clear()
        vars(self.trainer).clear()

    @property
    def _noises_updates(self) -> bool:
        return self.job.permit is not None and self.job.permit.privacy.updates is not None

    @property
    def _tells_changes(self) -> bool:
        return self.job.terms is not None and isinstance(self.job.terms.wire, LargestChanges)

    def _metrics(self) -> dict[str, float]:
        """What was logged, validation metrics under their local names."""
        validation = self.strategy.validation
        training = {
            name: float(value)
            for name, value in self.trainer.callback_metrics.items()
            if name not in self.strategy.validation_names
        }
        return {**training, **{local_name(name): value for name, value in validation.items()}}

    def _logs(self) -> tuple[LogRecord, ...]:
        return () if self.logger is None else tuple(self.logger.records)


def unpack_state(state: bytes) -> dict[str, Any]:
    """A client's checkpoint, as its last turn left it."""
    loaded: dict[str, Any] = unpack(state)
    return loaded


def _num_examples(loop: FitLoop) -> int:
    """How many examples one epoch of the client's training data holds; 0 if there is nothing to train on."""
    total = 0
    for loader in loaders(loop):
        size = getattr(loader, "batch_size", None) or getattr(
            getattr(loader, "batch_sampler", None), "batch_size", None
        )
        limit = float("inf") if size is None else loop.max_batches * size
        try:
            held = len(getattr(loader, "sampler", loader))
        except TypeError:  # an iterable dataset: what the last epoch gave
            held = loop.epoch_loop.batch_progress.current.completed * (size or 1)
        total += int(min(held, limit))
    return total
