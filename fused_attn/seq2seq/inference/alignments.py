"""Alignments as text, and what they are good for: links, error rates, symbols to copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fused_attn.seq2seq.vocabulary import UNKNOWN

if TYPE_CHECKING:  # the command line reads this before it needs torch
    from torch import Tensor

Link = tuple[int, int]  # positions in source and target, from 0


def hard_links(weights: Tensor) -> list[Link]:
    """For each target symbol the source symbol with the largest weight, of weights (T, S)."""
    if not weights.numel():
        return []
    return [(int(source), target) for target, source in enumerate(weights.argmax(dim=1))]


def pharaoh(links: Iterable[Link]) -> str:
    """Links as ``source-target`` pairs, sorted: the format of Pharaoh, Giza and fast_align."""
    return " ".join(f"{source}-{target}" for source, target in sorted(links))


def parse_pharaoh(text: str) -> tuple[set[Link], set[Link]]:
    """Sure and possible links of a line: ``0-0`` is sure, ``0?1`` (or ``0p1``) possible.

    Sure links are possible too. Raises ValueError that names what cannot be read.
    """
    sure: set[Link] = set()
    possible: set[Link] = set()
    for word in text.split():
        mark = next((mark for mark in "-?p" if mark in word), None)
        first, _, second = word.partition(mark) if mark else (word, "", "")
        if mark is None or not (first.isdecimal() and second.isdecimal()):
            raise ValueError(f"{word!r} is no link: expected 0-1, or 0?1 for a possible one")
        link = (int(first), int(second))
        possible.add(link)
        if mark == "-":
            sure.add(link)
    return sure, possible


def soft_alignment(weights: Tensor) -> str:
    """A row of weights for each target symbol, rows separated by a tab."""
    rows = [" ".join(f"{weight:.4f}" for weight in row) for row in weights.tolist()]
    return "\t".join(rows)


def alignment_error_rate(
    found: Sequence[Iterable[Link]], gold: Sequence[tuple[set[Link], set[Link]]]
) -> float:
    """``1 - (|A & S| + |A & P|) / (|A| + |S|)`` over all sentences (Och & Ney 2003).

    gold: sure and possible links of each sentence, as `parse_pharaoh` gives them. Raises ValueError
    if there is no link at all.
    """
    matches = links = 0
    for ours, (sure, possible) in zip(map(set, found), gold, strict=True):
        matches += len(ours & sure) + len(ours & (possible | sure))
        links += len(ours) + len(sure)
    if not links:
        raise ValueError("there is no link to judge")
    return 1.0 - matches / links


def replace_unknown(
    target: Sequence[str], source: Sequence[str], weights: Tensor | None
) -> tuple[str, ...]:
    """Put the source symbol with the largest weight in place of each unknown target symbol.

    Luong et al. 2015, section 4.1 (there with a dictionary behind it). weights: (T, S).
    """
    if weights is None or UNKNOWN not in target or not weights.numel():
        return tuple(target)
    copied = {place: source[at] for at, place in hard_links(weights)}
    return tuple(
        copied[place] if symbol == UNKNOWN else symbol for place, symbol in enumerate(target)
    )
