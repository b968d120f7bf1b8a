"""Pairs of sequences of symbols: what a model learns from, and what it is judged on.

No torch here: the command line reads the tasks before it needs torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fused_attn.seq2seq.vocabulary import Vocabulary

Symbols = tuple[str, ...]

# Share of the pairs that is held out for development where a task has no split of its own.
DEV_SHARE = 0.02


class Pair(NamedTuple):
    """A source and its target, with the links between their symbols, where they are known.

    links: positions source, target, source, target ..., from 0.
    """

    source: Symbols
    target: Symbols
    links: tuple[int, ...] = ()


@dataclass(frozen=True)
class Item:
    """A source to judge a model on, and the targets that are right."""

    source: Symbols
    references: tuple[Symbols, ...]


@dataclass(frozen=True)
class Data:
    """What a task makes of its configuration.

    train: can be gone through any number of times; a large one is read from its file each time.
    fingerprint: of the training pairs.
    notes: for people, on what is odd.
    """

    source: Vocabulary
    target: Vocabulary
    train: Iterable[Pair]
    dev: Sequence[Item]
    test: Sequence[Item]
    fingerprint: str
    notes: tuple[str, ...] = ()


def fingerprint(pairs: Iterable[Pair]) -> str:
    """A digest of pairs."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr(tuple(pair)).encode())
    return digest.hexdigest()


def grouped(pairs: Iterable[Pair]) -> list[Item]:
    """Items of pairs; targets of one source are its references."""
    targets: dict[Symbols, list[Symbols]] = {}
    for pair in pairs:
        targets.setdefault(pair.source, []).append(pair.target)
    return [Item(source, tuple(dict.fromkeys(found))) for source, found in targets.items()]


def place(symbols: Iterable[str]) -> float:
    """A place in 0..1 by hash: it stays whatever other pairs there are."""
    digest = hashlib.sha256("\0".join(symbols).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
