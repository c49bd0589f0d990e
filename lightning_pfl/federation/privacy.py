"""`Privacy`: what noise hides in what clients send, and how much all of it together may tell.

A user hands a `Privacy` to the strategy. `Permit` is what a client's turn gets of it, `release` what the turn does with
it before anything leaves, and `charged` how server and client come to the same account from what is sent.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import lightning as L

from lightning_pfl.callbacks.federated import KeySource, SketchSource
from lightning_pfl.errors import PrivacyBudgetError
from lightning_pfl.functional.accounting import Account, Ledger, PrivacyBudget
from lightning_pfl.functional.mechanisms import (
    NoiseStream,
    SketchBound,
    SketchNoise,
    UpdateNoise,
    noised_sketch,
    noised_update,
)
from lightning_pfl.types import ClientUpdate, FlatTensors, SharedTensors

__all__ = [
    "Permit",
    "Privacy",
    "charged",
    "only_where",
    "overlaid",
    "prepare_privacy",
    "release",
    "require_room",
    "require_within",
]

_LOG = logging.getLogger(__name__)


@final
@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What noise hides in what clients send, and how much all of it together may tell. See the page "Privacy".

    Every client adds its noise itself, once per round, from a key that is drawn at random and kept with its private
    state; noise of a turn that is run again on the same data is the same. Each client has one account for all that it
    sends with noise. A release that would exceed the budget is not sent: the run ends with `PrivacyBudgetError`.

    Args:
        budget: of each client, for the whole run.
        sketches: whom the noise on relevance sketches hides, `ExampleNoise` or `ClientNoise`. None: no noise there, and
            the account says nothing of sketches.
        updates: bound and noise of what clients train and share. None: no noise there, and the account says nothing of
            it.
        seed: None: secret keys. A number makes keys that anyone can make who knows it: for simulations that shall be
            repeated, and never for real data.

    Raises:
        ValueError: a budget, but nothing is noised.
        TypeError: an argument of another type.

    Example:
        >>> from lightning_pfl.functional.mechanisms import ExampleNoise
        >>> budget = PrivacyBudget(epsilon=8, delta=1e-5)
        >>> privacy = Privacy(budget=budget, sketches=ExampleNoise(budget.noise_multiplier(releases=20)))
        >>> privacy.unit
        'one example'
    """

    budget: PrivacyBudget
    sketches: SketchNoise | None = None
    updates: UpdateNoise | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("budget", PrivacyBudget), ("sketches", SketchNoise), ("updates", UpdateNoise)):
            value = getattr(self, name)
            if not isinstance(value, kind) and not (value is None and name != "budget"):
                raise TypeError(f"`Privacy({name}=...)` must be a {kind.__name__}, but is {value!r}.")
        if self.sketches is None and self.updates is None:
            raise ValueError(
                "A privacy budget bounds what noisy releases tell, but nothing is noised, so no budget could hold. Say "
                "what is: `Privacy(budget=..., sketches=ExampleNoise(...))`, `updates=UpdateNoise(...)`, or both."
            )

    @property
    def multipliers(self) -> dict[str, float]:
        """The noise multiplier of each kind of release."""
        kinds = {"sketch": self.sketches, "update": self.updates}
        return {name: noise.multiplier for name, noise in kinds.items() if noise is not None}

    @property
    def unit(self) -> str:
        """Whom all releases together hide: one example if one of them hides no more, else a client."""
        units = {noise.unit for noise in (self.sketches, self.updates) if noise is not None}
        return "one example" if "one example" in units else units.pop()

    def key(self, client_id: str, secret: bytes) -> bytes:
        """A client's key: its secret, unless the keys come from a seed."""
        return secret if self.seed is None else hashlib.sha256(f"{self.seed} {client_id}".encode()).digest()


@dataclass(frozen=True, eq=False)
class Permit:
    """What a client's turn needs to send something with noise. Private to the client, as its state is.

    Attributes:
        privacy: of the run.
        key: secret; see `gaussian_noise`.
        ledger: of all that the client has sent before.
    """

    privacy: Privacy
    key: bytes = field(repr=False)
    ledger: Ledger


def release(
    update: ClientUpdate, permit: Permit, *, known: SharedTensors | None, bound: SketchBound | None, trained: bool
) -> ClientUpdate:
    """What a client sends instead of what it has. What it costs is checked when it is written (`require_within`).

    Args:
        update: as it would be sent without noise.
        permit: of the client.
        known: what the server has of the client's tensors; read where updates are noised.
        bound: of the sketch's examples.
        trained: whether the client did anything in this turn. If it had stopped before, it sends again what the server
            has of it, which takes no noise.

    Returns:
        The update with noise.

    Raises:
        ValueError: what is to be hidden cannot be bounded.
    """
    privacy, stream = permit.privacy, NoiseStream(permit.key, update.client_id, update.round)
    sketch, shared = update.sketch, update.shared
    if privacy.sketches is not None and sketch is not None:
        sketch = noised_sketch(sketch, privacy.sketches, stream, bound=bound)
    if privacy.updates is not None:
        assert known is not None
        shared = noised_update(shared, known, privacy.updates, stream) if trained else known
    return replace(update, sketch=sketch, shared=shared)


def require_within(update: ClientUpdate, permit: Permit) -> None:
    """Check what a client is about to send, as the server will read it, against its budget.

    Raises:
        PrivacyBudgetError: it would exceed the budget.
    """
    after = charged(permit.ledger, update, permit.privacy)
    _require_within(permit.ledger, after, update.client_id, update.round, permit.privacy)


def charged(ledger: Ledger, update: ClientUpdate, privacy: Privacy) -> Ledger:
    """A client's ledger after an update; the same ledger if it is what was sent last, once more."""
    releases = {}
    if privacy.sketches is not None and update.sketch is not None:
        releases[_digest("sketch", [update.sketch.numpy().tobytes()])] = privacy.sketches.multiplier
    if privacy.updates is not None:
        vectors = (update.shared.common.vector, update.shared.same_architecture.vector)
        releases[_digest("update", [vector.numpy().tobytes() for vector in vectors])] = privacy.updates.multiplier
    return ledger.after(releases, round=update.round)


def require_room(ledger: Ledger, privacy: Privacy, client_id: str, round: int) -> None:
    """Check before a turn that the client may send what the turn will give.

    A client that has sent something for this round already passes: its turn is run again, and may give the same bytes.

    Raises:
        PrivacyBudgetError: it may not.
    """
    if ledger.round == round:
        return
    after = ledger.account
    for multiplier in privacy.multipliers.values():
        after = after.add(multiplier)
    _require_within(ledger, Ledger(after), client_id, round, privacy)


def prepare_privacy(privacy: Privacy | None, callbacks: Sequence[L.Callback], rounds: int | None) -> None:
    """Check before anything runs that what is to be hidden is there and can be bounded; say what is hidden.

    Args:
        privacy: of the run; None: none.
        callbacks: the clients'.
        rounds: how many there will be at most, if that is known.

    Raises:
        ValueError: noise on sketches that nobody makes, or that cannot be bounded; keys of questions, which have none.
    """
    sources = [callback for callback in callbacks if isinstance(callback, SketchSource)]
    for source in sources:
        source.prepare_noise(None if privacy is None else privacy.sketches)
    if privacy is None:
        _LOG.info(
            "Clients send what they have without noise. `FederatedStrategy(privacy=...)` hides examples or clients."
        )
        return
    if keyed := [type(callback).__name__ for callback in callbacks if isinstance(callback, KeySource)]:
        raise ValueError(
            f"`{keyed[0]}` tells all clients what a client's questions look like, and no noise hides that, so the run "
            "would tell more than `privacy=` says. Leave one of them out."
        )
    if privacy.sketches is not None and not sources:
        raise ValueError(
            f"`Privacy(sketches={type(privacy.sketches).__name__}(...))` noises sketches, but no callback makes any. "
            "Add `RelevanceProbe(...)` to `Trainer(callbacks=...)`, or leave `sketches` out."
        )
    plain = [] if privacy.sketches is not None or not sources else ["relevance sketches"]
    plain += [] if privacy.updates is not None else ["adapters and other shared tensors"]
    _LOG.info(
        "Noise hides %s in %s, within epsilon %g at delta %g for each client. Without noise are sent: %s.",
        privacy.unit,
        " and ".join({"sketch": "sketches", "update": "updates"}[name] for name in privacy.multipliers),
        privacy.budget.epsilon,
        privacy.budget.delta,
        ", ".join([*plain, "metrics, logs, numbers of examples"]),
    )
    if privacy.seed is not None:
        _LOG.warning(
            "`Privacy(seed=%d)`: whoever knows the seed can take the noise off. For simulations only.", privacy.seed
        )
    if (lasts := _rounds_within(privacy, rounds)) is not None:
        _LOG.warning(
            "A client that takes part in every round has used up its privacy budget after %d of %d, and the run ends "
            "there. For all rounds, take `PrivacyBudget.noise_multiplier(releases=...)`.",
            lasts,
            rounds,
        )


def overlaid(below: SharedTensors, above: SharedTensors | None) -> SharedTensors:
    """Shared tensors with some of them replaced; what is only above is left out.

    Example:
        >>> import torch
        >>> below = SharedTensors(FlatTensors.pack({"P": torch.zeros(1), "Q": torch.zeros(1)}))
        >>> overlaid(below, SharedTensors(FlatTensors.pack({"Q": torch.ones(1)}))).common.vector
        tensor([0., 1.])
    """
    if above is None:
        return below
    return SharedTensors(
        _overlaid(below.common, above.common), _overlaid(below.same_architecture, above.same_architecture)
    )


def only_where(shared: SharedTensors, given: SharedTensors) -> SharedTensors:
    """Shared tensors with zeros in place of those that are not given.

    Example:
        >>> import torch
        >>> shared = SharedTensors(FlatTensors.pack({"P": torch.ones(1), "Q": torch.ones(1)}))
        >>> only_where(shared, SharedTensors(FlatTensors.pack({"Q": torch.zeros(1)}))).common.vector
        tensor([0., 1.])
    """
    return SharedTensors(
        _only_where(shared.common, given.common), _only_where(shared.same_architecture, given.same_architecture)
    )


def _only_where(flat: FlatTensors, given: FlatTensors) -> FlatTensors:
    names = set(given.layout.names)
    return FlatTensors.pack({name: value if name in names else value * 0 for name, value in flat.unpack().items()})


def _overlaid(below: FlatTensors, above: FlatTensors) -> FlatTensors:
    new = above.unpack()
    return FlatTensors.pack({name: new.get(name, value) for name, value in below.unpack().items()})


def _digest(kind: str, parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _require_within(before: Ledger, after: Ledger, client_id: str, round: int, privacy: Privacy) -> None:
    budget = privacy.budget
    if after is before or budget.allows(after.account):
        return
    raise PrivacyBudgetError(
        client_id,
        round,
        spent=before.account.epsilon(budget.delta),
        needed=after.account.epsilon(budget.delta),
        epsilon=budget.epsilon,
        delta=budget.delta,
    )


def _rounds_within(privacy: Privacy, rounds: int | None) -> int | None:
    """After how many rounds the budget is used up, if that is before the end; None if it is not."""

    def allowed(count: int) -> bool:
        account = Account()
        for multiplier in privacy.multipliers.values():
            account = account.add(multiplier, times=count)
        return privacy.budget.allows(account)

    if rounds is None or rounds < 1 or allowed(rounds):
        return None
    low, high = 0, rounds  # allowed, not allowed
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low
