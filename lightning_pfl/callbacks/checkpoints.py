"""Checkpoints of modules with adapters: they say what they hold, may hold adapters only, and load into nothing else.

Start at `load_from_checkpoint`, or at `attach`, which gives one module's checkpoints these properties whoever saves and
loads them. Frozen weights that a small checkpoint leaves out are taken from the module when it is loaded, and nothing
else is: a tensor that is missing for any other reason is an error.
"""

from __future__ import annotations

import inspect
import io
import logging
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import lightning as L
import torch

from lightning_pfl.adapters import CoLoraConfig, adapter_state, add_global_branch, architecture_of, config_of, inject
from lightning_pfl.adapters.injection import ADAPTER, adapted_layers
from lightning_pfl.adapters.saved_config import config_from
from lightning_pfl.callbacks.instance_hooks import around, original
from lightning_pfl.documents import Schema
from lightning_pfl.errors import CheckpointMismatchError

__all__ = ["KEY", "attach", "check_config", "describe", "load_from_checkpoint", "make_ready", "saved_config"]

log = logging.getLogger(__name__)

KEY = "colora"
"""Under this key a checkpoint says what adapters it holds."""

_VERSION = 1
_ABOUT = Schema(
    "What a checkpoint says of its adapters",
    {
        "type": "object",
        "required": ["version", "config", "architecture", "train_also", "adapters_only"],
        "properties": {
            "version": {"type": "integer"},
            "config": {"type": "object"},
            "architecture": {"type": "string"},
            "train_also": {"type": "array", "items": {"type": "string"}},
            "adapters_only": {"type": "boolean"},
        },
    },
)
_STATES = ("state_dict", "current_model_state")  # the second is where Lightning's WeightAveraging keeps the model
_MATTERS = ("r", "alpha", "seed", "gate")
_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"

Module = TypeVar("Module", bound=L.LightningModule)


def attach(module: L.LightningModule, *, adapters_only: bool) -> None:
    """Make every checkpoint of this module say what adapters it holds, and check that when one is loaded.

    Args:
        module: a module with adapters.
        adapters_only: leave the frozen weights out of checkpoints, and bases that the seed gives back.
    """
    around(module, "on_save_checkpoint", _on_save_checkpoint, adapters_only)
    around(module, "on_load_checkpoint", _on_load_checkpoint)


def describe(module: L.LightningModule) -> dict[str, Any]:
    """What a checkpoint says about its adapters, in plain containers: config, architecture, what is trained beside."""
    inside = tuple(f"{name}." for name, _ in adapted_layers(module))
    return {
        "version": _VERSION,
        "config": config_of(module).to_dict(),
        "architecture": architecture_of(module),
        "train_also": [n for n, p in module.named_parameters() if p.requires_grad and not n.startswith(inside)],
        "adapters_only": False,
    }


def make_ready(module: L.LightningModule, checkpoint: MutableMapping[str, Any]) -> None:
    """Check that a checkpoint is of this module's adapters, and fill in what it left out, in place.

    Args:
        module: with adapters. It receives a global branch if the checkpoint holds one.
        checkpoint: of Lightning's form.

    Raises:
        CheckpointMismatchError: made without adapters, with others, or for another base model.
    """
    about = checkpoint.get(KEY)
    if about is None:
        if not any(".colora_" in name for name in checkpoint.get("state_dict", {})):
            raise CheckpointMismatchError(
                f"The checkpoint holds no Co-LoRA adapters, but this {type(module).__name__} has some. To start from "
                "its weights, load them into the module before training (`Module.load_from_checkpoint`), and fit "
                "without ckpt_path."
            )
        return
    saved = saved_config(about)
    check_config(saved, config_of(module), type(module).__name__)
    if saved.global_branch and not config_of(module).global_branch:
        log.info("The checkpoint holds a global branch and gates; %s receives them.", type(module).__name__)
        add_global_branch(module)
    if config_of(module).global_branch and not saved.global_branch:
        raise CheckpointMismatchError(
            f"The adapters of this {type(module).__name__} have a global branch and gates, but the checkpoint was made "
            "without a server and has none. Load it outside the federation, or start the federation without ckpt_path."
        )
    if about["adapters_only"]:
        _fill(module, checkpoint)


def saved_config(about: Mapping[str, Any]) -> CoLoraConfig:
    """The config in what a checkpoint says of its adapters.

    Args:
        about: a checkpoint's entry `KEY`.

    Raises:
        CheckpointMismatchError: written in a newer format.
        ValueError: it does not describe adapters.
    """
    version = about.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise CheckpointMismatchError(
            f"The checkpoint describes its adapters in format {version}, but this release reads up to {_VERSION}. "
            "Install the release that wrote it."
        )
    _ABOUT.check(about, "the checkpoint")
    return config_from(about["config"], "the checkpoint")


def check_config(saved: CoLoraConfig, present: CoLoraConfig, kind: str) -> None:
    """Raise if adapters saved under one config cannot be loaded into adapters made from another.

    Args:
        saved: resolved, from the checkpoint.
        present: resolved, of the module.
        kind: what the module is called in the message.

    Raises:
        CheckpointMismatchError: they differ in something that the tensors' meaning depends on.
    """
    resolved = ("base_identity", "placement")  # told in words of their own
    asked = {name: both for name, both in saved.differences(present).items() if name not in resolved}
    told = ", ".join(f"{name}: {old!r} in the checkpoint, {new!r} here" for name, (old, new) in asked.items())
    if any(name in asked for name in _MATTERS if name != "gate" or saved.global_branch):
        raise CheckpointMismatchError(
            f"The checkpoint was made with other adapters than this {kind} has ({told}). Give CoLoRA the arguments of "
            "the run that made the checkpoint, or start without ckpt_path."
        )
    if saved.base_identity != present.base_identity:
        raise CheckpointMismatchError(
            f"The checkpoint was made for the base model `{saved.base_identity}`, but this {kind} is built on "
            f"`{present.base_identity}`. Use the base model of the run that made the checkpoint."
        )
    if saved.placement != present.placement:
        ours, theirs = set(present.placement or {}), set(saved.placement or {})
        where = f"only in the checkpoint: {sorted(theirs - ours)[:3]}, only here: {sorted(ours - theirs)[:3]}"
        raise CheckpointMismatchError(
            f"The checkpoint was made for adapters in other places than this {kind} has them ({where}; "
            f"{told or 'same arguments'}). Use the arguments and the module of the run that made the checkpoint."
        )


def load_from_checkpoint(
    module_class: type[Module],
    path: str | Path,
    *,
    config: CoLoraConfig | None = None,
    map_location: torch.device | str = "cpu",
    weights_only: bool = True,
    **arguments: Any,
) -> Module:
    """Build a module, give it the adapters of a checkpoint, and load it: nothing is dropped.

    ``module_class.load_from_checkpoint`` cannot do this: it fails for want of adapters or, with ``strict=False``, drops
    them without a word.

    Args:
        module_class: the user's class. Its arguments are those that ``save_hyperparameters`` saved.
        path: a checkpoint of a Trainer with `CoLoRA`, full or with adapters only; any fsspec URL.
        config: of the adapters; None: as the checkpoint says.
        map_location: where the tensors go.
        weights_only: refuse checkpoints that would run code. Hyperparameters that are not plain values, or that
            LightningCLI saved as names of classes and functions to import, need False; then the file must be one that
            you trust.
        arguments: for the module's ``__init__``, over the saved ones.

    Returns:
        The module, in eval mode, not attached to a Trainer.

    Raises:
        CheckpointMismatchError: a checkpoint of other adapters than ``config`` asks for, or of another base model; or
            tensors that are missing or do not fit.
        ValueError: a checkpoint with adapters that does not say which, and no ``config``; a file that is damaged, or
            that would run code.
    """
    checkpoint = _read(str(path), map_location, weights_only)
    module = _build(module_class, checkpoint, arguments, weights_only)
    module.configure_model()
    about = checkpoint.get(KEY)
    if about is None and config is None:
        if any(".colora_" in name for name in checkpoint["state_dict"]):
            raise ValueError(
                f"`{path}` holds Co-LoRA adapters but does not say which. Pass config=CoLoraConfig(...) with the "
                "settings of the run that made it."
            )
        module.on_load_checkpoint(checkpoint)
    else:
        inject(module, config or saved_config(about or {}), train_also=() if about is None else about["train_also"])
        attach(module, adapters_only=bool(about and about["adapters_only"]))
        module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise CheckpointMismatchError(
            f"The tensors of `{path}` do not fit the {type(module).__name__} with the adapters that the checkpoint "
            f"describes: {error} Build the module as in the run that wrote it, or take another checkpoint."
        ) from error
    return module.to(map_location).eval()


def _on_save_checkpoint(module: L.LightningModule, adapters_only: bool, checkpoint: dict[str, Any]) -> None:
    original(module, "on_save_checkpoint")(checkpoint)
    checkpoint[KEY] = {**describe(module), "adapters_only": adapters_only}
    if adapters_only:
        left_out = _left_out(module)
        for key in _STATES:
            if key in checkpoint:
                checkpoint[key] = {name: value for name, value in checkpoint[key].items() if name not in left_out}


def _on_load_checkpoint(module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    original(module, "on_load_checkpoint")(checkpoint)
    make_ready(module, checkpoint)


def _left_out(module: L.LightningModule) -> set[str]:
    """Names of tensors that a module brings along itself: its frozen parameters, and bases that the seed gives back."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    inside = tuple(f"{name}.colora_" for name, _ in adapted_layers(module))
    adapters = {name for name in module.state_dict() if name.startswith(inside)}
    return (frozen | adapters) - set(adapter_state(module))


def _fill(module: L.LightningModule, checkpoint: MutableMapping[str, Any]) -> None:
    own = module.state_dict()
    for name, layer in adapted_layers(module):
        is_aligned = ADAPTER in layer.colora_aligned and bool(layer.colora_aligned[ADAPTER])
        if is_aligned and f"{name}.colora_aligned.{ADAPTER}" not in checkpoint["state_dict"]:
            raise CheckpointMismatchError(
                f"The checkpoint was made without an alignment, but `{name}` of this {type(module).__name__} has "
                "aligned bases, under which the checkpoint's P and Q mean something else. Leave out `aligned`."
            )
    left_out = _left_out(module)
    for key in _STATES:
        if key in checkpoint:
            missing = {name: value for name, value in own.items() if name in left_out and name not in checkpoint[key]}
            checkpoint[key] = {**checkpoint[key], **missing}


def _read(path: str, map_location: torch.device | str, weights_only: bool) -> dict[str, Any]:
    with fsspec.open(path, "rb") as file:
        content = io.BytesIO(file.read())
    try:
        checkpoint = torch.load(content, map_location=map_location, weights_only=weights_only)
    except Exception as error:  # torch's readers raise whatever a damaged file makes of them
        told = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"`{path}` cannot be loaded as a checkpoint of tensors and plain values: it is damaged, or loading it "
            f"would run code, which takes weights_only=False. {type(error).__name__}: {told:.300}"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"`{path}` must hold a Lightning checkpoint, but has no `state_dict`.")
    if not isinstance(checkpoint.get(KEY, {}), dict):
        raise ValueError(f"`{path}` describes its adapters by a {type(checkpoint[KEY]).__name__}, not a dict.")
    return checkpoint


def _build(
    module_class: type[Module], checkpoint: Mapping[str, Any], arguments: Mapping[str, Any], weights_only: bool
) -> Module:
    """The module as its saved hyperparameters describe it."""
    saved = dict(checkpoint.get(module_class.CHECKPOINT_HYPER_PARAMS_KEY, {}))
    saved = {name: value for name, value in saved.items() if name not in arguments}
    by_cli = saved.pop("_instantiator", None)
    if by_cli == _INSTANTIATOR:
        if weights_only and (names := _names_code(module_class, saved)):
            raise ValueError(
                f"The checkpoint's hyperparameters {names} name classes or functions to import and call, as "
                "LightningCLI writes them. If you trust the file, pass weights_only=False; else pass these arguments "
                "yourself."
            )
        from lightning.pytorch.cli import instantiate_module  # needs the `cli` extra, as the run that saved this did

        built: Module = instantiate_module(module_class, {**saved, **arguments})
        return built
    parameters = inspect.signature(module_class.__init__).parameters
    as_one = checkpoint.get(module_class.CHECKPOINT_HYPER_PARAMS_NAME)
    if as_one and as_one in parameters:
        saved = {as_one: saved}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        saved = {name: value for name, value in saved.items() if name in parameters}
    return module_class(**{**saved, **arguments})


def _names_code(module_class: type, saved: Mapping[str, Any]) -> list[str]:
    """Hyperparameters from which jsonargparse would import something."""
    parameters = inspect.signature(module_class).parameters
    wanted = {name: str(parameter.annotation) for name, parameter in parameters.items()}
    takes_code = {name for name, text in wanted.items() if "Callable" in text or "type[" in text.lower()}
    return [
        name for name, value in saved.items() if _holds_class_path(value) or (name in takes_code and value is not None)
    ]


def _holds_class_path(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "class_path" in value or any(_holds_class_path(item) for item in value.values())
    return isinstance(value, (list, tuple)) and any(_holds_class_path(item) for item in value)
