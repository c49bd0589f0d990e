"""Public data as `align` reads it: from any iterable, in the same order in every pass, some of it held out.

Start at `PublicData`. An item is a text, a record (a `Reading` for every model), or a sequence of those, as a
DataLoader makes of a data set of texts.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from lightning_pfl.adapters.contrasts import draw_contrast, places_to_ask, shared_words
from lightning_pfl.adapters.readings import Reading, TextReader

__all__ = ["PublicData", "Record"]

Record = Mapping[str, Reading]
_KEPT = 64


@final
class PublicData:
    """Records for every model, pass by pass.

    Args:
        data: texts, records, or sequences of those. Data that can be iterated over once (a generator) allows one pass.
        names: of the models.
        tokenizers: by name of a model; for texts only.
        ask_for_words: draw two words for every text, for the default loss.
        held_out: every how-manyth record is held out.

    Attributes:
        kept: the first 64 held-out records, for measuring without another pass.

    Raises:
        TypeError: one text instead of several.
    """

    def __init__(
        self,
        data: Iterable[Any],
        names: Sequence[str],
        tokenizers: Mapping[str, Any] | None,
        *,
        ask_for_words: bool,
        held_out: int,
    ) -> None:
        if isinstance(data, (str, bytes, Mapping)):
            raise TypeError(
                f"`data` must be an iterable of texts or of records, but is one {type(data).__name__}. Pass a list of "
                "texts (for a file, its lines), or of mappings from each model's name to its Reading."
            )
        self._data, self._names, self._tokenizers = data, list(names), tokenizers or {}
        self._ask_for_words, self._held_out = ask_for_words, held_out
        self._words: dict[str, Tensor] = {}
        self._first: tuple[int, int] | None = None
        self.kept: list[Record] = []

    def check_passes(self, passes: int, why: str) -> None:
        """Refuse data that can be read once only where more is needed, before anything is read.

        Args:
            passes: how many are needed.
            why: for the message.

        Raises:
            ValueError: a generator or another iterator, and more than one pass.
        """
        if passes > 1 and iter(self._data) is self._data:
            raise ValueError(
                f"{why} needs {passes} passes over the public data, but `data` is a {type(self._data).__name__}, which "
                "can be iterated over once only. Pass a list or a dataset, or raise max_bytes."
            )

    def records(self) -> Iterator[tuple[Record, bool]]:
        """One pass: every record, and whether it is held out.

        Raises:
            TypeError: an item that is no text and no record, or a text without tokenizers.
            ValueError: no item at all; another pass had other items, or the same in another order.
        """
        count = digest = 0
        for index, item in enumerate(_flat(self._data)):
            record = self._reading(item, index) if isinstance(item, str) else item
            count, digest = index + 1, _digest(item, digest)
            is_held_out = index % self._held_out == self._held_out - 1
            if is_held_out and self._first is None and len(self.kept) < _KEPT:
                self.kept.append(record)
            yield record, is_held_out
        if not count:
            again = " any more in a second pass. Pass a list, or an object whose `__iter__` starts anew" * bool(
                self._first
            )
            raise ValueError(f"The public data gives no item{again}.")
        if self._first is not None and self._first != (count, digest):
            raise ValueError(
                f"The public data must give the same items in the same order in every pass, but gave {self._first[0]} "
                f"in the first and {count} {'others' if count == self._first[0] else ''} later. What is held out would "
                "be fitted. Do not shuffle (DataLoader(..., shuffle=False)), or pass a list."
            )
        self._first = (count, digest)

    def _reading(self, text: str, index: int) -> Record:
        if missing := sorted(set(self._names) - set(self._tokenizers)):
            raise TypeError(
                f"Public data that is text needs a tokenizer for each model, but there is none for {missing}. Pass "
                "tokenizers={name: tokenizer}, or give records of one Reading per model instead of texts."
            )
        record = {name: TextReader(self._tokenizers[name])([text]) for name in self._names}
        if self._ask_for_words:
            self._words = self._words or shared_words({name: self._tokenizers[name] for name in self._names})
            asked = places_to_ask(text, {name: reading.places[0] for name, reading in record.items()})
            if asked:
                contrasts = draw_contrast(self._words, index, len(asked))
                record = {name: _asking(reading, asked, contrasts[name]) for name, reading in record.items()}
        return record


def _asking(reading: Reading, places: Sequence[int], contrast: Tensor) -> Reading:
    """The same reading, asked for pairs of words behind the last position of each place."""
    last = [int((reading.places[0] == place).nonzero()[-1]) for place in places]
    asked = torch.tensor([(0, position) for position in last])
    return replace(reading, inputs={**reading.inputs, "contrast": contrast, "asked": asked})


def _flat(items: Iterable[Any]) -> Iterator[str | Record]:
    for index, item in enumerate(items):
        if isinstance(item, str) or (isinstance(item, Mapping) and all(isinstance(x, Reading) for x in item.values())):
            yield item
        elif isinstance(item, Sequence) and not isinstance(item, bytes):
            yield from _flat(item)
        else:
            told = f"a mapping with the keys {sorted(item)[:6]}" if isinstance(item, Mapping) else type(item).__name__
            raise TypeError(
                f"An item of the public data must be a text, or a mapping from each model's name to its Reading, but "
                f"item {index} is {told}. Of rows of a table pass the text: (row['text'] for row in table)."
            )


def _digest(item: str | Record, before: int) -> int:
    if isinstance(item, str):
        return zlib.crc32(item.encode(), before)
    for reading in item.values():
        for value in (reading.places, *reading.inputs.values()):
            if isinstance(value, Tensor):
                flat = value.detach().cpu().contiguous().reshape(-1)
                before = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), before)
    return before
