"""Source-target pairs read from files or given in Python, in any script, checked one by one."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set, Sized
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

from fused_attn.seq2seq.data.links import parse_pharaoh
from fused_attn.seq2seq.data.pairs import Pair, Symbols, fingerprint
from fused_attn.seq2seq.data.tokenizers import Tokenizer, Words
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.vocabulary import UNKNOWN


@dataclass(frozen=True)
class Reader:
    """How texts become pairs.

    source, target: the tokenizers.
    max_length: longest source or target allowed, in symbols.
    skip_bad: skip and count entries that cannot be used, instead of stopping at the first.
    """

    source: Tokenizer = Words()  # noqa: RUF009, it has no state
    target: Tokenizer = Words()  # noqa: RUF009
    max_length: int = 200
    skip_bad: bool = False

    def line(self, columns: Sequence[bytes]) -> Pair:
        """Return the pair in the columns of a line; raises ValueError if the line is not one."""
        if not b"".join(columns).strip():
            raise ValueError("the line is blank")
        if len(columns) not in (2, 3):
            raise ValueError(
                "expected a source and a target separated by a tab, "
                f"got {len(columns)} column{'' if len(columns) == 1 else 's'}"
            )
        try:
            source, target, *links = (column.decode() for column in columns)
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 text (byte {error.start + 1})") from None
        pair = self.pair(source, target)
        return pair._replace(links=_links(links[0], *pair[:2])) if links else pair

    def pair(self, source: str | Sequence[str], target: str | Sequence[str]) -> Pair:
        """Return the pair of two texts, or of two sequences of symbols.

        Raises ValueError if either is empty or longer than ``max_length``.
        """
        pair = Pair(_symbols(source, self.source), _symbols(target, self.target))
        for name, symbols in (("source", pair.source), ("target", pair.target)):
            if not symbols:
                raise ValueError(f"the {name} is empty")
            if len(symbols) > self.max_length:
                raise ValueError(
                    f"the {name} has {len(symbols)} symbols, more than the {self.max_length} "
                    "allowed (max_length)"
                )
        return pair


def _symbols(text: str | Sequence[str], tokenizer: Tokenizer) -> Symbols:
    return tokenizer.split(text) if isinstance(text, str) else tuple(text)


def _links(text: str, source: Symbols, target: Symbols) -> tuple[int, ...]:
    links, _ = parse_pharaoh(text)
    for s, t in links:
        if s >= len(source) or t >= len(target):
            raise ValueError(
                f"the link {s}-{t} is out of range for {len(source)} source and {len(target)} "
                "target symbols"
            )
    return tuple(number for link in sorted(links) for number in link)


class PairSource(ABC, Iterable[Pair]):
    """Pairs that can be iterated over any number of times.

    name: what error messages call this source.
    reader: turns entries into pairs.
    without: sources to leave out.
    known: known target symbols. A target must have at least one of them; None accepts any target.

    Iterating raises `InputError` with the name and the number of the first entry that cannot be
    used, unless the reader skips those, and if there are no usable entries.
    """

    unit: ClassVar[str]  # what error messages call an entry

    def __init__(self, name: str, reader: Reader, without: Collection[Symbols] = ()) -> None:
        self.name = name
        self.reader = reader
        self.without = without
        self.known: Set[str] | None = None
        self.skipped = 0  # entries skipped in the last pass

    @abstractmethod
    def _entries(self) -> Iterator[Any]:
        """Iterate over the raw entries."""

    @abstractmethod
    def _pair(self, entry: Any) -> Pair:
        """Return the pair of an entry; raises ValueError if it is not one."""

    @abstractmethod
    def texts(self) -> Iterator[tuple[str, ...]]:
        """Iterate over the source and target texts as written, before tokenization.

        "" stands for a source or target that is not a text.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest of the entries."""

    def __iter__(self) -> Iterator[Pair]:
        self.skipped = count = 0
        for number, entry in enumerate(self._entries(), start=1):
            try:
                pair = self._pair(entry)
                held_out = pair.source in self.without
                if not (held_out or self.known is None or self.known & set(pair.target)):
                    raise ValueError("the target has only unknown symbols")
            except ValueError as error:
                if not self.reader.skip_bad:
                    raise InputError(f"{self.name}, {self.unit} {number}: {error}") from None
                self.skipped += 1
                continue
            count += 1
            if not held_out:
                yield pair
        if not count:
            if self.skipped:
                raise InputError(f"{self.name}: no usable {self.unit}s ({self.skipped} skipped)")
            raise InputError(f"{self.name} is empty")

    def note(self) -> list[str]:
        """Return notes for the user about the last pass."""
        if not self.skipped:
            return []
        plural = "" if self.skipped == 1 else "s"
        return [f"{self.name}: skipped {self.skipped} bad {self.unit}{plural}"]


class PairFile(PairSource):
    """The pairs of a file. Each pass reads the file again, so it may be larger than memory.

    name: a file with lines SOURCE TAB TARGET, optionally followed by a tab and links in the
        Pharaoh format; or two or three files with one column each, separated by commas.
    """

    unit = "line"

    @property
    def paths(self) -> list[Path]:
        """The files."""
        whole = Path(self.name)
        return [whole] if whole.exists() else [Path(part) for part in self.name.split(",")]

    def _pair(self, entry: Sequence[bytes]) -> Pair:
        return self.reader.line(entry)

    def _entries(self) -> Iterator[Sequence[bytes]]:
        paths = self.paths
        if len(paths) == 1:
            for line in read_lines(paths[0]):
                yield line.split(b"\t")
            return
        for number, columns in enumerate(zip_longest(*map(read_lines, paths)), start=1):
            if None in columns:
                short = paths[columns.index(None)]
                raise InputError(
                    f"{short} ends after line {number - 1}, but another file has more lines"
                )
            yield columns

    def texts(self) -> Iterator[tuple[str, ...]]:
        for columns in self._entries():
            texts = [column.decode(errors="replace") for column in columns[:2]]
            yield tuple("" if "\ufffd" in text else text for text in texts)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


class PairList(PairSource):
    """Pairs in memory.

    pairs: (source, target) tuples, each side a text or a sequence of symbols.
    """

    unit = "pair"

    def __init__(self, name: str, pairs: Sequence[Any], reader: Reader) -> None:
        super().__init__(name, reader)
        self._pairs = pairs

    def _entries(self) -> Iterator[Any]:
        return iter(self._pairs)

    def _pair(self, entry: Any) -> Pair:
        if not _is_list(entry) or len(entry) != 2:
            raise ValueError(f"expected a source and a target, got {_short(entry)}")
        for name, text in zip(("source", "target"), entry, strict=True):
            if isinstance(text, str):
                continue
            if not _is_list(text) or not all(isinstance(symbol, str) for symbol in text):
                raise ValueError(
                    f"the {name} must be a str or a sequence of str, got {_short(text)}"
                )
        try:
            return self.reader.pair(*entry)
        except ValueError as error:
            raise ValueError(f"{error}, in {_short(entry)}") from None

    def texts(self) -> Iterator[tuple[str, ...]]:
        for entry in self._pairs:
            if _is_list(entry) and len(entry) == 2:
                yield tuple(text if isinstance(text, str) else "" for text in entry)

    def fingerprint(self) -> str:
        return fingerprint(self._good())

    def _good(self) -> Iterator[Pair]:
        for entry in self._pairs:
            with suppress(ValueError):
                yield self._pair(entry)


def _is_list(value: object) -> bool:
    """Whether a value has elements in an order: a list, a tuple, a row of an array ..."""
    unordered = isinstance(value, (str, bytes, Mapping, Set))
    return isinstance(value, Iterable) and isinstance(value, Sized) and not unordered


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_text(path: Path) -> str:
    """Return the text of a file; raises `InputError` if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read {path}: {reason}") from None


def read_lines(path: Path) -> Iterator[bytes]:
    """Iterate over the lines of a file, without line ends; raises `InputError`."""
    try:
        with ExitStack() as stack:
            for line in stack.enter_context(path.open("rb")):
                yield line.rstrip(b"\r\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def frequent(counts: Counter[str], min_count: int) -> list[str]:
    """Return `UNKNOWN`, then the symbols counted at least ``min_count`` times, by falling count."""
    kept = [symbol for symbol, count in counts.items() if count >= min_count]
    return [UNKNOWN, *sorted(kept, key=lambda symbol: (-counts[symbol], symbol))]
