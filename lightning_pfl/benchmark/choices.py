"""Which answers a published prompt offers, and which of them is the right one."""

from __future__ import annotations

import re

__all__ = ["choices_with", "parse_choices"]

_LABELLED = re.compile(r"^(image\s+(?:[A-Z]|\d+))\b.*$", re.IGNORECASE)


def parse_choices(question: str) -> tuple[str, ...]:
    r"""Answers named in a prompt of the published form; empty where it lists none.

    Source:
        The reference of Co-LoRA (arXiv:2506.11024) tries these forms in turn: brackets after "Choice list:" (any case,
        also "lists"), brackets on a line of their own, lines "A. ...", lines "Image A: ...", and a request for "a
        single answer id" (1 to 5). What is in brackets is split at "|" if there is any, else at ","; "Image 1: a dog"
        is offered as "Image 1".

    Example:
        >>> parse_choices("<image> Which? Choice list:[red, dark blue]")
        ('red', 'dark blue')
        >>> parse_choices("Which?\nA. red\nB. blue")
        ('A', 'B')
    """
    inside = _brackets(question)
    if inside is not None:
        return _split(inside, "|" if "|" in inside else ",")
    for form in (r"(?m)^\s*([A-Z])[.)]\s+\S", r"(?mi)^\s*(image\s+(?:[A-Z]|\d+))\s*:"):
        found = tuple(dict.fromkeys(re.findall(form, question)))
        if len(found) > 1:
            return found
    return ("1", "2", "3", "4", "5") if "single answer id" in question.lower() else ()


def choices_with(question: str, answer: str) -> tuple[tuple[str, ...], str | None]:
    """The offered answers and the right one among them, in the spelling of the list.

    A list may be meant in more than one way: "[a cat | a dog | a cow]" offers these texts, or the letters A to C where
    the right answer is a letter; a "|" may be part of an answer. The first reading that has the right answer counts.

    Args:
        question: the prompt.
        answer: the right answer; case and spaces around do not matter.

    Returns:
        The choices, empty for an open question, and the right one; None if no reading has it.

    Example:
        >>> choices_with("Which? Choice list:[a cat | a dog | a cow]", "b")
        (('A', 'B', 'C'), 'B')
        >>> choices_with("Which? Choice list:[yes, no]", "Maybe")
        (('yes', 'no'), None)
    """
    first = parse_choices(question)
    if not first:
        return (), answer
    inside = _brackets(question)
    readings = [first]
    if inside is not None:
        readings += [_split(inside, ","), tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(first)])]
    for choices in readings:
        for choice in choices:
            if choice.casefold() == answer.strip().casefold():
                return choices, choice
    return first, None


def _brackets(question: str) -> str | None:
    match = re.search(r"choice lists?:\s*\[([^\]]*)\]", question, re.IGNORECASE) or re.search(
        r"\n \[([^\]]*)\]\n", question
    )
    return None if match is None else match[1]


def _split(inside: str, mark: str) -> tuple[str, ...]:
    parts = [part.strip() for part in inside.split(mark) if part.strip()]
    if parts and all(len(part) > 1 and part[0] == part[-1] and part[0] in "'\"" for part in parts):
        parts = [part[1:-1].strip() for part in parts]
    labels = [_LABELLED.match(part) for part in parts]
    if len(parts) > 1 and all(labels):
        parts = [label[1] for label in labels if label is not None]
    return tuple(parts)
