"""A thousand rounds with random faults: does anything grow, and do the bytes come out the same?

    python -m benchmarks.soak                              # 1,000 rounds x 50 clients, with and without faults
    python -m benchmarks.soak --rounds 30 --clients 8

Clients train a tiny model on a virtual clock. Faults come from a seed of their own: a client raises, hangs until its
deadline, or loses its device; the driver stumbles in the middle of a round, or finds the disk full; then a new Trainer
and a new strategy go on from the last checkpoint. Retries make the final bytes those of a run without faults. Memory,
open files and threads are read after every fifth round.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import logging
import math
import os
import random
import tempfile
import threading
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pfl import (
    ClientStore,
    FedAvg,
    FederatedStrategy,
    LocalPool,
    Pace,
    RetryRound,
    RoundRules,
    SimulatedPool,
)

EVERY = 5  # rounds from one reading to the next


class Stumbled(Exception):
    """The driver's own fault."""


@dataclass
class Weather:
    """Decides what goes wrong. It lives outside of modules, so that a turn that is run again may fare better.

    Attributes:
        rate: of turns that go wrong.
        driver: of rounds in which the driver stumbles.
        seen: how often what has happened.
    """

    rate: float
    driver: float
    random: random.Random
    seen: Counter[str] = field(default_factory=Counter)

    def happens(self, what: str, rate: float) -> bool:
        if self.random.random() >= rate:
            return False
        self.seen[what] += 1
        return True


WEATHER = Weather(0.0, 0.0, random.Random(0))  # of the run in progress; a turn that is unpickled finds it here


class Regression(L.LightningModule):
    """Small enough that what is measured is the federation."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder, self.dropout, self.head = nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if WEATHER.happens("a client raised", WEATHER.rate / 3):
            raise RuntimeError("out of memory, or of luck")
        if WEATHER.happens("a device was lost", WEATHER.rate / 3):
            raise torch.AcceleratorError("CUDA error: device not ready")
        return nn.functional.mse_loss(self.head(self.dropout(torch.tanh(self.encoder(batch[0])))), batch[1])

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        generator = torch.Generator().manual_seed(sum(map(ord, str(self.trainer.strategy.client_id))))
        x = torch.randn(8, 4, generator=generator)
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)  # one step a turn

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Readings(L.Callback):
    """Reads this process after every fifth round, and lets the driver stumble."""

    federated_scope = "server"

    def __init__(self) -> None:
        self.taken: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if WEATHER.happens("the driver stumbled", WEATHER.driver / 2):
            raise Stumbled
        if trainer.current_epoch % EVERY == 0:
            gc.collect()
            self.taken.append({"round": trainer.current_epoch, **reading()})


def reading() -> dict[str, float]:
    """Resident memory in MiB, open files, threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


class Checkpoints(ModelCheckpoint):
    """On a disk that is full now and then."""

    federated_scope = "server"

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        if WEATHER.happens("the disk was full", WEATHER.driver / 2):
            raise OSError(28, "no room")
        super()._save_last_checkpoint(trainer, monitor_candidates)


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        digest: of the final adapters and all clients' states.
        readings: every fifth round.
        faults: how often what went wrong.
        seconds: of processor time.
        wall: seconds of the clock.
        resumed: how often a new Trainer went on from a checkpoint.
    """

    digest: str
    readings: list[dict[str, float]]
    faults: dict[str, int]
    seconds: float
    wall: float
    resumed: int

    def growth(self) -> dict[str, float]:
        """By how much the median of the last quarter of readings is above that of the second."""
        quarter = max(1, len(self.readings) // 4)
        second, last = self.readings[quarter : 2 * quarter], self.readings[-quarter:]
        return {
            name: median(one[name] for one in last) - median(one[name] for one in second)
            for name in ("memory", "files", "threads")
        }


def soak(rounds: int, clients: int, *, rate: float, driver: float, seed: int, folder: Path) -> Outcome:
    """Run to the end, however often it has to be begun again."""
    WEATHER.rate, WEATHER.driver, WEATHER.random, WEATHER.seen = rate, driver, random.Random(seed), Counter()
    readings, begun, wall, resumed = Readings(), time.process_time(), time.monotonic(), 0
    gc.collect()
    gc.freeze()  # what is there already is not looked at again before every reading

    def pace(client_id: str, round: int) -> Pace:
        return Pace(seconds=math.inf if WEATHER.happens("a client hung", WEATHER.rate / 3) else 1.0)

    while True:
        strategy = FederatedStrategy(
            clients,
            pool=SimulatedPool(pace, pool=LocalPool()),
            share=["encoder"],
            aggregator=FedAvg(),
            store=ClientStore(folder / "states"),
            rules=RoundRules(deadline=10.0, below_quorum=RetryRound(times=1000)),
        )
        trainer = L.Trainer(
            max_epochs=rounds,
            strategy=strategy,
            callbacks=[Checkpoints(folder / "ck", save_top_k=1, save_last=True, every_n_epochs=5), readings],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module, there = Regression(), (folder / "ck" / "last.ckpt").exists()
        resumed += there
        try:
            trainer.fit(module, ckpt_path="last" if there else None)
            break
        except (Stumbled, OSError) as error:
            if isinstance(error, OSError) and error.errno != 28:
                raise
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in module.state_dict().values()))
    for client_id in strategy.client_ids:
        digest.update(strategy.store.get(client_id) or b"")
    return Outcome(
        digest.hexdigest(),
        readings.taken,
        dict(WEATHER.seen),
        time.process_time() - begun,
        time.monotonic() - wall,
        resumed,
    )


def quiet() -> None:
    """Thousands of lines of a Trainer's own would hide the result."""
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning_pfl"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rate", type=float, default=0.01, help="of turns that go wrong")
    parser.add_argument("--driver", type=float, default=0.02, help="of rounds in which the driver fails")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="all readings, as JSON")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    outcomes = {}
    for name, rate, driver in (("with faults", arguments.rate, arguments.driver), ("without", 0.0, 0.0)):
        with tempfile.TemporaryDirectory() as folder:
            outcome = soak(
                arguments.rounds, arguments.clients, rate=rate, driver=driver, seed=arguments.seed, folder=Path(folder)
            )
        outcomes[name] = outcome
        growth = {key: round(value, 1) for key, value in outcome.growth().items()}
        each = 1000 * outcome.seconds / arguments.rounds / arguments.clients
        print(
            f"{arguments.rounds} rounds x {arguments.clients} clients {name}: {outcome.seconds:.0f} s of processor "
            f"time ({each:.1f} ms per turn), {outcome.wall:.0f} s; "
            f"digest {outcome.digest[:16]}; growth {growth}; last reading {outcome.readings[-1]}; {outcome.faults}; "
            f"went on from a checkpoint {outcome.resumed} times",
            flush=True,
        )
        if arguments.write is not None:
            arguments.write.write_text(json.dumps({key: asdict(value) for key, value in outcomes.items()}, indent=1))
    if len({outcome.digest for outcome in outcomes.values()}) > 1:
        raise SystemExit("The bytes differ.")


if __name__ == "__main__":
    from benchmarks import soak as importable  # so that turns find this module, and not a copy of its globals

    importable.main()
