"""What a pool is handed and what it hands back: one client's turn as data.

`Job` in, `JobResult` out. Both are plain data, so that a turn can run in this process, in another, or on another
machine, and can be run again when the place where it ran died: a job holds everything that its result depends on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from lightning_pfl.federation.letters import Terms
from lightning_pfl.federation.privacy import Permit
from lightning_pfl.types import Assignment, ClientUpdate, UpdateLetter

__all__ = ["Failure", "Job", "JobResult", "LogRecord"]


@dataclass(frozen=True, eq=False)
class Job:
    """One client's turn.

    Attributes:
        assignment: whose turn, which round, and what the server sends along.
        stage: what to run: ``TrainerFn.FITTING`` is a segment of training, the others evaluate the personalised model.
        snapshot: which of the run's snapshots (trainer, module, datamodule) the client starts from.
        state: the client's private checkpoint from its last turn, as bytes; None in its first.
        seed: of the client, used in its first turn only; later the state carries the random generators.
        num_threads: torch threads of this client; they change bits, so they belong to the client, not to the place.
        permit: what the client needs to noise what it sends, and what it may still send; None: nothing is noised.
        terms: how client and server write to each other; None: tensors travel as they are.
    """

    assignment: Assignment
    stage: TrainerFn
    snapshot: str
    state: bytes | None
    seed: int
    num_threads: int = 1
    permit: Permit | None = None
    terms: Terms | None = None


@dataclass(frozen=True)
class LogRecord:
    """Metrics that a client handed to its logger, to be replayed by the server's loggers.

    Attributes:
        metrics: by the user's names.
        step: the client's own step.
    """

    metrics: Mapping[str, float]
    step: int | None


@dataclass(frozen=True)
class Failure:
    """Why a turn gave no result.

    Attributes:
        trace: the client's own traceback as text.
        lost: True when the place where it ran, or its device, is gone, so that running it again elsewhere may help.
    """

    trace: str
    lost: bool = False


@dataclass(frozen=True, eq=False)
class JobResult:
    """What came of one turn.

    Attributes:
        client_id: whose turn it was.
        update: what goes to the aggregator; None unless the job trained.
        letter: the update's tensors as bytes, which the update then lacks; None where they travel as they are.
        state: the client's private checkpoint for its next turn, as bytes; None unless the job trained.
        metrics: what the client's Trainer reported, by the user's names.
        predictions: what ``trainer.predict`` returned; None unless the job predicted.
        logs: what the client logged on its way.
        failure: why there is nothing else in this result; None when all went well.
        seconds: that the turn took where it ran.
    """

    client_id: str
    update: ClientUpdate | None = None
    letter: UpdateLetter | None = None
    state: bytes | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    predictions: Any = None
    logs: Sequence[LogRecord] = ()
    failure: Failure | None = None
    seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes that travel to the server."""
        if self.letter is not None:
            return self.letter.nbytes
        return 0 if self.update is None else self.update.nbytes
