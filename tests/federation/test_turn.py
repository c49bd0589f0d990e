"""Nothing of a turn stays behind in its process, and how it resumes."""

import gc
import weakref

import lightning as L
import pytest

from lightning_pfl.federation._compat import resume_from_memory
from tests.federation.runs import strategy_of, trainer_of
from tests.federation.test_strategy import colora
from tests.federation.tiny import Blocks, ClientsOwnData

MODULES = []


class Remember(L.Callback):
    """Notes in this process which modules clients had."""

    def on_fit_start(self, trainer, pl_module):
        MODULES.append(weakref.ref(pl_module))


def test_a_turns_memory_is_free_when_the_turn_is_over(tmp_path):
    """Without waiting for the garbage collector: a backbone's private pages would pile up until it comes."""
    MODULES.clear()
    trainer = trainer_of(tmp_path, strategy_of(["a", "b"], share=()), callbacks=[Remember(), colora()])
    gc.disable()
    try:
        trainer.fit(Blocks(), datamodule=ClientsOwnData())
        alive = [reference() for reference in MODULES if reference() is not None]
    finally:
        gc.enable()

    assert len(MODULES) == 6
    assert alive == []


@pytest.mark.parametrize(
    ("path", "release", "read_as_a_file"),
    [("client://in", L.__version__, False), ("client://in", "1.9.0", True), ("last.ckpt", L.__version__, True)],
)
def test_a_state_of_this_release_is_taken_from_memory_as_it_is(monkeypatch, path, release, read_as_a_file):
    """What Lightning does for files of earlier releases, and the files themselves, still goes Lightning's way."""
    connector = "lightning.pytorch.trainer.connectors.checkpoint_connector"
    migrated = []
    monkeypatch.setattr(f"{connector}._pl_migrate_checkpoint", lambda state, _: migrated.append(state) or state)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    state = {"pytorch-lightning_version": release, "state_dict": {}}
    monkeypatch.setattr(trainer.strategy, "load_checkpoint", lambda path, weights_only=None: state)

    resume_from_memory(trainer, "client://in")
    trainer._checkpoint_connector.resume_start(path)

    assert trainer._checkpoint_connector._loaded_checkpoint is state
    assert trainer.ckpt_path == path
    assert bool(migrated) == read_as_a_file
