"""Promises of `lightning_pfl.callbacks.instance_hooks`."""

from __future__ import annotations

import copy
import pickle

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_pfl.callbacks.instance_hooks import around, is_around, original, restore


class Counting(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def on_save_checkpoint(self, checkpoint) -> None:
        self.calls.append("class")


def loud(module, word, checkpoint) -> None:
    module.calls.append(word)
    original(module, "on_save_checkpoint")(checkpoint)


def build(module) -> None:
    module.calls.append("build")


def test_the_function_is_called_in_place_of_the_hook_and_can_call_it():
    module = Counting()
    around(module, "on_save_checkpoint", loud, "one")

    module.on_save_checkpoint({})

    assert module.calls == ["one", "class"]
    assert is_around(module, "on_save_checkpoint")
    assert not is_around(Counting(), "on_save_checkpoint")


def test_a_second_function_replaces_the_first():
    module = Counting()
    around(module, "on_save_checkpoint", loud, "one")
    around(module, "on_save_checkpoint", loud, "two")

    module.on_save_checkpoint({})

    assert module.calls == ["two", "class"]


def test_restore_brings_back_the_classes_hook_or_the_objects_own():
    module = Counting()
    around(module, "on_save_checkpoint", loud, "one")
    restore(module, "on_save_checkpoint")
    restore(module, "on_save_checkpoint")
    module.on_save_checkpoint({})
    assert module.calls == ["class"]

    def mine(checkpoint):
        module.calls.append("mine")

    module.on_save_checkpoint = mine
    around(module, "on_save_checkpoint", loud, "two")
    around(module, "on_save_checkpoint", loud, "three")
    module.on_save_checkpoint({})
    assert module.calls == ["class", "three", "mine"]
    restore(module, "on_save_checkpoint")
    assert module.on_save_checkpoint is mine


def test_lightning_takes_the_hook_for_overridden():
    module = L.LightningModule()
    assert not is_overridden("configure_model", module)
    around(module, "configure_model", build)
    assert is_overridden("configure_model", module)


def test_copies_and_pickles_of_a_module_have_their_own():
    module = Counting()
    around(module, "on_save_checkpoint", loud, "one")

    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other.on_save_checkpoint({})
        assert other.calls == ["one", "class"]
        assert module.calls == []
