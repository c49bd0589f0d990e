"""Three parties of two widths with their own data in a fixed order, and the ways in which they can run rounds."""

from dataclasses import replace
from functools import partial

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_pfl import Client, CoLoRA, RelevanceProbe, inject
from lightning_pfl.callbacks.checkpoints import describe
from lightning_pfl.parties import Mailbox, Roster, Server, Signer, apply, export, make_key
from lightning_pfl.relevance import GradientProbe
from tests.federation.tiny import Blocks, WideBlocks, dataset

MODELS = {"a": Blocks, "b": WideBlocks, "c": Blocks}
EXAMPLES = {"a": 12, "b": 8, "c": 16}


class OwnData(L.LightningDataModule):
    """Always in one order, so that a plain Trainer draws nothing."""

    def __init__(self, party):
        super().__init__()
        self.party = party

    def train_dataloader(self):
        return DataLoader(dataset(sum(map(ord, self.party)), EXAMPLES[self.party]), batch_size=4)


def loss(module, batch):
    return torch.nn.functional.mse_loss(module(batch[0]), batch[1])


def probe():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GradientProbe(torch.nn.Linear(4, 1), loss, parameters=["weight"], size=8)


def colora(**arguments):
    return CoLoRA(rank=2, alpha=4, num_blocks=2, blocks="blocks", train_also=["head"], **arguments)


def callbacks(*, sketches, **arguments):
    probes = [RelevanceProbe(probe(), every_n_steps=1)] if sketches else []
    return [colora(**arguments), *probes]


def clients():
    return [Client(party, model=MODELS[party], datamodule=partial(OwnData, party)) for party in MODELS]


def trainer(folder, **arguments):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        **arguments,
    )


class Run:
    """A run's keys, roster, mailbox and server in a folder."""

    def __init__(self, folder, *, aggregator=None, global_branch=True, parties=tuple(MODELS), url=None):
        self.folder = folder
        self.aggregator = aggregator
        keys = {name: make_key(folder / f"{name}.key") for name in (*parties, "server")}
        server = keys.pop("server")
        self.roster = Roster("wards-1", server, keys, global_branch)
        self.mailbox = Mailbox(url or folder / "box", self.roster)

    def signer(self, name):
        return Signer(self.folder / f"{name}.key")

    def server(self, **arguments):
        aggregator = arguments.pop("aggregator", self.aggregator)
        mailbox = arguments.pop("mailbox", self.mailbox)
        return Server(self.roster, mailbox, self.folder / "server", self.signer("server"), aggregator=aggregator)

    def checkpoint(self, party):
        return self.folder / f"{party}.ckpt"

    def train(self, party, rounds, *, sketches=False, arguments=None):
        """One round's training, as a party does it by itself."""
        wanted = {"global_branch": self.roster.global_branch, **(arguments or {})}
        mine = trainer(self.folder, max_epochs=rounds, callbacks=callbacks(sketches=sketches, **wanted))
        path = str(self.checkpoint(party)) if self.checkpoint(party).exists() else None
        mine.fit(MODELS[party](), OwnData(party), ckpt_path=path)
        mine.save_checkpoint(self.checkpoint(party))

    def export(self, party, **arguments):
        return export(
            self.checkpoint(party), self.mailbox, party, self.signer(party), num_examples=EXAMPLES[party], **arguments
        )

    def apply(self, party, **arguments):
        return apply(self.checkpoint(party), self.mailbox, party, **arguments)


def checkpoint_of(model, *, step=3, values=0.0, sketch=None, global_branch=True, **entries):
    """What Lightning would save of a module after some steps, without training it."""
    module = model()
    inject(module, replace(colora().config, global_branch=global_branch), train_also=["head"])
    for name, parameter in module.named_parameters():
        if "colora_P" in name:
            torch.nn.init.constant_(parameter, values)
    probe_state = {} if sketch is None else {"RelevanceProbe": {"total": 2 * sketch, "count": 2}}
    return {
        "global_step": step,
        "state_dict": dict(module.state_dict()),
        "callbacks": {"CoLoRA": {"passed_on": {}}, **probe_state},
        "colora": describe(module),
        **entries,
    }


def train_on(path, *, step, values):
    """Change a checkpoint as training would."""
    checkpoint = torch.load(path, weights_only=True)
    state = {
        name: torch.full_like(tensor, values) if ".colora_P." in name else tensor
        for name, tensor in checkpoint["state_dict"].items()
    }
    torch.save({**checkpoint, "global_step": step, "state_dict": state}, path)
