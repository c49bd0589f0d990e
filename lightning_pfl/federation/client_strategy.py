"""`ClientStrategy`: what ``trainer.strategy`` is in a client's turn.

A client is a world of its own, rank 0 of 1, on one device. Here its checkpoint is taken from memory and put there, what
the server sent is written over it, and a turn that ends early ends like a preempted job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, final

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from typing_extensions import override

from lightning_pfl.aggregation.memory import dump_flat, load_flat
from lightning_pfl.callbacks.federated import Exchange
from lightning_pfl.federation._compat import Launcher, callbacks_of, leave, place, updated_metrics
from lightning_pfl.federation.frozen import checksums
from lightning_pfl.federation.letters import Terms, layouts_of, read_personalized
from lightning_pfl.federation.privacy import only_where, overlaid
from lightning_pfl.federation.scope import of_clients
from lightning_pfl.federation.segment import SegmentEnd
from lightning_pfl.federation.sharing import exchange_of
from lightning_pfl.types import Personalized, PersonalizedLetter, SharedTensors

__all__ = ["IN", "OUT", "ClientInterrupted", "ClientStrategy", "ModelReady"]

IN, OUT = "client://in", "client://out"
"""Paths that stand for the client's checkpoint in memory."""

_CARRIED = "federated_client"


class ModelReady(Exception):
    """The client's model stands as it would be trained or evaluated, and that was all that was asked for."""


class ClientInterrupted(BaseException):
    """Ctrl-C in a client's turn, on its way past the client's Trainer (which would exit the process)."""


@final
class ClientStrategy(SingleDeviceStrategy):
    """One client on one device.

    Attributes:
        client_id: whose turn it is; user code may read it as ``trainer.strategy.client_id``.
        round: from 0.
        client_ids: of all clients of the run, in the user's order.
        validation: what the last validation inside this turn's fit gave, by the user's names.
        validation_names: names that validation has ever logged.
        saved: the client's checkpoint, once the segment has ended.
        known: what the server has of the client's tensors when the turn starts; None unless it was asked for.
        owed: what the client has held back of the tensors that the server has written over; None: nothing.
    """

    def __init__(
        self,
        *,
        client_ids: Sequence[str],
        share: Sequence[str],
        local_epochs: int | None,
        local_steps: int | None,
        accelerator: Accelerator | None,
        devices: list[torch.device] | None,
        precision: Precision | None,
    ) -> None:
        super().__init__("cpu", accelerator=accelerator, precision_plugin=precision)
        self.client_id: str | None = None
        self.round: int | None = None
        self.client_ids = tuple(client_ids)
        self.share = tuple(share)
        self.local_epochs = local_epochs
        self.local_steps = local_steps
        self.devices = devices
        self.saved: dict[str, Any] | None = None
        self.known: SharedTensors | None = None
        self.owed: SharedTensors | None = None
        self.validation: dict[str, float] = {}
        self.validation_names: set[str] = set()
        self._incoming: Mapping[str, Any] | None = None
        self._sent: Personalized | PersonalizedLetter = Personalized()
        self._terms: Terms | None = None
        self._only_build = False
        self._keeps_known = False
        self._base: dict[str, int] = {}
        self._base_complete = False
        self._before_validation: dict[str, Any] = {}
        self._loop_state: dict[str, Any] = {}

    @property
    def num_clients(self) -> int:
        """How many clients there are in the run."""
        return len(self.client_ids)

    def begin(
        self,
        client_id: str,
        round: int,
        *,
        incoming: Mapping[str, Any] | None,
        personalized: Personalized | PersonalizedLetter,
        base: Mapping[str, int],
        terms: Terms | None = None,
        only_build: bool = False,
        keep_known: bool = False,
    ) -> None:
        """Set up for one turn.

        Args:
            client_id: whose turn.
            round: from 0.
            incoming: the client's checkpoint of its last turn; None in its first.
            personalized: what the server sent.
            base: `checksums` of the module as it came out of the snapshot.
            terms: on which the server writes; None: it sends tensors as they are.
            only_build: raise `ModelReady` as soon as the model stands.
            keep_known: find out what the server has of the client's tensors.
        """
        self.client_id, self.round = client_id, round
        self._incoming, self._only_build = incoming, only_build
        self._sent, self._terms = personalized, terms
        self._base, self._base_complete = dict(base), False
        self._keeps_known = keep_known
        device, self.accelerator, self.precision_plugin = place(self.accelerator, self.precision_plugin, self.devices)
        self._root_device = device
        self._launcher = _ClientLauncher()
        if incoming is not None:
            self.validation_names = set(incoming[_CARRIED]["validation_names"])

    @property
    def carried(self) -> Mapping[str, Any] | None:
        """What the last segment left for the loop beside Lightning's checkpoint."""
        return None if self._incoming is None else cast(Mapping[str, Any], self._incoming[_CARRIED]["loop"])

    def exchange_of(self, callbacks: Sequence[L.Callback]) -> Exchange:
        """What shares tensors: these callbacks and the names in `share`."""
        return exchange_of(callbacks, self.share)

    def save_with(self, carried: dict[str, Any]) -> None:
        """Take the client's checkpoint, with what the loop carries along."""
        self._loop_state = carried
        self._trainer.save_checkpoint(OUT, weights_only=False)

    @override
    def setup_environment(self) -> None:
        # by now callbacks that the module itself configures have joined: those of the server run on the server
        callbacks = callbacks_of(self._trainer)
        callbacks[:] = of_clients(callbacks)
        super().setup_environment()

    @override
    def setup(self, trainer: L.Trainer) -> None:
        self._remember_base()
        exchange = self.exchange_of(callbacks_of(trainer))
        personalized = self._opened(exchange)
        if personalized.frozen is not None or personalized.start is not None:
            exchange.receive(self._module, personalized)
        if self._only_build:
            raise ModelReady
        if self._keeps_known:
            self.known = self._what_the_server_has(exchange, personalized)
        super().setup(trainer)

    def sent(self, shared: SharedTensors, held_back: SharedTensors | None = None) -> None:
        """Keep what is sent in the client's checkpoint, as the next turn's step sets out from it.

        Args:
            shared: as the server reads it.
            held_back: what it lacks of what the client had to send; None: nothing.
        """
        carried = self.saved if self.saved is not None else self._incoming
        if carried is None or (self.saved is None and held_back is None):
            return
        for name, tensors in {"sent": shared, "held_back": held_back}.items():
            if tensors is not None:
                carried[_CARRIED][name] = [dump_flat(tensors.common), dump_flat(tensors.same_architecture)]

    def _opened(self, exchange: Exchange) -> Personalized:
        """What the server sent, read."""
        if not isinstance(self._sent, PersonalizedLetter):
            return self._sent
        assert self._terms is not None
        return read_personalized(self._sent, self._terms.wire, layouts=layouts_of(exchange.upload(self._module)))

    def _what_the_server_has(self, exchange: Exchange, personalized: Personalized) -> SharedTensors:
        """What the client has sent last, or how its model starts, with what the server has sent since over it."""
        carried: Mapping[str, Any] = {} if self._incoming is None else self._incoming[_CARRIED]
        if "sent" not in carried:
            return exchange.upload(self._module)
        if "held_back" in carried and personalized.start is not None:  # elsewhere the model itself still has it
            self.owed = only_where(_loaded(carried["held_back"]), personalized.start)
        return overlaid(_loaded(carried["sent"]), personalized.start)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if checkpoint_path == IN:
            assert self._incoming is not None
            return dict(self._incoming)
        return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._remember_base()
        left_out = self._check_base(checkpoint)
        own = self._module.state_dict()
        state = dict(checkpoint["state_dict"])
        for name in [name for name, value in state.items() if name in own and _is_same(value, own[name])]:
            del state[name]  # a hook has filled it in; copying a tensor onto itself would unshare its memory
            left_out.add(name)
        missing, unexpected = self._module.load_state_dict(state, strict=False)
        missing = [name for name in missing if name not in left_out]
        if strict and (missing or unexpected):
            raise RuntimeError(
                f"The model of client `{self.client_id}` is not the one of its last turn: it has {missing[:5]} "
                f"that the client's state has not, and lacks {list(unexpected)[:5]}. `configure_model` and "
                "`setup` must build the same layers in every turn."
            )

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if filepath != OUT:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        live = self._module.state_dict()
        now = checksums(self._module)
        left_out = {}
        for name, before in self._base.items():
            kept = checkpoint["state_dict"].get(name)
            if now.get(name) == before and kept is not None and _is_same(kept, live[name]):
                del checkpoint["state_dict"][name]
                left_out[name] = before
        for key in [key for key in checkpoint if "hparams" in key or "hyper_parameters" in key]:
            del checkpoint[key]  # the module has them, and they may hold anything
        checkpoint[_CARRIED] = {
            "loop": self._loop_state,
            "left_out": left_out,
            "validation_names": sorted(self.validation_names),
        }
        self.saved = checkpoint

    @override
    def on_validation_start(self) -> None:
        self._before_validation = dict(self._trainer.callback_metrics)

    @override
    def on_validation_end(self) -> None:
        if not self._trainer.sanity_checking:
            metrics = updated_metrics(self._trainer, self._before_validation)
            self.validation = {name: float(value) for name, value in metrics.items()}
            self.validation_names |= self.validation.keys()

    @property
    def _module(self) -> L.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _trainer(self) -> L.Trainer:
        return self._module.trainer

    def _remember_base(self) -> None:
        if not self._base_complete:  # `setup` and `configure_model` may have built more than there was
            self._base = {**self._base, **checksums(self._module, known=self._base)}
            self._base_complete = True

    def _check_base(self, checkpoint: Mapping[str, Any]) -> set[str]:
        left_out: Mapping[str, int] = checkpoint.get(_CARRIED, {}).get("left_out", {})
        changed = [name for name, value in left_out.items() if self._base.get(name) != value]
        if changed:
            raise RuntimeError(
                f"The frozen part of client `{self.client_id}`'s model is not what it was in its last turn: "
                f"{changed[:5]}. `configure_model` and `setup` must build the same frozen weights in every turn: load "
                "them from a file, or seed them."
            )
        return set(left_out)


def _loaded(entries: Sequence[Mapping[str, Any]]) -> SharedTensors:
    return SharedTensors(*(load_flat(entry) for entry in entries))


def _is_same(one: object, other: object) -> bool:
    """Whether two tensors are the same memory."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    return one.numel() > 0 and one.data_ptr() == other.data_ptr()


@final
class _ClientLauncher(Launcher):
    """Runs in this process, and knows the two ways in which a turn ends before its fit does."""

    @property
    def is_interactive_compatible(self) -> bool:
        """Nothing is started."""
        return True

    def launch(self, function: Callable[..., Any], *args: Any, trainer: L.Trainer | None = None, **kwargs: Any) -> Any:
        """Run the Trainer's own function."""
        assert trainer is not None
        try:
            return function(*args, **kwargs)
        except (SegmentEnd, ModelReady):
            leave(trainer)
            return None
        except KeyboardInterrupt as error:
            raise ClientInterrupted from error

    def kill(self, signum: Any) -> None:
        """There is nothing to kill."""
