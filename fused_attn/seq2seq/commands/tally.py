"""Notes about the sources of a run: those that cannot be read, are long or have unknown symbols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fused_attn.seq2seq.inference.records import Line
from fused_attn.seq2seq.inference.sources import SourceReader

# Most notes of a kind. After them the sources are only counted.
MOST_NOTES = 10


@dataclass
class _Kind:
    count: int = 0
    notes: list[tuple[int, str]] = field(default_factory=list)  # about the first, by number

    def add(self, number: int, text: str) -> list[str]:
        self.count += 1
        if len(self.notes) == MOST_NOTES:
            return []
        self.notes.append((number, text))
        return [text]

    def __add__(self, other: _Kind) -> _Kind:
        return _Kind(self.count + other.count, sorted(self.notes + other.notes)[:MOST_NOTES])


@dataclass
class Tally:
    """Counts sources, and keeps the notes about the first few.

    unit: what a source is called: "line" or "argument".
    """

    unit: str
    total: int = 0
    unread: _Kind = field(default_factory=_Kind)
    long: _Kind = field(default_factory=_Kind)
    unknown: _Kind = field(default_factory=_Kind)  # with symbols that are read as <unk>

    def add(self, number: int, line: Line, reader: SourceReader) -> list[str]:
        """Count a source. Returns the notes about it, if it is one of the first."""
        self.total += 1
        name = f"{self.unit} {number}"
        if line.error is not None:
            return self.unread.add(number, line.problem(name))
        if line.source is None:
            return []
        notes = []
        for kind, text in (
            (self.unknown, reader.unknown_note(name, line.source)),
            (self.long, reader.long_note(name, line.source)),
        ):
            notes += kind.add(number, text) if text else []
        return notes

    def summary(self, reader: SourceReader) -> list[str]:
        """Return the counts as notes: of unread sources, and of others if some have no note."""
        of_all = f"of {self.total:,} {self.unit}{'' if self.total == 1 else 's'}"
        texts = []
        if self.unknown.count > MOST_NOTES:
            texts.append(f"{self.unknown.count:,} {of_all} have unknown symbols")
        if self.long.count > MOST_NOTES:
            texts.append(
                f"{self.long.count:,} {of_all} are longer than the longest source of the training "
                f"({reader.longest_source} symbols)"
            )
        if self.unread.count:
            texts.append(f"{self.unread.count:,} {of_all} could not be read")
        return texts

    @classmethod
    def joined(cls, tallies: Sequence[Tally]) -> Tally:
        """Add up the tallies of several processes, which have shared the sources of a file."""
        first, *others = tallies
        whole = cls(first.unit, first.total, first.unread, first.long, first.unknown)
        for other in others:
            whole.total += other.total
            whole.unread += other.unread
            whole.long += other.long
            whole.unknown += other.unknown
        return whole

    @property
    def notes(self) -> list[str]:
        """The notes about single sources, by number."""
        return [
            text for _, text in sorted(self.unread.notes + self.unknown.notes + self.long.notes)
        ]
