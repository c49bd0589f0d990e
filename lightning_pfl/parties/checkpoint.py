"""A party's Lightning checkpoint, read and written without the module and the Trainer that made it.

Start at `PartyCheckpoint`. It is the party's whole memory between rounds: beside what Lightning keeps there, it says up
to which of the server's messages the party has come. Nothing in the file is run: it is loaded with ``weights_only``.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import fsspec
import torch
from torch import Tensor

from lightning_pfl.adapters import CoLoraConfig
from lightning_pfl.adapters.saved import is_aligned, shared_in, with_global, with_local
from lightning_pfl.callbacks.checkpoints import KEY, saved_config
from lightning_pfl.documents import FIT_FOR_A_PATH, SHA256, Schema
from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.parties.mailbox import write_whole
from lightning_pfl.parties.messages import Base
from lightning_pfl.parties.roster import Roster
from lightning_pfl.types import Personalized, SharedTensors

__all__ = ["PartyCheckpoint", "Place"]

_PLACE = "party"
_CALLBACK, _PROBE = "CoLoRA", "RelevanceProbe"  # their keys among the callbacks' states
_SCHEMA = Schema(
    "What a checkpoint says of a party's place in a run",
    {
        "type": "object",
        "required": ["run", "party", "round", "previous", "step"],
        "additionalProperties": False,
        "properties": {
            "run": {"type": "string", "pattern": FIT_FOR_A_PATH},
            "party": {"type": "string", "pattern": FIT_FOR_A_PATH},
            "round": {"type": "integer", "minimum": 0},
            "previous": SHA256,
            "step": {"type": "integer", "minimum": 0},
        },
    },
)


@final
@dataclass(frozen=True)
class Place:
    """How far a party has come in a run.

    Attributes:
        run: name of the run.
        party: who it is.
        round: of its next update.
        previous: digest of the server's last message that it knows, or of the roster.
        step: optimizer steps it had done when it took that message in; -1 at the beginning.
    """

    run: str
    party: str
    round: int
    previous: str
    step: int = -1

    @staticmethod
    def at_start(roster: Roster, party: str) -> Place:
        """Before the first round."""
        return Place(roster.run, party, 0, roster.digest)


@final
@dataclass(frozen=True, eq=False)
class PartyCheckpoint:
    """A checkpoint of a Trainer with `CoLoRA`.

    Attributes:
        content: as Lightning wrote it.
        config: of its adapters.
        where: its file, for messages.
    """

    content: Mapping[str, Any]
    config: CoLoraConfig
    where: str

    @staticmethod
    def read(url: str | os.PathLike[str]) -> PartyCheckpoint:
        """Load a checkpoint; any fsspec URL.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it cannot be read, would run code, or holds no adapters.
            CheckpointMismatchError: its adapters are described in a newer format.
        """
        where = os.fspath(url)
        with fsspec.open(where, "rb") as file:
            content = _loaded(file.read(), where)
        about = content.get(KEY)
        if not isinstance(about, dict):
            raise ValueError(
                f"`{where}` says of no Co-LoRA adapters. It must be a checkpoint of a Trainer that has `CoLoRA(...)` "
                "among its callbacks."
            )
        return PartyCheckpoint(content, saved_config(about), where)

    def write(self, url: str | os.PathLike[str]) -> None:
        """Write the checkpoint, so that a reader sees all of it or what was there before; any fsspec URL."""
        stream = io.BytesIO()
        torch.save(dict(self.content), stream)
        files, path = fsspec.core.url_to_fs(os.fspath(url))
        write_whole(files, path, stream.getvalue())

    @property
    def architecture(self) -> str:
        """As in `ClientUpdate`."""
        architecture: str = self.content[KEY]["architecture"]  # `saved_config` has looked at it
        return architecture

    @property
    def base(self) -> Base:
        """What its adapters stand on."""
        shared = self.shared().common.layout
        ranks = {
            name.removesuffix("/P"): shape[0]
            for name, shape in zip(shared.names, shared.shapes, strict=True)
            if name.endswith("/P") and shape
        }
        aligned = is_aligned(self._state, self.config)
        return Base(self.config.base_identity or "", self.config.base_model_name_or_path, aligned, ranks)

    @property
    def step(self) -> int:
        """How many optimizer steps it has done."""
        step = self.content.get("global_step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"`{self.where}` must say how many steps were done, but its `global_step` is {step!r}.")
        return step

    def place(self, roster: Roster, party: str) -> Place:
        """How far the party has come.

        Raises:
            CheckpointMismatchError: the checkpoint is of another run or party.
        """
        entry = self._callback(_CALLBACK).get("passed_on", {}).get(_PLACE)
        if entry is None:
            return Place.at_start(roster, party)
        _SCHEMA.check(entry, self.where)
        for name, expected in (("run", roster.run), ("party", party)):
            if entry[name] != expected:
                raise CheckpointMismatchError(
                    f"`{self.where}` is of {name} `{entry[name]}`, but is asked for as {name} `{expected}`. Use that "
                    f"{name}'s own checkpoint."
                )
        return Place(**entry)

    def shared(self) -> SharedTensors:
        """What the party trained and may share."""
        return shared_in(self._state, self.config)

    def sketch(self) -> Tensor | None:
        """The mean of what a `RelevanceProbe` has sketched since the last message was taken in; None without one."""
        state = self._callback(_PROBE)
        total, count = state.get("total"), state.get("count")
        if total is None:
            return None
        if not isinstance(total, Tensor) or not isinstance(count, int) or count < 1:
            raise ValueError(f"`{self.where}` holds a state of `{_PROBE}` that cannot be read.")
        return (total / count).to(torch.float32).cpu()

    def following(self, place: Place, personalized: Personalized) -> PartyCheckpoint:
        """The checkpoint with what the server sent in it, from which the next fit goes on.

        Args:
            place: where the party then is.
            personalized: what the server sent. Optimizer states, schedules and the gate stay as they are.

        Raises:
            ValueError: it does not fit the checkpoint's adapters.
        """
        state = dict(self._state)
        if personalized.frozen is not None:
            if not self.config.global_branch:
                raise ValueError(
                    f"The server sends a frozen global adapter, but the adapters in `{self.where}` were trained alone, "
                    "at full scale and without a gate. Train with `CoLoRA(..., global_branch=True)` from the start."
                )
            state = with_global(state, self.config, personalized.frozen)
        if personalized.start is not None:
            state = with_local(state, self.config, personalized.start)
        callbacks = dict(self.content.get("callbacks", {}))
        callbacks[_CALLBACK] = {**self._callback(_CALLBACK), "passed_on": {_PLACE: vars(place)}}
        if probe := self._callback(_PROBE):  # what was sent must not count again
            callbacks[_PROBE] = {**probe, "total": None, "count": 0}
        return replace(self, content={**self.content, self._state_key: state, "callbacks": callbacks})

    @property
    def _state_key(self) -> str:
        """Lightning's WeightAveraging saves the average under the usual name and the weights in training beside it."""
        return "current_model_state" if "current_model_state" in self.content else "state_dict"

    @property
    def _state(self) -> Mapping[str, Any]:
        state = self.content.get(self._state_key)
        if not isinstance(state, Mapping):
            raise ValueError(f"`{self.where}` must hold the module's tensors under `{self._state_key}`, but does not.")
        return state

    def _callback(self, name: str) -> Mapping[str, Any]:
        callbacks = self.content.get("callbacks", {})
        state = callbacks.get(name, {}) if isinstance(callbacks, Mapping) else None
        if not isinstance(state, Mapping) or not isinstance(state.get("passed_on", {}), Mapping):
            raise ValueError(f"`{self.where}` holds a state of the callback `{name}` that cannot be read.")
        return state


def _loaded(content: bytes, where: str) -> Mapping[str, Any]:
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`{where}` must be a checkpoint of tensors and plain values, but cannot be loaded as one: it is damaged, "
            f"or loading it would run code. {str(error).splitlines()[0]:.300}"
        ) from None
    except Exception as error:  # torch's readers raise whatever a damaged file makes of them
        raise ValueError(f"`{where}` cannot be read as a checkpoint: {type(error).__name__}: {error!s:.300}") from None
    if not isinstance(loaded, Mapping):
        raise ValueError(f"`{where}` must hold a Lightning checkpoint, but holds a {type(loaded).__name__}.")
    return loaded
