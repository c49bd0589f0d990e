"""`ServerState`: all that a federation knows between rounds, and therefore all that a checkpoint of it must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakValueDictionary

from torch import Tensor

from lightning_pfl.aggregation import Aggregator
from lightning_pfl.aggregation.memory import dump_flat, load_flat
from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.federation.fingerprint import Fingerprint
from lightning_pfl.federation.history import LeftOut, RelevanceRecord, RoundTraffic, Traffic
from lightning_pfl.federation.ledgers import Ledgers
from lightning_pfl.federation.post import Post, dump_letter, load_letter
from lightning_pfl.federation.privacy import Privacy
from lightning_pfl.federation.round_log import RoundLog
from lightning_pfl.federation.store import ClientStore
from lightning_pfl.functional.wire import WireFormat
from lightning_pfl.types import Aggregation, FlatTensors, Layout, Personalized, PersonalizedLetter, SharedTensors

__all__ = ["KnownExpert", "ServerState"]

_VERSION = 4
_READABLE = (3, 4)  # 3 had the bytes of all rounds in one list


@dataclass(frozen=True, eq=False)
class KnownExpert:
    """What the server can hand out of a client that gathers keys: what it has last sent, and counted.

    Attributes:
        keys: as in `ClientUpdate`.
        common: what it has trained of the tensors for everybody.
    """

    keys: Tensor
    common: FlatTensors


@final
class ServerState:
    """What the server knows.

    Args:
        client_ids: of the run, in order.
        store: the clients' private states.
        privacy: what is noised; None: nothing.
        wire: in which format clients and server write to each other; None: in none.

    Attributes:
        aggregator: what the aggregator remembers.
        personalized: what each known client receives next, as it travels.
        newcomer: what a client receives that has never sent anything.
        relevance: one record per round, the newest in memory.
        left_out: whose turns did not count, in order.
        measures: sizes of updates so far, for the guard.
        layouts: what each client shares whose model is not known on the driver, as it was first accepted.
        sketch_size: numbers in a sketch; None while nobody has sent any.
        experts: of the clients that gather keys of their questions.
        traffic: per client, bytes so far.
        ledgers: what clients have told with noise.
        post: what has been written to and by clients.
    """

    def __init__(
        self,
        client_ids: Sequence[str],
        store: ClientStore,
        privacy: Privacy | None = None,
        wire: WireFormat | None = None,
    ) -> None:
        self.client_ids = tuple(client_ids)
        self.store = store
        self.aggregator: Mapping[str, Any] = {}
        self.personalized: dict[str, Personalized | PersonalizedLetter] = {}
        self.newcomer: Personalized | PersonalizedLetter = Personalized()
        self.relevance = RoundLog("relevance", RelevanceRecord.load, store.blobs)
        self.left_out: list[LeftOut] = []
        self.measures: Mapping[str, Sequence[float]] = {}
        self.layouts: dict[str, tuple[str, Layout, Layout]] = {}
        self.sketch_size: int | None = None
        self.experts: dict[str, KnownExpert] = {}
        self.traffic = {client_id: Traffic() for client_id in self.client_ids}
        self.ledgers = Ledgers(privacy)
        self.post = Post(wire)
        # weakly, or the server would keep, for each client that sits out, the tensors that it received last
        self._received: WeakValueDictionary[str, Personalized | PersonalizedLetter] = WeakValueDictionary()
        self._closed = RoundLog("traffic", RoundTraffic.load, store.blobs)
        self._open: tuple[int, dict[str, Traffic]] = (0, {})
        self._total = Traffic()

    @property
    def traffic_by_round(self) -> list[RoundTraffic]:
        """What travelled in each round in which something did, in order; older ones are read from the blobs."""
        return [*self._closed, RoundTraffic.of(*self._open)] if self._open[1] else list(self._closed)

    @property
    def bytes_so_far(self) -> tuple[int, int]:
        """Up and down, with all clients together."""
        return self._total.up, self._total.down

    def count(self, round: int, client_id: str, traffic: Traffic) -> None:
        """Count bytes that have travelled."""
        if round != self._open[0]:
            if self._open[1]:
                self._closed.append(RoundTraffic.of(*self._open))
            self._open = (round, {})
        self.traffic[client_id] += traffic
        self._total += traffic
        self._open[1][client_id] = self._open[1].get(client_id, Traffic()) + traffic

    def settle(self) -> None:
        """Move what is known of older rounds out of memory.

        Raises:
            OSError: it cannot be written. Nothing is lost then.
        """
        self.relevance.settle()
        self._closed.settle()

    def next_for(self, client_id: str, *, round: int | None) -> Personalized | PersonalizedLetter:
        """What a client receives in its next turn, counted as traffic of a round once; None: it is not."""
        personalized = self.personalized.get(client_id, self.newcomer)
        if round is not None and self._received.get(client_id) is not personalized:
            self._received[client_id] = personalized
            self.count(round, client_id, Traffic(down=personalized.nbytes))
        return personalized

    def accept(self, round: int, aggregation: Aggregation) -> RelevanceRecord:
        """Take over a round's aggregation."""
        self.aggregator = aggregation.state
        self.personalized = self.post.all_sealed(aggregation.personalized)
        self.newcomer = self.post.sealed(None, aggregation.newcomer)
        record = RelevanceRecord.of(round, aggregation)
        self.relevance.append(record)
        return record

    def state_dict(self, aggregator: Aggregator, fingerprints: Mapping[str, Fingerprint]) -> dict[str, Any]:
        """Plain containers that load with ``weights_only=True``."""
        return {
            "version": _VERSION,
            "client_ids": list(self.client_ids),
            "models": {name: fingerprint.dump() for name, fingerprint in fingerprints.items()},
            "rule": type(aggregator).__name__,
            "aggregator": dict(self.aggregator),
            "personalized": {client_id: _dump(one) for client_id, one in self.personalized.items()},
            "newcomer": _dump(self.newcomer),
            "received": sorted(
                client_id
                for client_id, one in self._received.items()
                if one is self.personalized.get(client_id, self.newcomer)
            ),
            "relevance": self.relevance.state_dict(),
            "left_out": [[one.round, one.client_id, one.reason] for one in self.left_out],
            "measures": {name: list(sizes) for name, sizes in self.measures.items()},
            "layouts": {client_id: _dump_layouts(*known) for client_id, known in self.layouts.items()},
            "sketch_size": self.sketch_size,
            "experts": {
                client_id: {"keys": one.keys, "common": dump_flat(one.common)}
                for client_id, one in self.experts.items()
            },
            "traffic": {client_id: [one.up, one.down] for client_id, one in self.traffic.items()},
            "traffic_by_round": self._closed.state_dict(),
            "traffic_of_round": RoundTraffic.of(*self._open).dump(),
            "post": self.post.state_dict(),
            "privacy": self.ledgers.state_dict(),
            "store": self.store.state_dict(),
        }

    def load_state_dict(
        self, saved: Mapping[str, Any], aggregator: Aggregator | None, fingerprints: Mapping[str, Fingerprint]
    ) -> None:
        """Go back to a checkpoint.

        Args:
            saved: from `state_dict`.
            aggregator: what shall go on with it; None when nothing is trained.
            fingerprints: of the run's models.

        Raises:
            CheckpointMismatchError: it belongs to other clients, other models or another aggregator. Nothing has
                changed then.
        """
        self._check(saved, aggregator, fingerprints)
        self.store.load_state_dict(saved["store"])
        self.aggregator = saved["aggregator"]
        self.personalized = {client_id: _load(entry) for client_id, entry in saved["personalized"].items()}
        self.newcomer = _load(saved["newcomer"])
        self._received = WeakValueDictionary(
            {client_id: self.personalized.get(client_id, self.newcomer) for client_id in saved["received"]}
        )
        self.relevance.load_state_dict(saved["relevance"])
        self.left_out = [LeftOut(*entry) for entry in saved["left_out"]]
        self.measures = saved["measures"]
        self.layouts = {client_id: _load_layouts(entry) for client_id, entry in saved["layouts"].items()}
        self.sketch_size = saved["sketch_size"]
        self.experts = {
            client_id: KnownExpert(entry["keys"], load_flat(entry["common"]))
            for client_id, entry in saved.get("experts", {}).items()
        }
        self.traffic = {client_id: Traffic(*numbers) for client_id, numbers in saved["traffic"].items()}
        self._total = sum(self.traffic.values(), Traffic())
        closed, last = _closed_and_open(saved)
        self._closed.load_state_dict(closed)
        self._open = last.round, last.by_client
        self.ledgers.load_state_dict(saved.get("privacy", {}))
        self.post.load_state_dict(saved.get("post", {}))

    def _check(
        self, saved: Mapping[str, Any], aggregator: Aggregator | None, fingerprints: Mapping[str, Fingerprint]
    ) -> None:
        if saved.get("version") not in _READABLE:
            raise CheckpointMismatchError(
                f"The checkpoint's federated part has version {saved.get('version')!r}, but this release reads "
                f"{' and '.join(map(str, _READABLE))}. Resume with the release that wrote it."
            )
        theirs = tuple(saved["client_ids"])
        if theirs != self.client_ids:
            only_there = sorted(set(theirs) - set(self.client_ids))
            only_here = sorted(set(self.client_ids) - set(theirs))
            difference = (
                f"it has {only_there[:5]} and lacks {only_here[:5]}"
                if only_there or only_here
                else "they are the same, but in another order, which decides who takes part in a round"
            )
            raise CheckpointMismatchError(
                f"The checkpoint belongs to {len(theirs)} clients and this run has {len(self.client_ids)}: "
                f"{difference}. Give `FederatedStrategy(clients=...)` the clients of the run that wrote it."
            )
        if aggregator is not None and saved["aggregator"] and saved["rule"] != type(aggregator).__name__:
            raise CheckpointMismatchError(
                f"The checkpoint was written with `{saved['rule']}`, and `{type(aggregator).__name__}` cannot "
                "go on with what that remembers. Resume with the aggregator that the run was started with."
            )
        if aggregator is not None:
            self.ledgers.check(saved.get("privacy", {}), started=bool(saved["aggregator"]))
        self.post.check(saved.get("post", {}))
        for name, fingerprint in fingerprints.items():
            there = saved["models"].get(name)
            if there is None:
                what = "all: that run had no such model"
            elif (found := fingerprint.difference(Fingerprint.load(there))) is not None:
                what = found
            else:
                continue
            raise CheckpointMismatchError(
                f"The checkpoint does not fit {name}: it differs in {what}. Resume with the model and the "
                "adapters (rank, target modules, number of blocks) of the run that wrote it."
            )


def _closed_and_open(saved: Mapping[str, Any]) -> tuple[Mapping[str, Any], RoundTraffic]:
    """The log of rounds that are over, as it is saved, and what has travelled in the one after."""
    if saved["version"] == 4:
        return saved["traffic_by_round"], RoundTraffic.load(saved["traffic_of_round"])
    rounds = saved.get("traffic_by_round", [])
    last = RoundTraffic.load(rounds[-1]) if rounds else RoundTraffic.of(0, {})
    return {"blocks": [], "held": {}, "newest": rounds[:-1]}, last


def _dump_layouts(architecture: str, *layouts: Layout) -> list[Any]:
    return [architecture, *([list(one.names), [list(shape) for shape in one.shapes]] for one in layouts)]


def _load_layouts(entry: Sequence[Any]) -> tuple[str, Layout, Layout]:
    common, bound = (Layout(tuple(names), tuple(tuple(shape) for shape in shapes)) for names, shapes in entry[1:])
    return entry[0], common, bound


def _dump(personalized: Personalized | PersonalizedLetter) -> dict[str, Any]:
    if isinstance(personalized, PersonalizedLetter):
        return dump_letter(personalized)
    parts = {"frozen": personalized.frozen, "start": personalized.start}
    return {
        name: None
        if part is None
        else {"common": dump_flat(part.common), "same_architecture": dump_flat(part.same_architecture)}
        for name, part in parts.items()
    }


def _load(entry: Mapping[str, Any]) -> Personalized | PersonalizedLetter:
    if "letters" in entry:
        return load_letter(entry)
    parts = {
        name: None if part is None else SharedTensors(load_flat(part["common"]), load_flat(part["same_architecture"]))
        for name, part in entry.items()
    }
    return Personalized(**parts)
