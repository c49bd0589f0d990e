"""`CoLoRA`: adapters in any LightningModule, alone an ordinary PEFT callback, under a federation what clients exchange.

Start at the class. Where adapters go and what they compute is `lightning_pfl.adapters`; what checkpoints hold is
`lightning_pfl.callbacks.checkpoints`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, final

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_pfl.adapters import (
    CoLoraConfig,
    FixedGate,
    GatePolicy,
    StaticGate,
    adapter_parameters,
    architecture_of,
    config_of,
    export_adapter,
    inject,
    load_global,
    load_local,
    shared_tensors,
)
from lightning_pfl.adapters.alignment import Alignment
from lightning_pfl.adapters.injection import ADAPTER, adapted_layers, extend
from lightning_pfl.adapters.shared import shown
from lightning_pfl.callbacks.checkpoints import attach
from lightning_pfl.callbacks.federated import AdapterUser, Exchange
from lightning_pfl.callbacks.instance_hooks import around, original, restore
from lightning_pfl.errors import CheckpointMismatchError
from lightning_pfl.functional.averaging import select
from lightning_pfl.types import Personalized, SharedTensors

__all__ = ["CoLoRA"]

log = logging.getLogger(__name__)

_VERSION = 1
_BUILDERS = ("setup", "configure_model", "configure_sharded_model")


@final
class CoLoRA(Exchange):
    """Trains Co-LoRA adapters instead of the module's own weights.

    Adapters are injected right after ``configure_model``, so layers may be built in ``__init__``, ``setup`` or
    ``configure_model``. Everything else is frozen, except what ``train_also`` names. Without a `FederatedStrategy`
    there is one adapter at full scale, no global branch and no gate.

    ``configure_optimizers`` must take its parameters when it is called (``self.parameters()``, those that require grad,
    or `param_groups`), not from a list made in ``__init__``. A gate that it lets decay is warned of.

    Args:
        rank: r; the same for all clients that exchange P and Q, which are r x r and r numbers per shared layer. 16, as
            in the paper's experiments on text, sends a quarter of what 32 does and was six points worse in ours
            (docs/design/variants.md).
        alpha: the scale of an adapter is alpha / rank. None: twice the rank, as in the paper.
        num_blocks: into how many parts of equal relative depth the model is cut; the last block of each holds the
            layers whose P and Q clients exchange. 0: there are none, and adapters are plain LoRA.
        gate: how a server's global branch is weighed against the local one.
        target_modules: which layers are adapted: a regular expression for the whole name, or parts of names. None:
            every linear layer and every convolution of the blocks, except the head, convolutions with groups and those
            narrower than the rank.
        exclude_modules: which layers are not, in the same forms.
        blocks: name of the stack of blocks, or one per tower; ``encoder.*`` fits the encoders of several families,
            ``stages.*.layers`` the blocks in stages. None: found from the module tree.
        roles: names for what layers do in their block, by the end of their path, asked before the built-in ones.
        train_also: which of the module's own parameters are trained as well: names of parameters or of modules that
            hold them (``"head"``), with ``*`` and ``?`` if wanted. They stay private to a client.
        private_layers: whether layers outside the shared blocks are adapted too, conventionally.
        keep: which adapters a client keeps to itself, by the names under which tensors are exchanged (P and Q:
            ``"main/0/q/P"``; A and B: ``"layers.3.fc1.A"``), with ``*`` and ``?`` if wanted.
        aligned: bases that make P and Q mean the same in other models: what `align` returned, or where it was saved.
        dropout: probability that an adapter's input feature is dropped while training.
        seed: of the adapters' start.
        adapters_only_checkpoints: leave frozen weights out of checkpoints. They load into a module that brings the
            same frozen weights along.
        global_branch: whether there is a frozen global adapter and a gate beside the adapter although no
            `FederatedStrategy` is there to ask for them: for a party whose server is elsewhere
            (`lightning_pfl.parties`). Until the server's first mixture comes, G is what L starts as.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[CoLoRA(rank=4, alpha=8, num_blocks=2, train_also=["head"])])
    """

    def __init__(
        self,
        rank: int = 32,
        alpha: float | None = None,
        num_blocks: int = 4,
        *,
        gate: GatePolicy = StaticGate(),  # noqa: B008 - frozen
        target_modules: str | Collection[str] | None = None,
        exclude_modules: str | Collection[str] | None = None,
        blocks: str | Mapping[str, str] | None = None,
        roles: Mapping[str, str] | None = None,
        train_also: Sequence[str] = (),
        private_layers: bool = True,
        keep: Sequence[str] = (),
        aligned: Alignment | str | Path | None = None,
        dropout: float = 0.0,
        seed: int = 0,
        adapters_only_checkpoints: bool = False,
        global_branch: bool = False,
    ) -> None:
        for argument, names in (("train_also", train_also), ("keep", keep)):
            if isinstance(names, str):
                raise TypeError(
                    f"`{argument}` must be a sequence of names, but is the string {names!r}; wrap it: [...]."
                )
            if not isinstance(names, Sequence):
                raise TypeError(f"`{argument}` must be a sequence of names, but is {names!r}.")
        self.config = CoLoraConfig(
            r=rank,
            alpha=alpha,
            num_blocks=num_blocks,
            gate=gate,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            blocks=dict(blocks) if isinstance(blocks, Mapping) else blocks,
            roles=dict(roles or {}),
            private_layers=private_layers,
            dropout=dropout,
            seed=seed,
        )
        self.train_also = tuple(train_also)
        self.keep = tuple(keep)
        self.aligned = aligned
        self.adapters_only_checkpoints = adapters_only_checkpoints
        self.global_branch = global_branch
        self._global_branch = False
        self._passed_on: dict[str, Any] = {}

    @staticmethod
    def param_groups(module: nn.Module, *, lr: float, lr_pq: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, to be used in ``configure_optimizers``.

        Args:
            module: the LightningModule (``self``), with its adapters.
            lr: learning rate of conventional A and B, of gates and of everything else that is trained.
            lr_pq: learning rate of P and Q, which see few numbers and bear a higher one.

        Returns:
            The groups that are not empty, each with a ``name`` that LearningRateMonitor shows; every parameter that
            requires grad is in exactly one. Gates are not decayed.

        Raises:
            ValueError: the module holds no adapters.

        Source:
            arXiv:2506.11024: 5e-5 for P, Q and 2e-5 for A, B.

        Example:
            >>> mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> _ = inject(mlp, CoLoraConfig(r=2, num_blocks=1), train_also=["4"])
            >>> groups = CoLoRA.param_groups(mlp, lr=1, lr_pq=2)
            >>> [(group["name"], group["lr"], len(group["params"])) for group in groups]
            [('pq', 2, 2), ('ab', 1, 2), ('train_also', 1, 2)]
        """
        adapters = adapter_parameters(module)
        known = {**adapters.pq, **adapters.ab, **adapters.gates}
        rest = {name: p for name, p in module.named_parameters() if name not in known}
        groups: list[dict[str, Any]] = [
            {"name": "pq", "params": adapters.pq, "lr": lr_pq},
            {"name": "ab", "params": adapters.ab, "lr": lr},
            {"name": "gate", "params": adapters.gates, "lr": lr, "weight_decay": 0.0},
            {"name": "train_also", "params": rest, "lr": lr},
        ]
        for group in groups:
            group["params"] = [p for p in group["params"].values() if p.requires_grad]
        return [group for group in groups if group["params"]]

    @staticmethod
    def export(module: nn.Module, path: str | Path, *, client: str | None = None, round: int | None = None) -> None:
        """Write the adapter as a PEFT folder, which ``PeftModel.from_pretrained(base_model, path)`` reads.

        Args:
            module: a module with adapters. If one transformers model inside holds them all, the folder is for that
                model; else for a module built like this one.
            path: the folder; made if it is not there.
            client: whose adapter the folder's manifest says it is.
            round: of which round the manifest says it is, from 0.

        Raises:
            ValueError: the module holds no adapters, or its outputs are those of two of them.
        """
        if (seen := shown(module)) != (ADAPTER,):
            raise ValueError(
                f"The outputs of this {type(module).__name__} are those of the adapters {list(seen)} together, but a "
                "folder holds one. Keep the module itself (`FederatedStrategy.personalize`)."
            )
        names = [name for name, _ in adapted_layers(module)]
        for inner, child in module.named_modules():
            if isinstance(child, PreTrainedModel) and all(
                name.startswith(f"{inner}." if inner else "") for name in names
            ):
                export_adapter(child, path, client=client, round=round)
                return
        export_adapter(module, path, client=client, round=round)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        _check_namespace(trainer, pl_module)
        if stage == "fit":
            self._passed_on = {}
        is_client = hasattr(trainer.strategy, "client_id")
        global_branch = self._global_branch if is_client else self.global_branch
        if stage == "fit" and self._before_averaging(trainer, pl_module):
            self._inject(pl_module, stage, global_branch)
            _tell_users(trainer, pl_module)
        else:
            around(pl_module, "configure_model", _configure_model, self, stage, global_branch)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        adapters = adapter_parameters(pl_module)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        held = {id(p) for group in groups for p in group["params"]}
        trained = {**adapters.pq, **adapters.ab, **adapters.gates}
        missing = [name for name, p in trained.items() if p.requires_grad and id(p) not in held]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(trained)} adapter parameters are in no optimizer and would not be trained "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). `{type(pl_module).__name__}."
                "configure_optimizers` must collect parameters when it is called, as the adapters are there by then: "
                "`CoLoRA.param_groups(self, lr=..., lr_pq=...)` or `self.parameters()`, not a list made in `__init__`."
            )
        decayed = {id(p) for group in groups if group.get("weight_decay", 0) > 0 for p in group["params"]}
        gates = [name for name, p in adapters.gates.items() if p.requires_grad and id(p) in decayed]
        if gates and not isinstance(self.config.gate, FixedGate):  # whose parameter nothing reads
            rank_zero_warn(
                f"{len(gates)} of {len(adapters.gates)} gates are in an optimizer group with weight_decay > 0 "
                f"({', '.join(gates[:3])}{', ...' if len(gates) > 3 else ''}), which pulls them back to where they "
                "start; the method decays no gate. AdamW decays by 0.01 unless told otherwise. Use "
                "`CoLoRA.param_groups(self, lr=..., lr_pq=...)`, where gates have weight_decay=0."
            )

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        restore(pl_module, "configure_model")

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        restore(pl_module, "configure_model")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"version": _VERSION, "config": self.config.to_dict(), "passed_on": dict(self._passed_on)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved, asked = state_dict["config"], self.config.to_dict()
        names = [name for name in ("r", "alpha", "num_blocks", "seed") if saved[name] != asked[name]]
        if names:
            told = ", ".join(f"{name}: {saved[name]!r} there, {asked[name]!r} here" for name in names)
            raise CheckpointMismatchError(
                f"The checkpoint was made by a CoLoRA callback with other arguments ({told}). Use those, or start "
                "without ckpt_path."
            )
        self._passed_on = dict(state_dict.get("passed_on", {}))  # what a party's exchange of files has left there

    @override
    def prepare_server(self, module: L.LightningModule, *, global_branch: bool) -> None:
        _check_namespace(module)
        if self.global_branch and not global_branch:
            raise ValueError(
                "`CoLoRA(global_branch=True)` asks for a server's mixture beside the adapter, but the aggregator of "
                "this federation sends none. Leave it out (a federation says itself whether there is one), or use an "
                "aggregator with a global branch."
            )
        self._global_branch = global_branch
        self._inject(module, "fit", global_branch)
        if config_of(module).global_branch and not global_branch:
            raise ValueError(
                f"The adapters of this {type(module).__name__} have a global branch from an earlier federated run, but "
                "the aggregator of this one sends none. Start from a fresh module, or use an aggregator with one."
            )

    @override
    def architecture(self, module: L.LightningModule) -> str:
        return architecture_of(module)

    @override
    def upload(self, module: L.LightningModule) -> SharedTensors:
        shared = shared_tensors(module)
        if not self.keep:
            return shared
        names = [*shared.common.layout.names, *shared.same_architecture.layout.names]
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"`keep` names {pattern!r}, but no shared tensor is called so. There are {names[:20]}."
                )
        sent = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in self.keep)]
        return SharedTensors(select(shared.common, sent), select(shared.same_architecture, sent))

    @override
    def receive(self, module: L.LightningModule, personalized: Personalized) -> None:
        if personalized.frozen is not None:
            load_global(module, personalized.frozen)
        if personalized.start is not None:
            load_local(module, personalized.start)

    def _inject(self, module: L.LightningModule, stage: str, global_branch: bool) -> None:
        """Give a module its adapters and what goes with them; whatever it has already stays as it is."""
        give = extend if any(adapted_layers(module)) else inject
        give(module, replace(self.config, global_branch=global_branch), train_also=self.train_also)
        if stage == "fit":  # another callback may have frozen what was injected for an earlier fit
            adapters = adapter_parameters(module)
            for parameter in (*adapters.pq.values(), *adapters.ab.values(), *adapters.gates.values()):
                parameter.requires_grad_(True)
        if self.aligned is not None:
            if not isinstance(self.aligned, Alignment):
                self.aligned = Alignment.load(self.aligned)
            self.aligned.apply(module)
        attach(module, adapters_only=self.adapters_only_checkpoints)

    def _before_averaging(self, trainer: L.Trainer, module: L.LightningModule) -> bool:
        """Whether adapters must be there now, because another callback copies the module when it is set up."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        names = [
            (index, type(callback).__name__)
            for index, callback in enumerate(callbacks)
            if isinstance(callback, (StochasticWeightAveraging, WeightAveraging))
        ]
        is_built = any(adapted_layers(module)) or not any(_overrides(module, hook) for hook in _BUILDERS)
        for index, name in names:
            if index < callbacks.index(self):
                raise ValueError(
                    f"`{name}` copies the module when it is set up, so it must come after CoLoRA in `callbacks`, or "
                    "its copy has no adapters."
                )
            if not is_built and name == StochasticWeightAveraging.__name__:
                raise ValueError(
                    f"`{name}` copies the module before `setup` or `configure_model` has built all its layers. "
                    "Build the layers in `__init__`, or use EMAWeightAveraging."
                )
        return bool(names) and is_built


def _configure_model(module: L.LightningModule, callback: CoLoRA, stage: str, global_branch: bool) -> None:
    """What stands around ``configure_model`` until it has been called."""
    build = original(module, "configure_model")
    restore(module, "configure_model")
    build()
    callback._inject(module, stage, global_branch)
    _tell_users(module.trainer, module)


def _tell_users(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Let callbacks change what was injected, before anything is restored into it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AdapterUser):
            callback.adapters_ready(module)


def _overrides(module: L.LightningModule, hook: str) -> bool:
    return hook in vars(module) or getattr(type(module), hook) is not getattr(L.LightningModule, hook)


def _check_namespace(*objects: object) -> None:
    for found in objects:
        if any(kind.__module__.partition(".")[0] == "pytorch_lightning" for kind in type(found).__mro__):
            raise TypeError(
                f"`{type(found).__name__}` comes from `pytorch_lightning`, but CoLoRA is a callback of `lightning`; "
                "the two are separate copies of one code base. Import from `lightning` only: `import lightning as L`."
            )
