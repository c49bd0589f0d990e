"""``lightning-pfl align``: language models and public texts in, a folder with an alignment out.

Start at `align_language_models`. Everything that can be wrong with the arguments is looked at before a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import fsspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lightning_pfl.adapters.alignment import (
    Alignment,
    Canonical,
    GradientDescent,
    LeastSquares,
    Rule,
    align,
)
from lightning_pfl.adapters.config import CoLoraConfig
from lightning_pfl.adapters.injection import inject
from lightning_pfl.adapters.rules import papers_alignment

__all__ = ["RULES", "Request", "align_language_models", "read_texts"]

RULES: Mapping[str, Rule[Any]] = {
    "canonical": Canonical(),
    "least-squares": LeastSquares(),
    "paper": papers_alignment(),
    "descent": GradientDescent(),
}
"""What the command line calls them; in Python they are objects with arguments."""

_FEWEST = 50


@dataclass(frozen=True)
class Request:
    """What is asked for; checked when it is made.

    Attributes:
        models: folders or hub ids of causal language models.
        data: files or fsspec URLs, with ``*`` if wanted; JSON lines if they end in ``.jsonl``, else a text per line.
        output: folder to write.
        anchor: one of the models; the first if None.
        rank: of the adapters, as in `CoLoRA`.
        num_blocks: as in `CoLoRA`.
        target_modules: as in `CoLoRA`.
        rule: of `RULES`.
        field: of a JSON line, the one that holds the text.
        max_texts: read no more than so many.
        dtype: of the weights.
        seed: as in `CoLoRA`.
        overwrite: an alignment that is there already.

    Raises:
        ValueError: what cannot be asked for.
    """

    models: Sequence[str]
    data: Sequence[str]
    output: Path
    anchor: str | None = None
    rank: int = 16
    num_blocks: int = 4
    target_modules: Sequence[str] | None = None
    rule: str = "canonical"
    field: str = "text"
    max_texts: int | None = None
    dtype: str = "float32"
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if len(set(self.models)) < 2 or len(set(self.models)) < len(self.models):
            raise ValueError(f"`--models` must name at least two different models, but names {list(self.models)}.")
        if self.anchor is not None and self.anchor not in self.models:
            raise ValueError(f"`--anchor` must be one of the models {list(self.models)}, but is `{self.anchor}`.")
        if self.rule not in RULES:
            raise ValueError(f"`--rule` must be one of {list(RULES)}, but is `{self.rule}`.")
        for name in ("rank", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, but is {getattr(self, name)}.")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"`--output` must be a folder, but `{self.output}` is a file.")
        if (self.output / "alignment.json").exists() and not self.overwrite:
            raise ValueError(f"`{self.output}` holds an alignment already. Name another folder, or pass --overwrite.")


def align_language_models(request: Request, console: Console) -> Alignment:
    """Read texts, check the models' configs, load the models, align, write, and show the report.

    Args:
        request: what is asked for.
        console: for progress and the report.

    Returns:
        What was written to the output folder.

    Raises:
        ValueError: texts or models that do not do.
        OSError: a file or model that is not there.
    """
    texts = read_texts(request.data, field=request.field, at_most=request.max_texts)
    if len(texts) < _FEWEST:
        raise ValueError(
            f"The public data must have at least {_FEWEST} texts (better some thousand), but there are {len(texts)}. "
            "Name more files, or raise --max_texts."
        )
    for name in request.models:
        _check_config(name, request)
    console.print(f"{len(texts)} public texts; loading {len(request.models)} models")
    models, tokenizers = {}, {}
    config = CoLoraConfig(
        r=request.rank,
        num_blocks=request.num_blocks,
        target_modules=request.target_modules,
        private_layers=False,
        seed=request.seed,
    )
    for name in request.models:
        tokenizers[name] = AutoTokenizer.from_pretrained(name)
        models[name] = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, request.dtype))
        report = inject(models[name].requires_grad_(False).eval(), config)
        console.print(f"{name}: {len(report.colora)} layers to align")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        alignment = align(
            models,
            _Shown(texts, progress),
            anchor=request.anchor or request.models[0],
            tokenizers=tokenizers,
            rule=RULES[request.rule],
        )
    alignment.save(request.output)
    console.print(_as_table(alignment))
    console.print(
        f"wrote {request.output}; use it as CoLoRA(rank={request.rank}, ..., aligned={str(request.output)!r})"
    )
    return alignment


def read_texts(places: Sequence[str], *, field: str = "text", at_most: int | None = None) -> list[str]:
    """Read public texts.

    Args:
        places: files or fsspec URLs, with ``*`` if wanted; compressed ones by their ending. A ``.jsonl`` has a mapping
            per line, anything else a text per line; empty lines are left out.
        field: of a JSON line, the one that holds the text.
        at_most: stop after so many.

    Raises:
        FileNotFoundError: no file at a place, or none that fits a pattern.
        ValueError: a JSON line without that field, or whose field is no text.
    """
    texts: list[str] = []
    for place in places:
        files = fsspec.open_files(place, mode="rt", encoding="utf-8", compression="infer")
        if not files:
            raise FileNotFoundError(f"`--data` names `{place}`, but no file fits.")
        for file in files:
            with file as lines:
                for number, line in enumerate(lines, 1):
                    text = line.strip()
                    if text and ".jsonl" in Path(file.path).suffixes:
                        text = _field(text, field, f"{file.path}, line {number}")
                    if text:
                        texts.append(text)
                    if at_most is not None and len(texts) == at_most:
                        return texts
    return texts


def _field(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
        text = row[field]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        has = f"has the fields {sorted(row)[:6]}" if isinstance(error, KeyError) else "is not a JSON mapping"
        raise ValueError(f"Every line must be a JSON mapping with `{field}` (--field), but {where} {has}.") from error
    if not isinstance(text, str):
        raise ValueError(f"`{field}` of {where} must be a text, but is {type(text).__name__}. Name another --field.")
    return text.strip()


def _check_config(name: str, request: Request) -> None:
    config = AutoConfig.from_pretrained(name).get_text_config()
    if config.num_hidden_layers < request.num_blocks:
        raise ValueError(
            f"`{name}` has {config.num_hidden_layers} blocks, fewer than `--num_blocks` {request.num_blocks}."
        )
    if config.hidden_size < request.rank:
        raise ValueError(f"`{name}` is {config.hidden_size} wide, less than `--rank` {request.rank}.")


@final
class _Shown:
    """Texts that move a bar, pass by pass."""

    def __init__(self, texts: Sequence[str], progress: Progress) -> None:
        self._texts, self._progress, self._passes = texts, progress, 0

    def __iter__(self) -> Iterator[str]:
        self._passes += 1
        task = self._progress.add_task(f"pass {self._passes}", total=len(self._texts))
        for text in self._texts:
            yield text
            self._progress.advance(task)


def _as_table(alignment: Alignment) -> Table:
    """What `Alignment.table` says, for a terminal."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in alignment.table().splitlines()]
    table = Table(*lines[0], title="missed on held-out texts, before → after (0 perfect, 1 as good as nothing)")
    for cells in lines[2:]:
        table.add_row(*cells)
    return table
