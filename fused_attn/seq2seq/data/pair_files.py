"""Pairs of lines from files, as people have them: checked line by line, in any script."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from fused_attn.seq2seq.data.links import parse_pharaoh
from fused_attn.seq2seq.data.pairs import Pair, Symbols
from fused_attn.seq2seq.data.tokenizers import Tokenizer, Words
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.vocabulary import UNKNOWN


@dataclass(frozen=True)
class Reader:
    """How lines become pairs.

    tokenizer: what their symbols are.
    max_length: longest sequence in symbols.
    skip_bad: leave out lines that cannot be used, and count them, instead of stopping at the first.
    """

    tokenizer: Tokenizer = Words()  # noqa: RUF009, it has no state
    max_length: int = 200
    skip_bad: bool = False

    def pair(self, columns: Sequence[bytes]) -> Pair:
        """The pair of a line's columns; raises ValueError that says what is wrong with it."""
        if len(columns) not in (2, 3):
            raise ValueError(f"expected source and target with a tab between, got {len(columns)}")
        try:
            texts = [column.decode() for column in columns]
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not UTF-8 text (byte {error.start + 1})") from None
        source, target = (self.tokenizer.split(text) for text in texts[:2])
        for name, symbols in (("source", source), ("target", target)):
            if not symbols:
                raise ValueError(f"the {name} is empty")
            if len(symbols) > self.max_length:
                raise ValueError(
                    f"the {name} has {len(symbols)} symbols, more than {self.max_length}"
                )
        return Pair(source, target, _links(texts[2], source, target) if len(texts) == 3 else ())


def _links(text: str, source: Symbols, target: Symbols) -> tuple[int, ...]:
    links, _ = parse_pharaoh(text)
    for s, t in links:
        if s >= len(source) or t >= len(target):
            raise ValueError(f"the link {s}-{t} is outside of {len(source)} and {len(target)}")
    return tuple(number for link in sorted(links) for number in link)


class PairFile:
    """The pairs of a file, read anew each time they are gone through: it may be larger than memory.

    name: of a file of lines source TAB target, with links in Pharaoh's format behind another tab if
        they are known; or of two or three such files of one column each, with commas between.
    without: sources that are left out.

    Going through raises `InputError` with file and line for a pair that cannot be used, or if
    there is none.
    """

    def __init__(self, name: str, reader: Reader, without: Collection[Symbols] = ()) -> None:
        self.name = name
        self.reader = reader
        self.without = without
        self.known: Collection[str] | None = None  # symbols of targets; of one is needed at least
        self.skipped = 0  # lines of the last pass

    @property
    def paths(self) -> list[Path]:
        """The files."""
        whole = Path(self.name)
        return [whole] if whole.exists() else [Path(part) for part in self.name.split(",")]

    def __iter__(self) -> Iterator[Pair]:
        self.skipped = count = 0
        for number, columns in enumerate(self._columns(), start=1):
            try:
                pair = self.reader.pair(columns)
                if self.known is not None and not any(t in self.known for t in pair.target):
                    raise ValueError("the target has only unknown symbols")
            except ValueError as error:
                if not self.reader.skip_bad:
                    raise InputError(f"{self.name}, line {number}: {error}") from None
                self.skipped += 1
                continue
            count += 1
            if pair.source not in self.without:
                yield pair
        if not count:
            what = f": all {self.skipped} lines are bad" if self.skipped else " is empty"
            raise InputError(f"{self.name}{what}")

    def _columns(self) -> Iterator[Sequence[bytes]]:
        paths = self.paths
        if len(paths) == 1:
            for line in read_lines(paths[0]):
                yield line.split(b"\t")
            return
        for number, columns in enumerate(zip_longest(*map(read_lines, paths)), start=1):
            if None in columns:
                short = paths[columns.index(None)]
                raise InputError(f"{short} ends before line {number}, which the others have")
            yield columns

    def texts(self) -> Iterator[str]:
        """The sources and targets as they are written; lines that are no text are left out."""
        for columns in self._columns():
            for column in columns[:2]:
                text = column.decode(errors="replace")
                if "\ufffd" not in text and text.strip():
                    yield text

    def fingerprint(self) -> str:
        """A digest of the files."""
        digest = hashlib.sha256()
        for path in self.paths:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def note(self) -> list[str]:
        """What to tell people of the last pass."""
        return [f"{self.name}: {self.skipped} bad lines were left out"] if self.skipped else []


def read_text(path: Path) -> str:
    """The text of a file; raises `InputError`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read {path}: {reason}") from None


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file without their ends; raises `InputError`."""
    try:
        with ExitStack() as stack:
            for line in stack.enter_context(path.open("rb")):
                yield line.rstrip(b"\r\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def frequent(counts: Counter[str], min_count: int) -> list[str]:
    """The symbols that were counted ``min_count`` times at least, the most frequent first.

    One for unknown symbols leads them.
    """
    kept = [symbol for symbol, count in counts.items() if count >= min_count]
    return [UNKNOWN, *sorted(kept, key=lambda symbol: (-counts[symbol], symbol))]
