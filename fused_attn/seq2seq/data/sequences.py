"""Integer sequences stored end to end, in memory or in memory-mapped files."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fused_attn.seq2seq.vocabulary import PAD

_ITEM = 4  # bytes of an int32
_BUFFERED = 1 << 16  # numbers to buffer before writing to the file


class Sequences:
    """N integer sequences.

    values: int32 (sum of lengths,), the sequences concatenated. lengths: int32 (N,).
    """

    def __init__(self, values: Tensor, lengths: Tensor) -> None:
        self._values = values
        self.lengths = lengths.long()
        self._starts = self.lengths.cumsum(0) - self.lengths

    @classmethod
    def open(cls, path: Path) -> Sequences:
        """Memory-map what a `SequenceWriter` wrote to ``path``. Pages are read on demand."""
        return cls(*(_mapped(file) for file in sequence_files(path)))

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sequences with the indices ``rows``, int64 (B,).

        Returns int64 (B, longest), padded at the end, and the lengths, int64 (B,).
        """
        lengths = self.lengths[rows]
        positions = torch.arange(int(lengths.max()) if len(lengths) else 0)
        inside = positions < lengths[:, None]
        indices = (self._starts[rows][:, None] + positions).where(inside, 0)
        if not indices.numel():
            return indices, lengths
        return self._values[indices].long().where(inside, PAD), lengths


class SequenceWriter:
    """Collects sequences in memory or, given ``path``, in ``path.values`` and ``path.lengths``."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._parts = (array("i"), array("i"))
        self._open = [] if path is None else [file.open("wb") for file in sequence_files(path)]

    def append(self, numbers: Sequence[int]) -> None:
        """Add a sequence."""
        values, lengths = self._parts
        values.extend(numbers)
        lengths.append(len(numbers))
        if self._open and len(values) > _BUFFERED:
            self._flush()

    def _flush(self) -> None:
        for part, file in zip(self._parts, self._open, strict=True):
            part.tofile(file)
            del part[:]

    def finish(self) -> Sequences:
        """Return the collected sequences, and close the files if there are any."""
        if self._path is None:
            return Sequences(*(_tensor(part) for part in self._parts))
        self._flush()
        for file in self._open:
            file.close()
        return Sequences.open(self._path)


def _tensor(part: array[int]) -> Tensor:
    return torch.frombuffer(part, dtype=torch.int32) if part else torch.empty(0, dtype=torch.int32)


def sequence_files(path: Path) -> tuple[Path, Path]:
    """Return the files of the sequences at ``path``: their values and their lengths."""
    return path.with_name(path.name + ".values"), path.with_name(path.name + ".lengths")


def _mapped(file: Path) -> Tensor:
    size = file.stat().st_size // _ITEM
    if size == 0:
        return torch.empty(0, dtype=torch.int32)
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.int32)
