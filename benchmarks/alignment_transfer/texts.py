"""Public texts and tasks from WordNet's glosses: what a word means, and what the meaning has to be called.

Start at `read_glosses`. Public texts, training, validation and test are glosses of different synsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_pfl.benchmark.packages import DebianPackage, unpack

WORDNET = DebianPackage(
    "wordnet-base",
    "1:3.0-37",
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    "WordNet-3.0",
    members=("usr/share/wordnet/data.*", "*/copyright"),
    source="wordnet",
)

_NOUNS = {5: "animal", 20: "plant", 13: "food", 18: "person", 15: "place", 8: "body"}
_VERBS = {38: "move", 32: "say", 31: "think", 35: "touch", 30: "change", 41: "meet"}
_PARTS = {"noun": "red", "verb": "blue", "adj": "green", "adv": "black"}
_COLOURS = {5: "red", 20: "blue", 13: "green", 18: "white", 15: "black", 8: "yellow"}


@dataclass(frozen=True)
class Gloss:
    """A definition, with WordNet's lexicographer file (what kind of thing) and part of speech."""

    text: str
    file: int
    part: str


@dataclass(frozen=True)
class Task:
    """Definitions to be sorted: after the prompt, which of the answers comes next?

    Attributes:
        prompt: with a place for the gloss.
        answers: words.
        train: pairs of a gloss and the index of its answer; validation and test likewise.
    """

    prompt: str
    answers: tuple[str, ...]
    train: Sequence[tuple[str, int]]
    validation: Sequence[tuple[str, int]]
    test: Sequence[tuple[str, int]]


def read_glosses(seed: int = 0) -> list[Gloss]:
    """All short definitions, in an order drawn from the seed."""
    folder = unpack(WORDNET) / "usr/share/wordnet"
    found = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence
                continue
            facts, gloss = line.split("|", 1)
            text = gloss.split(";")[0].split('"')[0].strip()
            if 25 <= len(text) <= 70 and text.isascii() and "(" not in text:
                found[text] = Gloss(text, int(facts.split()[1]), part)
    glosses = list(found.values())
    order = torch.randperm(len(glosses), generator=torch.Generator().manual_seed(seed)).tolist()
    return [glosses[index] for index in order]


def tasks_of(glosses: Sequence[Gloss], *, train: int, validation: int, test: int) -> dict[str, Task]:
    """Four tasks; two ask for kinds by name, two by a colour that nobody can guess."""
    kinds: dict[str, tuple[str, Mapping[object, str], str]] = {
        "nouns": ("{}. This is a kind of", _NOUNS, "file"),
        "verbs": ("{}. In short, to", _VERBS, "file"),
        "parts in colours": ("{}. The colour of this is", _PARTS, "part"),
        "nouns in colours": ("{}. The colour of this is", _COLOURS, "file"),
    }
    tasks = {}
    for name, (prompt, answers, by) in kinds.items():
        words = tuple(answers.values())
        groups = {key: [gloss.text for gloss in glosses if getattr(gloss, by) == key] for key in answers}
        parts, start = [], 0
        for count in (train, validation, test):
            each = count // len(words)
            parts.append(
                [(text, index) for index, key in enumerate(answers) for text in groups[key][start : start + each]]
            )
            start += each
        tasks[name] = Task(prompt, words, *parts)
    return tasks


@dataclass(frozen=True)
class Plan:
    """All texts of one run.

    Attributes:
        public: definitions that alignments are fitted on.
        tasks: by title.
    """

    public: Sequence[str]
    tasks: Mapping[str, Task]


def make_plan(num_public: int, *, train: int = 96, validation: int = 48, test: int = 144, seed: int = 0) -> Plan:
    """Public definitions first, tasks of what comes behind the first 6,000."""
    glosses = read_glosses(seed)
    public = tuple(gloss.text for gloss in glosses[:num_public])
    return Plan(public, tasks_of(glosses[6000:], train=train, validation=validation, test=test))
