"""Three parties that share a folder and nothing else: each in a process of its own, no open port, every file signed.

Each party trains with its own data and its own model in a plain `trainer.fit`, here of two widths. Between rounds only
signed files pass: what a party trained of its adapters up, one mixture per party down. In a real federation `exchange`
is a bucket (`s3://...`), and each party runs its commands on its own machine.
"""

import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pfl import CoLoRA
from lightning_pfl.cli import main
from lightning_pfl.parties import Mailbox, Roster

PARTIES = {"ward-3": 32, "ward-7": 48, "line-1": 32}  # and the width of each one's model
ROUNDS = 2


class Module(L.LightningModule):
    """A party's own; nothing here knows of federations."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(width)
        layers = [nn.Linear(16, width), nn.ReLU()]
        for _ in range(3):
            layers += [nn.Linear(width, width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 2)

    def training_step(self, batch, _):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.body(x)), y)

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.0)


def data(party):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(sum(map(ord, party))))
    rule = x[:, 0] * x[:, 1] if party.startswith("ward") else x[:, 2] + x[:, 3]
    return DataLoader(TensorDataset(x, (rule > 0).long()), batch_size=16)


def train(party, rounds):
    """What a party's own script does. `global_branch=True`: there is a server, though no strategy knows of it."""
    trainer = L.Trainer(
        max_epochs=rounds,
        callbacks=[CoLoRA(rank=8, alpha=16, num_blocks=2, blocks="body", train_also=["head"], global_branch=True)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    checkpoint = Path(f"{party}.ckpt")
    trainer.fit(Module(PARTIES[party]), data(party), ckpt_path=str(checkpoint) if checkpoint.exists() else None)
    trainer.save_checkpoint(checkpoint)


def party_process(party):
    """All rounds of one party: train, send, take the mixture in. Runs in a process of its own."""
    files = ["--party", party, "--roster", "roster.json", "--exchange", "exchange", "--checkpoint", f"{party}.ckpt"]
    mailbox = Mailbox("exchange", Roster.read("roster.json"))
    for rounds in range(1, ROUNDS + 1):
        train(party, rounds)
        command("export", *files, "--key", f"keys/{party}.key", "--num_examples", "64")
        while mailbox.mixture(party, rounds - 1) is None:
            time.sleep(0.2)
        command("apply", *files)


def command(step, *arguments):
    """The same as `lightning-pfl round <step> ...` in a shell."""
    main(["round", step, *arguments])


def run():
    for name in ("server", *PARTIES):  # each makes its own and hands out the .pub file
        command("keys", "--name", name, "--folder", "keys")
    public = [f"keys/{party}.pub" for party in PARTIES]
    command("roster", "--server", "keys/server.pub", "--parties", f"[{','.join(public)}]", "--run", "wards-2026")

    started = [subprocess.Popen([sys.executable, __file__, party]) for party in PARTIES]
    mailbox = Mailbox("exchange", Roster.read("roster.json"))
    for index in range(ROUNDS):
        while not all(mailbox.update(party, index) for party in PARTIES):
            assert not any(process.poll() for process in started), "a party has failed"
            time.sleep(0.2)
        command(
            "aggregate",
            *["--key", "keys/server.key", "--roster", "roster.json", "--exchange", "exchange", "--state", "server"],
        )
    assert [process.wait() for process in started] == [0, 0, 0]


if __name__ == "__main__":
    party_process(sys.argv[1]) if len(sys.argv) > 1 else run()
