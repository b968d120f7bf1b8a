"""Pairs of lines from files, as people have them: checked line by line, in any script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.vocabulary import UNKNOWN

TOKENS = ("words", "chars")
# Stands for a space where symbols are characters.
SPACE = "▁"

Sequences = tuple[str, ...]


@dataclass(frozen=True)
class Reader:
    """How lines become pairs.

    tokens: "words" splits at white space, "chars" takes every character.
    max_length: longest sequence in symbols.
    skip_bad: leave out lines that cannot be used, and count them, instead of stopping at the first.
    """

    tokens: str = "words"
    max_length: int = 200
    skip_bad: bool = False

    def split(self, text: str) -> Sequences:
        """The symbols of a text."""
        words = text.split()
        return tuple(words) if self.tokens == "words" else tuple(SPACE.join(words))

    def join(self, symbols: Iterable[str]) -> str:
        """The text of symbols."""
        if self.tokens == "words":
            return " ".join(symbols)
        return "".join(symbols).replace(SPACE, " ")

    def read(self, path: Path) -> tuple[list[tuple[Sequences, Sequences]], int]:
        """Read lines ``source TAB target``: the pairs, and how many lines were left out.

        Raises `InputError` with file and line for one that cannot be used, and for a file without
        any that can.
        """
        found, skipped = [], 0
        for number, line in enumerate(_lines(path), start=1):
            try:
                found.append(self._pair(line))
            except ValueError as error:
                if not self.skip_bad:
                    raise InputError(f"{path}, line {number}: {error}") from None
                skipped += 1
        if not found:
            what = f": all {skipped} lines are bad" if skipped else " is empty"
            raise InputError(f"{path}{what}")
        return found, skipped

    def _pair(self, line: bytes) -> tuple[Sequences, Sequences]:
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not UTF-8 text (byte {error.start + 1})") from None
        columns = text.split("\t")
        if len(columns) != 2:
            raise ValueError(f"expected source and target with a tab between, got {len(columns)}")
        source, target = (self.split(column) for column in columns)
        for name, symbols in (("source", source), ("target", target)):
            if not symbols:
                raise ValueError(f"the {name} is empty")
            if len(symbols) > self.max_length:
                raise ValueError(
                    f"the {name} has {len(symbols)} symbols, more than {self.max_length}"
                )
        return source, target


def read_text(path: Path) -> str:
    """The text of a file; raises `InputError`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read {path}: {reason}") from None


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            for line in file:
                yield line.rstrip(b"\r\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def open_vocabulary(sequences: Iterable[Sequence[str]], min_count: int) -> list[str]:
    """The symbols that come at least ``min_count`` times, the most frequent first.

    One for unknown symbols leads them.
    """
    counts = Counter(symbol for sequence in sequences for symbol in sequence)
    frequent = [symbol for symbol, count in counts.items() if count >= min_count]
    return [UNKNOWN, *sorted(frequent, key=lambda symbol: (-counts[symbol], symbol))]
