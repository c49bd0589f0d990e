"""Nothing of a turn stays behind in its process."""

import gc
import weakref

import lightning as L

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
