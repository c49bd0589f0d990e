"""`StackedPool`: clients of one architecture train several at once, in one process and one pass over their backbone.

Start at `StackedPool.next`. Every client's turn is the same code as in `LocalPool`, in a `Runner` of its own: it runs
until it comes to a loss that its module calls `stackable`, and waits there. When all turns wait, losses that are alike
are computed together by the first of them, and each goes on with its own gradients. So its hooks, optimizer, clipping,
accumulation and random numbers are those that it would have alone.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any, final

from torch import Tensor, nn

from lightning_pfl.federation.client import Client
from lightning_pfl.federation.client_strategy import ClientInterrupted
from lightning_pfl.federation.jobs import Job, JobResult
from lightning_pfl.federation.pools.base import ClientPool
from lightning_pfl.federation.pools.baton import Runner
from lightning_pfl.federation.pools.held import Held, unequal
from lightning_pfl.federation.pools.isolation import ProcessSettings, Surroundings
from lightning_pfl.federation.pools.local import LocalPool
from lightning_pfl.federation.pools.placement import Demand, Placement
from lightning_pfl.federation.snapshot import Snapshot
from lightning_pfl.federation.turn import run_job
from lightning_pfl.functional.stacking import ImpureLossError, Inventory, Part, hand_over, losses_and_gradients, meeting

__all__ = ["StackedPool"]

_LOG = logging.getLogger(__name__)


@final
class StackedPool(ClientPool):
    """Trains several clients at once in this process, in one pass where their losses are alike.

    A module opts in by calling `stackable` for its loss. Its clients' results equal those of other pools but for
    rounding. What does not opt in is trained as in `LocalPool`, bit for bit, and so is what cannot be stacked (a
    warning says why) and what nobody else asks for at the time: the last, smaller batch of an epoch, the last client.

    Losses are alike if they come from one module as it was given to the Trainer, with the same names, shapes and dtypes
    of tensors and the same shapes of batches. Frozen tensors that have equal values when a client's training begins are
    read from one client for all; every other tensor is stacked.

    All clients at work lie in memory at the same time, each with a copy of the backbone on an accelerator; on a CPU the
    copies are one mapped file.

    Args:
        at_once: how many clients are at work at the same time.
        resources: as for `LocalPool`.

    Example:
        >>> pool = StackedPool(at_once=4)
        >>> pool.start([Client("a"), Client("b")], {})
        >>> list(pool.run([]))
        []
        >>> pool.close()
    """

    def __init__(self, at_once: int = 8, *, resources: Mapping[str, float] | None = None) -> None:
        if at_once < 1:
            raise ValueError(f"`at_once` says how many clients train at the same time, at least 1, but is {at_once}.")
        self._at_once = at_once
        self._local = LocalPool(resources=resources)
        self._snapshots: dict[str, Snapshot] = {}
        self._settings: ProcessSettings | None = None
        self._queue: deque[Job] = deque()
        self._turns: list[_Turn] = []
        self._kinds: dict[Hashable, int] = {}  # of modules, by number
        self._apart: set[Hashable] = set()  # forms that turned out not to be stackable
        self._said: set[tuple[str, str]] = set()

    def look(self, clients: Sequence[Client]) -> Placement:
        """Check that each client fits into this process. See `ClientPool.look`."""
        self._local.look(clients)
        resources = {name for client in clients for name in Demand.of(client).amounts}
        return Placement({"here": dict.fromkeys(resources, inf)}, limit=self._at_once)

    def start(self, clients: Sequence[Client], snapshots: Mapping[str, Snapshot]) -> None:
        """Check that each client fits into this process. See `ClientPool.start`."""
        self.look(clients)
        self._snapshots = dict(snapshots)
        self._settings = ProcessSettings.capture()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue them. See `ClientPool.submit`."""
        if self._settings is None and jobs:
            raise RuntimeError(
                "This `StackedPool` is not running: call `start` before `submit`, and not `close` in between."
            )
        self._queue.extend(jobs)

    def next(self, timeout: float | None = None) -> JobResult | None:
        """Let turns run until one of them has ended. See `ClientPool.next`."""
        if timeout is not None and timeout <= 0:
            return None
        here = Surroundings.capture()
        try:
            while self._queue or self._turns:
                while self._queue and len(self._turns) < self._at_once:
                    self._turns.append(self._turn(self._queue.popleft(), here))
                if all(turn.waits for turn in self._turns):
                    self._match()
                turn = next(turn for turn in self._turns if not turn.waits)
                if turn.runner.run_on():
                    self._turns.remove(turn)
                    result = turn.runner.outcome()
                    turn.held.check()
                    return result
            return None
        except BaseException:  # Ctrl-C, here or in a turn, or SIGTERM: nobody is left waiting
            self._end(self._turns)
            raise
        finally:
            here.restore()

    def cancel(self, client_ids: Collection[str]) -> None:
        """Forget those that have not begun, and end the turns of the others. See `ClientPool.cancel`."""
        self._queue = deque(job for job in self._queue if job.assignment.client_id not in client_ids)
        self._end([turn for turn in self._turns if turn.job.assignment.client_id in client_ids])

    def close(self) -> None:
        """End all turns and forget the snapshots. See `ClientPool.close`."""
        self._queue.clear()
        self._end(self._turns)
        self._snapshots, self._settings = {}, None

    def _turn(self, job: Job, here: Surroundings) -> _Turn:
        settings, snapshot = self._settings, self._snapshots[job.snapshot]
        assert settings is not None

        def run() -> JobResult:
            with (
                settings.turn(seed=job.seed, num_threads=job.num_threads),
                meeting(lambda *asked: self._meet(turn, *asked)),
            ):
                return run_job(snapshot, job)

        turn = _Turn(job, Runner(run, here, ClientInterrupted))
        return turn

    def _end(self, turns: Iterable[_Turn]) -> None:
        with Surroundings.kept():
            for turn in list(turns):
                self._turns.remove(turn)
                turn.runner.stop()

    def _meet(self, turn: _Turn, loss: Callable[..., Tensor], batch: tuple[Any, ...]) -> Tensor:
        """What `stackable` does in a turn's thread."""
        if len(self._turns) == 1:
            return loss(*batch)
        part = Part.of(loss, batch, known=turn.inventory)
        if part.inventory is not turn.inventory:
            key = turn.job.snapshot, part.inventory.form
            turn.inventory, turn.kind = part.inventory, self._kinds.setdefault(key, len(self._kinds))
        if (obstacle := part.obstacle()) is not None:
            self._say(part, obstacle)
            return part.alone()
        turn.held.read(part.inventory.held, [other.held for other in self._turns if other is not turn])
        turn.part, turn.form, turn.waits = part, (turn.kind, part.form()), True
        turn.runner.pause()
        if turn.company:
            self._compute(turn.company)
        answer, turn.part, turn.answer, turn.company = turn.answer, None, None, ()
        return part.alone() if answer is None else hand_over(part, *answer)

    def _match(self) -> None:
        """All turns wait: let those that ask for the same wait for the first of them, and all others go on alone."""
        groups: dict[Hashable, list[_Turn]] = {}
        for turn in self._turns:
            groups.setdefault(turn.form, []).append(turn)
        for form, group in groups.items():
            stacked = len(group) > 1 and form not in self._apart
            group[0].company = group if stacked else ()
            for turn in group[:1] if stacked else group:
                turn.waits = False

    def _compute(self, company: Sequence[_Turn]) -> None:
        """Answer all of them; in the thread of the first, and so under its autocast and with its number of threads."""
        parts = [turn.part for turn in company if turn.part is not None]
        for turn in company:
            turn.waits = False
        try:
            with _mute(parts[0].inventory.module):
                losses, gradients = losses_and_gradients(parts, own=unequal([turn.held for turn in company]))
        except ImpureLossError:
            raise
        except Exception as error:  # each computes it alone, and meets an error of its own if there is one
            self._apart.add(company[0].form)
            self._say(parts[0], str(error))
        else:
            for turn, *answer in zip(company, losses, gradients, strict=True):
                turn.answer = answer[0], answer[1]

    def _say(self, part: Part, reason: str) -> None:
        if (part.name, reason) not in self._said:
            self._said.add((part.name, reason))
            _LOG.warning(
                "`%s` is computed for one client at a time, since %s. What is usually in the way are random numbers "
                "(dropout), statistics of batches, and decisions by the values of tensors.",
                *(part.name, reason.rstrip(".")),
            )


@dataclass(eq=False)
class _Turn:
    """A turn at work.

    Attributes:
        job: what it is.
        runner: its thread.
        waits: whether it waits for others.
        part: what it has asked for; None while it runs.
        form: of the part and its module.
        company: whom it is to answer, with itself the first.
        answer: its loss and gradients; None: it is to compute them itself.
        inventory: of the module that it has asked with last.
        kind: of that module, as a number.
        held: what it holds frozen.
    """

    job: Job
    runner: Runner[JobResult]
    waits: bool = False
    part: Part | None = None
    form: Hashable = None
    company: Sequence[_Turn] = ()
    answer: tuple[Tensor, Sequence[Tensor | None]] | None = None
    inventory: Inventory | None = None
    kind: int = -1
    held: Held = field(default_factory=Held)


@contextmanager
def _mute(module: nn.Module) -> Iterator[None]:
    """Refuse ``self.log``: it would log the numbers of all clients as one's."""

    def log(*_: Any, **__: Any) -> None:
        raise RuntimeError("it calls `self.log`, which belongs behind it, into `training_step`")

    vars(module)["log"] = log
    try:
        yield
    finally:
        del vars(module)["log"]
