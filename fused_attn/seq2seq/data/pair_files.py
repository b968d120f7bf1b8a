"""Source-target pairs read from files or given in Python, in any script, checked one by one."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set, Sized
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

from fused_attn.seq2seq.data.links import parse_pharaoh
from fused_attn.seq2seq.data.pairs import Pair, Symbols, fingerprint
from fused_attn.seq2seq.data.text_files import check_file, read_lines
from fused_attn.seq2seq.data.texts import BadEntry, cleaned, counted, decoded, quoted
from fused_attn.seq2seq.data.tokenizers import Tokenizer, Words
from fused_attn.seq2seq.errors import InputError
from fused_attn.seq2seq.vocabulary import UNKNOWN


@dataclass(frozen=True)
class Reader:
    """How texts become pairs.

    source, target: the tokenizers.
    max_length: longest source or target allowed, in symbols.
    skip_bad: skip and count entries that cannot be used, instead of stopping at the first.
    links: whether a third column is read as alignment links; otherwise it is ignored.
    trains: whether the pairs are read for a training, whose options error messages may name.
    """

    source: Tokenizer = Words()  # noqa: RUF009, it is immutable
    target: Tokenizer = Words()  # noqa: RUF009
    max_length: int = 200
    skip_bad: bool = False
    links: bool = False
    trains: bool = True

    def columns(self, columns: Sequence[str]) -> Pair:
        """Return the pair in the columns of a line; raises ValueError if the line is not one."""
        if not "".join(columns).strip() or not (columns[1:] or cleaned(columns[0])):
            raise ValueError("the line is blank")
        if len(columns) < 2:
            raise ValueError(
                "expected a source and a target separated by a tab, "
                f"got 1 column, {quoted(columns[0])}"
            )
        pair = self.pair(columns[0], columns[1])
        if not self.links or len(columns) == 2:
            return pair
        if len(columns) > 3:
            raise BadEntry(
                f"expected a source, a target and links separated by tabs, got {len(columns)} "
                "columns",
                _WITHOUT_GUIDED,
            )
        return pair._replace(links=_links(columns[2], *pair[:2]))

    def pair(self, source: str | Sequence[str], target: str | Sequence[str]) -> Pair:
        """Return the pair of two texts, or of two sequences of symbols.

        Raises ValueError if either is empty, longer than ``max_length``, or has an empty token.
        """
        pair = Pair(_symbols(source, self.source), _symbols(target, self.target))
        for name, symbols in (("source", pair.source), ("target", pair.target)):
            if not symbols:
                raise ValueError(f"the {name} is empty")
            if "" in symbols:
                raise ValueError(f"the {name} has an empty token")
            if len(symbols) > self.max_length:
                raise BadEntry(
                    f"the {name} has {len(symbols)} symbols, more than the {self.max_length} "
                    "allowed",
                    "--max-length allows longer ones",
                )
        return pair

    def hint(self, error: ValueError, unit: str) -> str | None:
        """Return what helps against an error in an entry, with options as they are typed."""
        if not self.trains:
            return None
        own = error.hint if isinstance(error, BadEntry) else None
        return ", ".join(filter(None, (own, f"--skip-bad skips such {unit}s")))


_WITHOUT_GUIDED = "without --guided only the first two columns are read"


def _symbols(text: str | Sequence[str], tokenizer: Tokenizer) -> Symbols:
    return tokenizer.split(text) if isinstance(text, str) else tuple(text)


def _links(text: str, source: Symbols, target: Symbols) -> tuple[int, ...]:
    try:
        links, _ = parse_pharaoh(text)
        for s, t in links:
            if s >= len(source) or t >= len(target):
                raise ValueError(
                    f"the link {s}-{t} is out of range for {len(source)} source and "
                    f"{len(target)} target symbols"
                )
    except ValueError as error:
        raise BadEntry(f"{error}, in the third column {quoted(text)}", _WITHOUT_GUIDED) from None
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
        # Counts of the last pass.
        self.skipped = self.held_out = self.used = 0

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
        self.skipped = self.held_out = self.used = 0
        first: str | None = None  # the reason to skip the first one
        for number, entry in enumerate(self._entries(), start=1):
            try:
                pair = self._pair(entry)
                held_out = pair.source in self.without
                if not (held_out or self.known is None or self.known & set(pair.target)):
                    raise ValueError("the target has only unknown symbols")
            except ValueError as error:
                place = f"{self.unit} {number}: {error}"
                if not self.reader.skip_bad:
                    hint = self.reader.hint(error, self.unit)
                    raise InputError(f"{self.name}, {place}", hint) from None
                self.skipped += 1
                first = first or place
                continue
            if held_out:
                self.held_out += 1
            else:
                self.used += 1
                yield pair
        if self.skipped and not self.used + self.held_out:
            raise InputError(
                f"{self.name}: no usable {self.unit}s ({self.skipped} skipped), first {first}"
            )
        if not self.used + self.held_out:
            raise InputError(f"{self.name} is empty")

    def notes(self) -> list[str]:
        """Return notes for the user about the last pass."""
        if not self.skipped:
            return []
        return [f"{self.name}: skipped {counted(self.skipped, f'bad {self.unit}')}"]


class PairFile(PairSource):
    """The pairs of a file. Each pass reads the file again, so it may be larger than memory.

    name: a file with lines SOURCE TAB TARGET; or two files with one column each, separated by a
        comma. If the reader wants alignment links, a third column (or file) has them in the
        Pharaoh format, and may be empty. Other columns are ignored, which `notes` tells.
    read_once: whether the file will be read only once. It may be a FIFO then.
    """

    unit = "line"

    def __init__(self, name: str, reader: Reader, *, read_once: bool = False) -> None:
        super().__init__(name, reader)
        self._read_once = read_once
        self._ignored = 0  # lines with other columns, in the last pass
        self._first_ignored = ""

    @property
    def paths(self) -> list[str]:
        """The files; raises `InputError` if there are more than three."""
        paths = [self.name] if os.path.exists(self.name) else self.name.split(",")
        if len(paths) > 3:
            raise InputError(
                f"expected the sources, the targets and perhaps the links in files of their own, "
                f"got {len(paths)} files: {self.name}"
            )
        return paths

    def _pair(self, entry: bytes | Sequence[bytes]) -> Pair:
        columns = self._columns(entry)
        pair = self.reader.columns(columns)
        if len(columns) > 2 and not self.reader.links and any(map(cleaned, columns[2:])):
            self._ignored += 1
            if self._ignored == 1:
                self._first_ignored = "\t".join(columns[2:])
        return pair

    def _columns(self, entry: bytes | Sequence[bytes]) -> list[str]:
        """The columns of a line, or of one line of each file."""
        if isinstance(entry, bytes):
            return decoded(entry).split("\t")
        columns: list[str] = []
        for column in entry:
            try:
                columns.append(decoded(column))
            except BadEntry as error:
                raise BadEntry(f"in {self.paths[len(columns)]}: {error}") from None
        return columns

    def _entries(self) -> Iterator[bytes | Sequence[bytes]]:
        self._ignored = 0
        paths = self.paths
        if not self._read_once:
            for path in paths:
                check_file(path)
        # Models of earlier versions read texts as they are, and so lines.
        universal = self.reader.source.normalization is not None
        files = [read_lines(path, universal=universal) for path in paths]
        if len(files) == 1:
            yield from files[0]
            return
        for number, columns in enumerate(zip_longest(*files), start=1):
            if None in columns:
                short = paths[columns.index(None)]
                other = next(path for path, c in zip(paths, columns, strict=True) if c is not None)
                raise InputError(
                    f"{short} ends after line {number - 1}, but {other} has more lines"
                )
            yield columns

    def texts(self) -> Iterator[tuple[str, ...]]:
        for entry in self._entries():
            columns = entry.split(b"\t") if isinstance(entry, bytes) else entry
            texts = [column.decode(errors="replace") for column in columns[:2]]
            yield tuple("" if "\ufffd" in text else text for text in texts)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            check_file(path)
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def notes(self) -> list[str]:
        found = super().notes()
        if self._ignored:
            hint = "; --guided reads links from the third column" if self.reader.trains else ""
            found.append(
                f"{self.name}: ignored what follows the second column in "
                f"{counted(self._ignored, 'line')}, first {quoted(self._first_ignored)}{hint}"
            )
        return found


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
            raise ValueError(f"expected a source and a target, got {quoted(entry)}")
        for name, text in zip(("source", "target"), entry, strict=True):
            is_text = isinstance(text, str)
            if not is_text and not (_is_list(text) and all(isinstance(part, str) for part in text)):
                raise ValueError(
                    f"the {name} must be a str or a sequence of str, got {quoted(text)}"
                )
            if any(map(_has_surrogate, text)):
                raise ValueError(f"the {name} has half of a surrogate pair, in {quoted(text)}")
        try:
            return self.reader.pair(*entry)
        except BadEntry as error:
            raise BadEntry(f"{error}, in {quoted(entry)}", error.hint) from None
        except ValueError as error:
            raise ValueError(f"{error}, in {quoted(entry)}") from None

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


def _has_surrogate(text: str) -> bool:
    """Whether UTF-8 cannot encode a text."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def frequent(counts: Counter[str], min_count: int) -> list[str]:
    """Return `UNKNOWN`, then the symbols counted at least ``min_count`` times, by falling count.

    `UNKNOWN` in the data is the unknown symbol itself.
    """
    kept = [s for s, count in counts.items() if count >= min_count and s != UNKNOWN]
    return [UNKNOWN, *sorted(kept, key=lambda symbol: (-counts[symbol], symbol))]
