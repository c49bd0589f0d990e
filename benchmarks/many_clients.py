"""Many clients on one device: what exchanging adapters costs, and what training several clients at once would bring.

    OMP_NUM_THREADS=1 python -m benchmarks.many_clients [--clients 8] [--layers 4 28] [--widths 64 256 512]

The module is a frozen residual body of linear layers with Co-LoRA adapters of rank 16 in every layer. Prints

- milliseconds to write another client's P, Q and gates into it (as a turn does with what the server sends), and to put
  another client's whole adapter in its place by pointer;
- milliseconds per optimizer step of all clients one after another, and stacked: one forward and backward pass over the
  shared body with a leading client dimension on P and Q (`torch.func.vmap` of the same loss), AdamW on the stack.
  After ten steps both must hold the same numbers but for rounding; the largest difference is printed.

- milliseconds per optimizer step of all clients in whole rounds of `--steps` steps, where each client's turn is a
  `Trainer.fit`: in `LocalPool` and in `StackedPool`. Above the bare numbers lie the turns, Lightning's own steps and,
  stacked, what it costs to meet.

Runs alternate, and the fastest counts. docs/design/decisions.md has the numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pfl import Client, ClientPool, LocalPool, StackedPool, stackable
from lightning_pfl.adapters import CoLoraConfig, inject
from lightning_pfl.adapters.injection import adapted_layers
from lightning_pfl.adapters.tensors import adapter_parameters, load_global, load_local, shared_tensors
from lightning_pfl.federation.client_strategy import ClientStrategy
from lightning_pfl.federation.jobs import Job
from lightning_pfl.federation.snapshot import Snapshot
from lightning_pfl.federation.sources import ClientData
from lightning_pfl.federation.template import ClientTemplate
from lightning_pfl.federation.tensor_file import TensorFile
from lightning_pfl.types import Assignment

STEPS = 10


class Body(nn.Module):
    """Residual layers of one width."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(width, width)}) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block["fc"](x))
        return x


def adapted(width: int, depth: int, *, global_branch: bool) -> Body:
    """A frozen body with an adapter in every layer."""
    torch.manual_seed(0)
    body = Body(width, depth).requires_grad_(False)
    inject(body, CoLoraConfig(r=16, alpha=32, num_blocks=depth, target_modules=["fc"], global_branch=global_branch))
    return body


def trained(body: nn.Module) -> dict[str, Tensor]:
    """P, Q and gates by name."""
    return {name: value for name, value in body.named_parameters() if value.requires_grad}


def best(runs: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """CPU milliseconds of each, the fastest of all turns; the first warms up."""
    found = dict.fromkeys(runs, float("inf"))
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn:
                found[name] = min(found[name], 1000 * (time.process_time() - start))
    return found


def exchange(width: int, depth: int) -> dict[str, float]:
    """Writing P, Q and gates, and putting a whole adapter in place by pointer."""
    body, other = adapted(width, depth, global_branch=True), adapted(width, depth, global_branch=True)
    sent, mine, theirs = shared_tensors(other), adapter_parameters(body).gates, adapter_parameters(other).gates
    pairs = list(zip(adapted_layers(body), adapted_layers(other), strict=True))

    def write() -> None:
        load_global(body, sent)
        load_local(body, sent)
        with torch.no_grad():
            for name, gate in mine.items():
                gate.copy_(theirs[name])

    def bare() -> None:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)

    def point() -> None:
        for (_, layer), (_, other_layer) in pairs:
            for attribute in (*layer.adapter_layer_names, *layer.basis_names, *layer.global_names):
                setattr(layer, attribute, getattr(other_layer, attribute))

    targets = [value for _, layer in adapted_layers(body) for value in layer.state_of("default").values()]
    sources = [value.detach().clone() for value in targets]
    runs = {
        "write G, L and gates as a turn does": write,
        "copy all tensors of the adapter, bases too": bare,
        "put a whole adapter in its place by pointer": point,
    }
    return best(runs, turns=30)


def stacking(width: int, depth: int, clients: int, tokens: int) -> tuple[dict[str, float], float]:
    """Steps of all clients one after another and stacked, and how far their results are apart."""
    body = adapted(width, depth, global_branch=False)
    start = {name: value.detach().clone() for name, value in trained(body).items()}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(clients, tokens, width, generator=generator)
    y = torch.randn(clients, tokens, width, generator=generator)

    def loss_of(tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(torch.func.functional_call(body, tensors, (x,)), y)

    every = torch.func.vmap(loss_of)
    own = [{name: value.clone().requires_grad_() for name, value in start.items()} for _ in range(clients)]
    optimizers = [torch.optim.AdamW(tensors.values(), lr=1e-3) for tensors in own]
    stack = {name: value.expand(clients, *value.shape).clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.AdamW(stack.values(), lr=1e-3)

    def apart() -> None:
        for index, (tensors, one) in enumerate(zip(own, optimizers, strict=True)):
            one.zero_grad()
            loss_of(tensors, x[index], y[index]).backward()
            one.step()

    def together() -> None:
        optimizer.zero_grad()
        every(stack, x, y).sum().backward()
        optimizer.step()

    found = best({"one after another": apart, "stacked": together}, turns=STEPS - 1)
    difference = max(
        float((stack[name][index] - tensors[name]).detach().abs().max())
        for index, tensors in enumerate(own)
        for name in start
    )
    return found, difference


class Module(L.LightningModule):
    """The adapted body as a user would train it."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.body = adapted(width, depth, global_branch=False)

    def loss_of(self, batch: list[Tensor]) -> Tensor:
        return F.mse_loss(self.body(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return stackable(self.loss_of, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(trained(self.body).values(), lr=1e-3)


class Data(L.LightningDataModule):
    """Batches of noise."""

    def __init__(self, width: int, tokens: int, steps: int) -> None:
        super().__init__()
        self.shape = steps * tokens, width
        self.tokens = tokens

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.randn(self.shape), torch.randn(self.shape)), batch_size=self.tokens)


def rounds(width: int, depth: int, clients: int, tokens: int, steps: int) -> dict[str, float]:
    """Rounds of all clients in both pools, divided by their steps."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy = ClientStrategy(
        client_ids=[str(index) for index in range(clients)],
        share=["body.blocks.0.fc.colora_P"],
        local_epochs=1,
        local_steps=None,
        accelerator=None,
        devices=None,
        precision=None,
    )
    limits = {"callbacks": (), "save_dir": None, "has_logger": False, "max_epochs": 1, "min_epochs": None}
    trainer = ClientTemplate.take(L.Trainer(accelerator="cpu", **quiet)).equip(strategy, **limits)
    jobs = [Job(Assignment(one, 0), TrainerFn.FITTING, "", None, int(one)) for one in strategy.client_ids]
    pools: dict[str, ClientPool] = {"LocalPool": LocalPool(), "StackedPool": StackedPool(at_once=clients)}

    def run(pool: ClientPool) -> None:
        assert all(result.failure is None for result in pool.run(jobs))

    with TensorFile() as file:
        snapshot = Snapshot.take((trainer, Module(width, depth), ClientData(Data(width, tokens, steps))), file)
        for pool in pools.values():
            pool.start([Client(one) for one in strategy.client_ids], {"": snapshot})
        found = best({name: partial(run, pool) for name, pool in pools.items()}, turns=3)
        for pool in pools.values():
            pool.close()
    return {name: milliseconds / steps for name, milliseconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--depth", type=int, default=28, help="adapted layers when adapters are exchanged")
    parser.add_argument("--layers", type=int, nargs="+", default=[4], help="adapted layers when clients train")
    parser.add_argument("--steps", type=int, default=50, help="of each client in a round")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 64, 512])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name, milliseconds in exchange(256, chosen.depth).items():
        print(f"{name}, {chosen.depth} layers: {milliseconds:.2f} ms")
    print(f"{chosen.clients} clients, ms per step of all | one by one | stacked | difference | LocalPool | StackedPool")
    for layers in chosen.layers:
        for width in chosen.widths:
            for tokens in chosen.tokens:
                bare, difference = stacking(width, layers, chosen.clients, tokens)
                whole = rounds(width, layers, chosen.clients, tokens, chosen.steps)
                shape = f"{layers:2d} layers, width {width:4d}, {tokens:4d} positions"
                one, other = (" | ".join(f"{value:7.2f}" for value in of.values()) for of in (bare, whole))
                print(f"{shape} | {one} | {difference:.0e} | {other}", flush=True)


if __name__ == "__main__":
    main()
