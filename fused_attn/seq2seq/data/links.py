"""Alignment links between source and target symbols, in the Pharaoh format."""

from __future__ import annotations

from collections.abc import Iterable

from fused_attn.seq2seq.data.texts import quoted
from fused_attn.seq2seq.metrics import Link

_DIGITS = 9  # of a position


def pharaoh(links: Iterable[Link]) -> str:
    """Write links as sorted ``source-target`` pairs: the format of Pharaoh, Giza and fast_align."""
    return " ".join(f"{source}-{target}" for source, target in sorted(links))


def _is_position(text: str) -> bool:
    return text.isdecimal() and len(text) <= _DIGITS


def parse_pharaoh(text: str) -> tuple[set[Link], set[Link]]:
    """Return the sure and the possible links of a line.

    ``0-0`` is a sure link, ``0?1`` or ``0p1`` a possible one. The possible links include the sure
    ones. Raises ValueError that quotes the first word that is not a link.
    """
    sure: set[Link] = set()
    possible: set[Link] = set()
    for word in text.split():
        mark = next((mark for mark in "-?p" if mark in word), None)
        first, _, second = word.partition(mark) if mark else (word, "", "")
        if mark is None or not (_is_position(first) and _is_position(second)):
            raise ValueError(
                f"{quoted(word)} is not a link: expected 0-1, or 0?1 for a possible link"
            )
        link = (int(first), int(second))
        possible.add(link)
        if mark == "-":
            sure.add(link)
    return sure, possible
