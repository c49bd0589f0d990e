"""Task families: one question and its answers in several domains (who drew the pictures); a task = family x domain."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from .images import Op, Picture, copies, damage, keep, render, split_of, tint, turn

EMOJI = ("google", "twitter", "fluent", "openmoji")
SOURCES = ("photo", "clipart", "art4apps", "google")


@dataclass(frozen=True)
class Family:
    """A question with its answers; ``label`` sorts pictures into answers, or ``op`` makes the answer visible."""

    name: str
    prompt: str
    answers: tuple[str, ...]
    domains: tuple[str, ...]
    label: Callable[[Picture], str | None] | None = None
    pool: Callable[[Picture], bool] | None = None
    op: Op = keep


@dataclass(frozen=True)
class Sample:
    """One picture with its answer (index)."""

    image: Image.Image
    answer: int
    concept: str


def _animal(p: Picture) -> str | None:
    g = p.group.lower()
    if "animal" not in g:
        return None
    for key, word in {
        "mammal": "mammal",
        "marsupial": "mammal",
        "bird": "bird",
        "marine": "fish",
        "fish": "fish",
        "bug": "insect",
        "insect": "insect",
    }.items():
        if key in g:
            return word
    return None


def _category(p: Picture) -> str | None:
    top, _, sub = p.group.partition("/")
    if top == "Food & Drink" and sub != "dishware":
        return "food"
    if sub in ("clothing",):
        return "clothing"
    if sub.startswith("transport-") and sub != "transport-sign":
        return "vehicle"
    if sub in ("tool", "musical-instrument", "household", "science", "medical", "office", "writing"):
        return "tool"
    if sub.startswith("place-building") or sub.startswith("place-religious"):
        return "building"
    return None


def _feeling(p: Picture) -> str | None:
    sub = p.group.partition("/")[2]
    for word, subs in {
        "happy": ("face-smiling", "face-affection", "face-tongue"),
        "sad": ("face-concerned",),
        "sick": ("face-unwell", "face-sleepy"),
        "calm": ("face-neutral-skeptical",),
    }.items():
        if sub in subs:
            return word
    return None


def _style(p: Picture) -> str | None:
    return {"google": "plain", "twitter": "flat", "fluent": "solid", "openmoji": "outline"}.get(p.domain)


def candidates() -> list[Family]:
    """All families tried; the ones with headroom are kept by :func:`chosen`."""

    def thing(p: Picture) -> bool:
        return not p.group.startswith(("Flags", "Symbols", "Component"))

    def grouped(*tops: str) -> Callable[[Picture], bool]:
        return lambda p: p.group.startswith(tops)

    return [
        Family(
            "quality",
            "What is wrong with this photo? Answer:",
            ("blurry", "noisy", "dark", "nothing"),
            SOURCES,
            pool=thing,
            op=damage,
        ),
        Family(
            "animal",
            "What kind of animal is it? Answer:",
            ("mammal", "bird", "fish", "insect"),
            (*EMOJI, "clipart", "photo"),
            label=_animal,
        ),
        Family(
            "category",
            "What is it used as? Answer:",
            ("food", "clothing", "vehicle", "tool", "building"),
            EMOJI,
            label=_category,
        ),
        Family("feeling", "How does this face feel? Answer:", ("happy", "sad", "sick", "calm"), EMOJI, label=_feeling),
        Family(
            "turn", "Where does its top point? Answer:", ("up", "left", "down", "right"), SOURCES, pool=thing, op=turn
        ),
        Family(
            "copies",
            "How many things are there? Answer:",
            ("one", "two", "three", "four"),
            EMOJI,
            pool=thing,
            op=copies,
        ),
        Family(
            "tint",
            "Which colour is the light? Answer:",
            ("red", "green", "blue", "white"),
            SOURCES,
            pool=thing,
            op=tint,
        ),
    ]


def draw(family: Family, domain: str, side: str, n: int, pictures: Sequence[Picture], seed: int = 0) -> list[Sample]:
    """``n`` samples of one task with balanced answers, concepts of one side only, in a seeded order."""
    rng = random.Random(f"{family.name}/{domain}/{side}/{seed}")
    by_answer: dict[str, dict[str, list[str]]] = {a: defaultdict(list) for a in family.answers}
    for p in pictures:
        if p.domain != domain or split_of(p.concept) != side:
            continue
        if family.label is not None:
            word = family.label(p)
            if word in by_answer:
                by_answer[word][p.concept].append(p.path)
        elif family.pool is None or family.pool(p):
            for a in family.answers:
                by_answer[a][p.concept].append(p.path)
    out = []
    for i in range(n):
        answer = family.answers[i % len(family.answers)]
        concept = rng.choice(sorted(by_answer[answer]))
        image = render(rng.choice(by_answer[answer][concept]))
        out.append(Sample(family.op(image, answer, rng), family.answers.index(answer), concept))
    return out
