"""Put a function around a hook of one LightningModule object, leaving its class alone.

Lightning offers callbacks no moment between ``configure_model`` and the restore of a checkpoint, and calls no callback
for a checkpoint of weights only; the module's own hooks it always calls. What stands here can be pickled and copied
with its module, as long as the functions are a module's own, not closures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L

__all__ = ["around", "is_around", "original", "restore"]


def around(module: L.LightningModule, hook: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Have ``function(module, *arguments, *what Lightning passes)`` called instead of a hook; a second time replaces.

    Args:
        module: whose hook.
        hook: name of the hook.
        function: a function at the top of a file; it calls `original` when it wants what was there before.
        arguments: what it is given before Lightning's own arguments.
    """
    before = module.__dict__.get(hook)
    if isinstance(before, _Around):
        before = before.before
    replacement = _Around(function, module, *arguments)
    replacement.before = before
    object.__setattr__(module, hook, replacement)


def is_around(module: L.LightningModule, hook: str) -> bool:
    """Whether something stands around a hook."""
    return isinstance(module.__dict__.get(hook), _Around)


def original(module: L.LightningModule, hook: str) -> Callable[..., Any]:
    """The hook without what stands around it."""
    found = module.__dict__.get(hook)
    before = found.before if isinstance(found, _Around) else found
    result: Callable[..., Any] = getattr(type(module), hook).__get__(module) if before is None else before
    return result


def restore(module: L.LightningModule, hook: str) -> None:
    """Take away what stands around a hook; nothing happens if nothing does."""
    found = module.__dict__.get(hook)
    if isinstance(found, _Around):
        object.__delattr__(module, hook)
        if found.before is not None:
            object.__setattr__(module, hook, found.before)


class _Around(partial[Any]):
    """A partial, because Lightning's `is_overridden` looks through those (and only those) at the function's code."""

    before: Callable[..., Any] | None = None
