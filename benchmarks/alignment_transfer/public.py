"""Public texts as records of `align`, with words to weigh against each other at chosen places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.alignment_transfer.bodies import States
from lightning_pfl.adapters.readings import Reading

Ask = Callable[[str, Sequence[int]], list[int]]
_BATCH = 16


def last_word(text: str, places: Sequence[int]) -> list[int]:
    """Ask once, at the end of the text."""
    return [place for place in places if place == len(text)]


def each_word(text: str, places: Sequence[int]) -> list[int]:
    """Ask behind every word."""
    return [place for place in places if place == len(text) or text[place] == " "]


def records(
    states: Mapping[str, States], words: Mapping[str, Tensor], texts: Sequence[str], ask: Ask
) -> Iterator[dict[str, Reading]]:
    """Batches of texts; all models are asked for the same words at the same places."""
    count = len(next(iter(words.values())))
    for start in range(0, len(texts), _BATCH):
        chosen = slice(start, min(start + _BATCH, len(texts)))
        hidden, places = {}, {}
        for name, seen in states.items():
            longest = int(seen.lengths[chosen].max())
            hidden[name], places[name] = seen.hidden[chosen, :longest], seen.places[chosen, :longest]
        at: dict[str, list[tuple[int, int]]] = {name: [] for name in states}
        for row, text in enumerate(texts[chosen]):
            shared = set.intersection(*(set(found[row].tolist()) for found in places.values())) - {-1}
            for place in ask(text, sorted(shared)):
                for name in states:
                    at[name].append((row, int((places[name][row] == place).nonzero()[-1])))
        generator = torch.Generator().manual_seed(start)
        asked = len(next(iter(at.values())))
        pairs = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(asked)])
        yield {
            name: Reading(
                {"hidden": hidden[name], "at": torch.tensor(at[name]), "words": words[name][pairs]}, places[name]
            )
            for name in states
        }
