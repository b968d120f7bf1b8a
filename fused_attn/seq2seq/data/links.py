"""Links between the symbols of a source and a target, in the format of Pharaoh."""

from __future__ import annotations

from collections.abc import Iterable

from fused_attn.seq2seq.metrics import Link


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
