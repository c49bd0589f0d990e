"""From a method as a file names it to a `Method`: its function, what the comparison gives, and its own arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning_pfl.comparison.plan import MethodPlan
from lightning_pfl.methods import Method

__all__ = ["make_method"]


def make_method(plan: MethodPlan, given: Mapping[str, Any]) -> Method:
    """Call a method's function.

    Args:
        plan: function and arguments.
        given: what a comparison gives to every method that takes an argument of that name, or whose annotation is
            that name, which goes before (``outputs`` is a loss per batch here, per row there).

    Raises:
        ValueError: arguments that the function does not take, or of another type; what the function says of them.

    Example:
        >>> from lightning_pfl import CoLoRA
        >>> from lightning_pfl.methods import ditto
        >>> make_method(MethodPlan(ditto, {"strength": 0.5}), {"adapters": CoLoRA, "outputs": None}).name
        'Ditto'
    """
    from jsonargparse import ArgumentError, ArgumentParser  # an extra, and slow to import

    taken: dict[str, Any] = {}
    for name, parameter in inspect.signature(plan.make).parameters.items():
        for called in (str(parameter.annotation), name):
            if called in given:
                taken.setdefault(name, given[called])
    parser = ArgumentParser(exit_on_error=False)
    name = plan.make.__name__
    parser.add_function_arguments(plan.make, "arguments", skip=set(taken), fail_untyped=False)
    try:
        chosen = parser.parse_object({"arguments": dict(plan.arguments)} if plan.arguments else {})
        own = parser.instantiate(chosen).get("arguments")
    except ArgumentError as error:
        raise ValueError(f"The arguments of `{name}` are not right: {error}") from error
    made = plan.make(**taken, **({} if own is None else vars(own)))
    if not isinstance(made, Method):
        raise ValueError(f"`{name}` must make a Method, but made a {type(made).__name__}.")
    return made
