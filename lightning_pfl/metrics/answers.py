"""Read generated answers: which choice a text names, and how far an open answer agrees with the expected one.

Start at `named_choice` and `token_f1`; both take plain text and know no model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["named_choice", "token_f1"]

_TOKEN = re.compile(r"(?<![\w.])[-+]?\d+(?:[.,:/]\d+)*%?|[^\W_]+(?:['’\-][^\W_]+)*|[^\w\s]")
_AROUND = frozenset(".,;:!?\"'`’()[]{}")
_LEAD_IN = re.compile(r"^\W*(?:the\s+)?(?:correct\s+)?(?:answer|choice|option)\s*(?:is\b|:)\s*:?\s*", re.IGNORECASE)
_LABEL = re.compile(r"^\W*([A-Za-z])(?:\s*$|\W*$|\s*[.:)\]])")
_STANDALONE = re.compile(r"\b([A-Z])\b(?=\s*[.:)\]]|\s*$)")
_SAME = {"positive": "yes", "negative": "no"}
_ARTICLES = frozenset({"a", "an", "the"})


def named_choice(text: str, choices: Sequence[str]) -> int | None:
    """Which of the offered choices a generated text names, if it names exactly one.

    Whole words count, not parts of them, and a choice inside a longer one does not ("red" in "red circle", "no" in "not
    sure"). In this order: the text is a choice; it is the letter of one ("B", "(b)", "B: dog") and no choice is a
    letter itself; it names one choice only; its first clause is a choice ("Yes, there is no doubt"). Case, a lead-in
    such as "Answer:" and punctuation around do not matter; "yes" and "no" stand for Positive and Negative. What a
    sentence says of a choice is not understood: "not red" names red.

    Args:
        text: what the model wrote, without special tokens.
        choices: as offered; letters alone ("A", "B") are only found as stand-alone capitals.

    Returns:
        Index into ``choices``; None if the text names none, or several.

    Raises:
        ValueError: two choices that differ in case, spaces or punctuation only, or an empty one.

    Source:
        The reference of Co-LoRA (arXiv:2506.11024) takes the first choice that is a substring of the text, so "no"
        answers "not sure", and any isolated capital, so "A dog" answers A. Here such texts name no such choice.

    Example:
        >>> named_choice("Answer: the red circle.", ["red", "red circle", "blue"])
        1
        >>> named_choice("red or blue", ["red", "blue"]) is None
        True
        >>> named_choice("(B) it is blurry", ["yes", "no"])
        1
    """
    wanted = [_trimmed(_tokens(choice)) for choice in choices]
    _check_distinct(choices, wanted)
    body = _LEAD_IN.sub("", text.strip())
    said = _tokens(body)
    if _trimmed(said) in wanted and not _are_letters(choices):
        return wanted.index(_trimmed(said))
    if _are_letters(choices):
        letters = [choice.strip().upper() for choice in choices]
        found = {match for match in _STANDALONE.findall(body) if match in letters}
        label = _LABEL.match(body)
        if label and label[1].upper() in letters:
            return letters.index(label[1].upper())
        return letters.index(found.pop()) if len(found) == 1 else None
    if label := _LABEL.match(body):
        index = ord(label[1].upper()) - ord("A")
        if index < len(choices):
            return index
    named = _mentioned(said, wanted)
    if not named and {" ".join(choice) for choice in wanted} == set(_SAME):
        named = _mentioned(said, [[_SAME[choice[0]]] for choice in wanted])
    if len(named) == 1:
        return named.pop()
    first = _trimmed(_tokens(re.split(r"[.,;:!?\n]", body, maxsplit=1)[0]))
    return wanted.index(first) if first in wanted else None


def token_f1(prediction: str, target: str, *, special_tokens: Iterable[str] = ()) -> float:
    """Overlap of the words of two texts, as harmonic mean of precision and recall.

    Texts are compared as bags of words: lower case, without punctuation, articles and special tokens; "3:30" and "1.5"
    are one word each.

    Args:
        prediction: what the model wrote.
        target: what was expected.
        special_tokens: texts such as "<s>" to take out before; ``tokenizer.all_special_tokens``.

    Returns:
        Between 0 and 1; two empty texts agree.

    Source:
        Rajpurkar et al., EMNLP 2016, arXiv:1606.05250, section 6.1. The reference of Co-LoRA sums token ids over the
        test set as sets, special tokens included, which scores wrong one-token answers with .5.

    Example:
        >>> token_f1("the red hat", "red"), token_f1("3:30", "330")  # precision 1/2, recall 1
        (0.6666666666666666, 0.0)
    """
    left, right = (Counter(_content(text, special_tokens)) for text in (prediction, target))
    if not left or not right:
        return float(not left and not right)
    common = (left & right).total()
    return 2 * common / (left.total() + right.total())


def _content(text: str, special_tokens: Iterable[str]) -> list[str]:
    for token in sorted(special_tokens, key=len, reverse=True):
        text = text.replace(token, " ")
    words = [token for token in _tokens(text) if re.search(r"\w", token)]
    return [word for word in words if word not in _ARTICLES] or words  # "A" may be the whole answer


def _tokens(text: str) -> list[str]:
    return [token.casefold() for token in _TOKEN.findall(text)]


def _trimmed(tokens: Sequence[str]) -> list[str]:
    """Without punctuation around, unless there is nothing else."""
    start, stop = 0, len(tokens)
    while start < stop and tokens[start] in _AROUND:
        start += 1
    while stop > start and tokens[stop - 1] in _AROUND:
        stop -= 1
    return list(tokens[start:stop]) or list(tokens)


def _mentioned(said: Sequence[str], wanted: Sequence[Sequence[str]]) -> set[int]:
    """The choices that occur as whole words, and not only inside longer choices."""
    spans = [
        (start, start + len(choice), index)
        for index, choice in enumerate(wanted)
        for start in range(len(said) - len(choice) + 1)
        if list(said[start : start + len(choice)]) == list(choice)
    ]
    return {
        index
        for start, stop, index in spans
        if not any(one <= start and stop <= two and (two - one) > (stop - start) for one, two, _ in spans)
    }


def _are_letters(choices: Sequence[str]) -> bool:
    return all(len(choice.strip()) == 1 and choice.strip().isalpha() for choice in choices)


def _check_distinct(choices: Sequence[str], wanted: Sequence[Sequence[str]]) -> None:
    for index, tokens in enumerate(wanted):
        if not tokens:
            raise ValueError(
                f"A choice must have at least one character, but choice {index} of {list(choices)} is empty."
            )
        if tokens in wanted[:index]:
            twin = choices[wanted.index(tokens)]
            raise ValueError(
                f"Choices must differ in more than case, spaces and punctuation, or no text can tell them apart, but "
                f"{twin!r} and {choices[index]!r} do not."
            )
