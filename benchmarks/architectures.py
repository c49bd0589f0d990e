"""What works on which family of models: inject, train, federate with another family, save, load, merge, generate.

    python -m benchmarks.architectures                                          # check every family, print the table
    python -m benchmarks.architectures --write docs/reference/architectures.md  # and write the documentation's page
    python -m benchmarks.architectures --check docs/reference/architectures.md  # fail if the page says anything else

Models are tiny, with random weights from a fixed seed; everything else is what a user runs: a Lightning Trainer, the
strategy with two clients of different families, PEFT's own loading and merging, transformers' `generate`. A cell says
`yes` when the step's promise held (the functions below say which), and else what went wrong.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    GenerationMixin,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    SiglipConfig,
    SiglipModel,
)

from lightning_pfl import Client, CoLoRA, FederatedStrategy, LocalPool, UniformAggregator
from lightning_pfl.adapters.injection import ADAPTER, adapted_layers
from lightning_pfl.adapters.placement import Placement, place
from tests.adapters import tiny

STEPS = ("inject", "train", "federate", "save", "load", "merge", "generate")
ADAPTERS = {"rank": 4, "alpha": 8, "num_blocks": 2}


def siglip() -> nn.Module:
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**tower, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 16, "projection_size": 24}
    torch.manual_seed(1)
    return SiglipModel(
        SiglipConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8})
    ).eval()


def mobilenet() -> nn.Module:
    torch.manual_seed(1)
    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, image_size=32)).eval()


class Residual(nn.Module):
    """A block of somebody's own, with names like timm's and torchvision's."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1)) if inputs != width else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.downsample(x) + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class Own(nn.Module):
    """A user's own network, in stages: ``layer1``, ``layer2``."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.layer1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 16), Residual(16, 16))
        self.fc = nn.Linear(16, 3)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.layer2(self.layer1(self.conv1(pixel_values)))
        out: torch.Tensor = self.fc(x.mean((2, 3)))
        return out


def own() -> nn.Module:
    torch.manual_seed(1)
    return Own().eval()


@dataclass(frozen=True)
class Row:
    """A family, the one that it is federated with, and what must be said of both where a stack is not found alone."""

    name: str
    build: Callable[[], nn.Module]
    partner: Callable[[], nn.Module]
    blocks: Mapping[str, str] | None = None


_PAIR = {"encoder": "encoder.*", "decoder": "decoder.*"}
_TOWERS = {"text": "text_model.encoder.layers", "vision": "vision_model.encoder.layers"}
ROWS = (
    Row("Llama", tiny.llama, tiny.opt),
    Row("Gemma 3", tiny.gemma3, tiny.llama),
    Row("Qwen2 (grouped queries)", tiny.qwen2, tiny.gemma3),
    Row("GPT-2 (Conv1D)", tiny.gpt2, tiny.opt),
    Row("OPT", tiny.opt, tiny.gpt2),
    Row("Phi", tiny.phi, tiny.llama),
    Row("BERT", tiny.bert, tiny.vit),
    Row("T5", tiny.t5, tiny.whisper, _PAIR),
    Row("Whisper", tiny.whisper, tiny.t5, _PAIR),
    Row("ViT", tiny.vit, tiny.convnext),
    Row("CLIP (both towers)", tiny.clip, siglip, _TOWERS),
    Row("LLaVA", tiny.llava, tiny.qwen2),
    Row("ResNet", tiny.resnet, own),
    Row("ConvNeXt", tiny.convnext, tiny.vit),
    Row("EfficientNet", tiny.efficientnet, mobilenet),
    Row("MLP", tiny.mlp, tiny.mlp_of_another_shape),
    Row("a module of one's own", own, tiny.resnet),
)


_OTHERS = {siglip: "SigLIP", mobilenet: "MobileNetV2", tiny.mlp_of_another_shape: "MLP of another shape"}


class Tuner(L.LightningModule):
    """Trains a model to give ones, on two samples of its own kind."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.model = build()

    def train_dataloader(self) -> DataLoader:
        batch = tiny.inputs(self.model)
        return DataLoader([{name: rows[i] for name, rows in batch.items()} for i in range(2)], batch_size=2)

    def training_step(self, batch: Mapping[str, torch.Tensor], _: int) -> torch.Tensor:
        return (tiny.scores(self.model(**batch)) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(CoLoRA.param_groups(self, lr=0.01, lr_pq=0.01))


@dataclass
class Result:
    """What a row of the table says."""

    row: Row
    placement: Placement
    cells: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        roles = sorted({address.role for address in self.placement.layers.values() if address})
        shared = sum(address is not None for address in self.placement.layers.values())
        counts = f"{shared} | {len(self.placement.layers) - shared} | {len(self.placement.skipped)}"
        partner = next((row.name for row in ROWS if row.build is self.row.partner), _OTHERS.get(self.row.partner))
        cells = " | ".join(self.cells.get(step, "not reached") for step in STEPS)
        return f"| {self.row.name} | {partner} | {', '.join(roles)} | {counts} | {cells} |"


def check(row: Row, folder: Path) -> Result:
    """All steps of a row; the first that fails ends it."""
    result = Result(row, place(row.build(), num_blocks=ADAPTERS["num_blocks"], blocks=row.blocks, min_width=4))
    state: dict[str, nn.Module] = {}
    for step in STEPS:
        try:
            result.cells[step] = globals()[f"_{step}"](row, state, folder)
        except Exception as failure:  # the table says what went wrong
            result.cells[step] = f"**no**: {type(failure).__name__}: {str(failure)[:80]}"
            break
    return result


def _callback(row: Row) -> CoLoRA:
    return CoLoRA(**ADAPTERS, blocks=row.blocks)


def _trainer(row: Row, folder: Path, **arguments) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": str(folder)}
    return L.Trainer(max_epochs=2, callbacks=[_callback(row)], **quiet, **arguments)


def _inject(row: Row, state: dict[str, nn.Module], folder: Path) -> str:
    """A fresh adapter changes no bit of the output."""
    module = Tuner(row.build)
    expected = tiny.output(module.model)
    _callback(row)._inject(module, "fit", True)
    assert torch.equal(tiny.output(module.model), expected), "the output changed"
    return "yes"


def _train(row: Row, state: dict[str, nn.Module], folder: Path) -> str:
    """Alone, under a plain Trainer: the loss falls, and nothing but adapters is another than before."""
    module, base = Tuner(row.build), row.build().state_dict()
    batch = tiny.inputs(module.model)
    before = module.training_step(batch, 0).item()
    _trainer(row, folder).fit(module)
    assert module.eval().training_step(batch, 0).item() < before, "the loss did not fall"
    after = {name.replace(".base_layer", ""): tensor for name, tensor in module.model.state_dict().items()}
    moved = [name for name, tensor in base.items() if not torch.equal(after[name], tensor)]
    assert not moved, f"the base model moved: {moved[:2]}"
    return "yes"


def _federate(row: Row, state: dict[str, nn.Module], folder: Path) -> str:
    """With a client of another family: each one's global branch is the other's local one wherever both have a layer."""
    clients = [Client("ours"), Client("theirs", model=lambda: Tuner(row.partner))]
    strategy = FederatedStrategy(clients, aggregator=UniformAggregator(), pool=LocalPool())
    module = Tuner(row.build)
    _trainer(row, folder, strategy=strategy).fit(module)
    ours, theirs = (strategy.personalize(module, name) for name in ("ours", "theirs"))
    received, sent = _branches(ours, "global_tensors"), _branches(theirs, "local_tensors")
    common = sorted(set(received) & set(sent))
    assert common, "no address in common"
    for name in common:
        assert sent[name].abs().max() > 0, f"{name} was not trained"
        torch.testing.assert_close(received[name], sent[name])
    state["personal"] = ours
    return f"yes, {len(common) // 2} of {len(received) // 2}"


def _branches(module: nn.Module, branch: str) -> dict[str, torch.Tensor]:
    return {
        f"{address}/{letter}": tensor.detach()
        for _, layer in adapted_layers(module)
        if (address := layer.colora_address[ADAPTER]) is not None
        for letter, tensor in getattr(layer, branch)(ADAPTER).items()
    }


def _save(row: Row, state: dict[str, nn.Module], folder: Path) -> str:
    """As a PEFT folder of JSON and safetensors."""
    CoLoRA.export(state["personal"].model, folder / "adapter")
    names = sorted(path.name for path in (folder / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_manifest.json", "adapter_model.safetensors"], names
    return "yes"


def _load(row: Row, state: dict[str, nn.Module], folder: Path) -> str:
    """Read by PEFT into a fresh base model, it gives the bits that the client's model gives."""
    expected = tiny.output(state["personal"].model)
    state["loaded"] = PeftModel.from_pretrained(row.build(), folder / "adapter").eval()
    assert torch.equal(tiny.output(state["loaded"]), expected), "the output differs"
    assert not torch.allclose(tiny.output(row.build()), expected), "the adapter does nothing"
    return "yes"


def _merge(row: Row, state: dict[str, nn.Module], folder: Path) -> str:
    """In float64: the class without adapters, the output within 1e-9."""
    loaded = PeftModel.from_pretrained(row.build(), folder / "adapter").eval().double()
    expected = tiny.output(loaded)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(row.build())
    assert not any(adapted_layers(merged)), "adapters are left"
    torch.testing.assert_close(tiny.output(merged), expected, atol=1e-9, rtol=1e-9)
    return "yes"


def _generate(row: Row, state: dict[str, nn.Module], folder: Path) -> str:
    """Greedy decoding through the cache picks what one forward over everything picks."""
    model = state["loaded"].get_base_model()
    if not isinstance(model, GenerationMixin) or not model.can_generate():
        return "none"
    batch = tiny.inputs(model)
    name = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    start = batch[name].shape[1]
    # Whisper's own `generate` cuts sound into pieces and chooses a language around the general one
    ids = GenerationMixin.generate(model, **batch, max_new_tokens=4, do_sample=False)
    start = ids.shape[1] - 4
    with torch.no_grad():
        logits = model(**{**batch, name: ids}).logits
    assert torch.equal(logits[:, start - 1 : -1].argmax(-1), ids[:, start:]), "it picks other tokens"
    return "yes"


HEAD = """# Which models it works on

Generated by `python -m benchmarks.architectures` on tiny models with random weights; CI runs it and fails if this page
says anything else. What each column promises stands in that script: a fresh adapter changes no bit; the loss falls and
nothing but adapters moves; after rounds with a client of another family, each one's global branch is the other's local
one at every address that both have (how many of the family's own); the saved folder, loaded by PEFT into a fresh base
model, gives the same bits; merged in float64 it gives the same output within 1e-9; greedy decoding through the cache
picks what one forward picks (`none`: a model that does not write). The counts are of Co-LoRA layers (shared), of
conventional ones (private to one architecture) and of linear layers and convolutions without an adapter.

"""


def table(results: list[Result]) -> str:
    columns = ("family", "federated with", "shared roles", "shared", "private", "without", *STEPS)
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns))]
    return "\n".join([*(f"| {line} |" for line in lines), *map(str, results)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path)
    parser.add_argument("--check", type=Path)
    parser.add_argument("--only", nargs="+", default=[row.name for row in ROWS], help="names of families")
    chosen = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    results = []
    for row in [row for row in ROWS if row.name in chosen.only]:
        with tempfile.TemporaryDirectory() as folder:
            results.append(check(row, Path(folder)))
        print(results[-1], flush=True)
    page = HEAD + table(results)
    if chosen.write:
        chosen.write.write_text(page)
    if chosen.check and chosen.check.read_text() != page:
        print(f"{chosen.check} says something else; run this script with --write {chosen.check}.")
        return 1
    return int(any("**no**" in cell for result in results for cell in result.cells.values()))


if __name__ == "__main__":
    sys.exit(main())
