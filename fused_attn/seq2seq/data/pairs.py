"""Source-target pairs as sequences of symbols: training data and held-out data.

This module does not import torch: the command line answers ``--help`` without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fused_attn.seq2seq.vocabulary import Vocabulary

Symbols = tuple[str, ...]

# Share of the pairs held out as the development set by tasks without a split of their own.
DEV_SHARE = 0.02


class Pair(NamedTuple):
    """A source and its target, with the alignment links between them if known.

    links: a flat list of 0-based positions source, target, source, target, ...
    """

    source: Symbols
    target: Symbols
    links: tuple[int, ...] = ()


@dataclass(frozen=True)
class Item:
    """A source to evaluate a model on, and its correct targets."""

    source: Symbols
    references: tuple[Symbols, ...]


@dataclass(frozen=True)
class Data:
    """The data of a task: vocabularies, training pairs, development and test sets.

    train: iterable any number of times. Large data is read from its file in each pass.
    fingerprint: a digest of the training pairs.
    notes: remarks about the data to show the user, such as how many lines were skipped. They name
        options as they are typed: ``--dev``.
    """

    source: Vocabulary
    target: Vocabulary
    train: Iterable[Pair]
    dev: Sequence[Item]
    test: Sequence[Item]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def dev_fingerprint(self) -> str:
        """A digest of the development pairs, which does not depend on where they are stored."""
        return fingerprint(Pair(item.source, r) for item in self.dev for r in item.references)


def fingerprint(pairs: Iterable[Pair]) -> str:
    """Return the SHA-256 digest of pairs, in hexadecimal."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr(tuple(pair)).encode())
    return digest.hexdigest()


def grouped(pairs: Iterable[Pair]) -> list[Item]:
    """Return one item per distinct source; its references are all targets of that source."""
    targets: dict[Symbols, list[Symbols]] = {}
    for pair in pairs:
        targets.setdefault(pair.source, []).append(pair.target)
    return [Item(source, tuple(dict.fromkeys(found))) for source, found in targets.items()]


def unit_hash(symbols: Iterable[str]) -> float:
    """Hash symbols to a number in [0, 1), for splits that do not depend on the other pairs."""
    digest = hashlib.sha256("\0".join(symbols).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
