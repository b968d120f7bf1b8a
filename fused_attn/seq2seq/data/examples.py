"""Encoded source-target pairs, and how they are batched in each epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fused_attn.seq2seq.config import TrainingConfig
from fused_attn.seq2seq.data.sequences import Sequences, SequenceWriter, sequence_files
from fused_attn.seq2seq.data.soft_targets import SoftTargets, SoftTargetTable
from fused_attn.seq2seq.devices import moved
from fused_attn.seq2seq.vocabulary import BOS, EOS, PAD


@dataclass(frozen=True)
class Batch:
    """B pairs, padded at the end to the longest source (S) and the longest target (T + 1)."""

    source: Tensor  # int64 (B, S)
    source_lengths: Tensor  # int64 (B,)
    target: Tensor  # int64 (B, T + 1), BOS ... EOS
    tokens: int  # target symbols to predict, EOS included
    alignment: Tensor | None = None  # float32 (B, T, S); each row sums to 1, or is 0 without links
    soft_targets: SoftTargets | None = None  # from the teachers, for distillation

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device. The source lengths stay where they are: the host reads
        them.
        """
        return Batch(
            moved(self.source, device),
            self.source_lengths,
            moved(self.target, device),
            self.tokens,
            None if self.alignment is None else moved(self.alignment, device),
            None if self.soft_targets is None else self.soft_targets.to(device),
        )


# Source and target ids without BOS and EOS, and the links between them, if any: a flat list of
# 0-based positions source, target, source, target, ...
Encoded = tuple[Sequence[int], Sequence[int], Sequence[int]]


class Examples:
    """Encoded pairs with random access.

    soft_targets: the teachers' probabilities when training with distillation, else None.
    """

    def __init__(self, source: Sequences, target: Sequences, links: Sequences) -> None:
        self._source = source
        self._target = target
        self._links = links
        self.soft_targets: SoftTargetTable | None = None

    @classmethod
    def of(cls, sources: Iterable[Sequence[int]], targets: Iterable[Sequence[int]]) -> Self:
        """Keep pairs of id sequences, without BOS and EOS, in memory."""
        return cls.collect((s, t, ()) for s, t in zip(sources, targets, strict=True))

    @classmethod
    def collect(cls, pairs: Iterable[Encoded], directory: Path | None = None) -> Self:
        """Keep pairs in memory, or in files in ``directory``.

        With files, about 40 bytes per pair stay in memory. Raises OSError if the files cannot be
        written.
        """
        writers = [SequenceWriter(directory and directory / name) for name in _COLUMNS]
        for source, target, links in pairs:
            for writer, part in zip(writers, (source, [BOS, *target, EOS], links), strict=True):
                writer.append(part)
        return cls(*(writer.finish() for writer in writers))

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open the pairs that `collect` wrote to ``directory``."""
        return cls(*(Sequences.open(directory / name) for name in _COLUMNS))

    def __len__(self) -> int:
        return len(self._source)

    @property
    def has_links(self) -> bool:
        """Whether any pair has links."""
        return bool((self._links.lengths > 0).any())

    @property
    def source_lengths(self) -> Tensor:
        """int64 (N,)."""
        return self._source.lengths

    @property
    def target_lengths(self) -> Tensor:
        """int64 (N,), BOS and EOS included."""
        return self._target.lengths

    def batch(self, rows: Tensor) -> Batch:
        """Return the pairs with the indices ``rows``, int64 (B,), as a batch."""
        source, lengths = self._source.rows(rows)
        target, target_lengths = self._target.rows(rows)
        tokens = int(target_lengths.sum()) - len(rows)
        links, counts = self._links.rows(rows)
        alignment = None
        if int(counts.sum()):
            alignment = _alignment(links, counts, (len(rows), target.shape[1] - 1, source.shape[1]))
        soft = None if self.soft_targets is None else self.soft_targets.rows(rows)
        return Batch(source, lengths, target, tokens, alignment, soft)


_COLUMNS = ("source", "target", "links")
# The names of all files in the directory of `Examples.collect`.
FILES = {file.name for name in _COLUMNS for file in sequence_files(Path(name))}


def _alignment(links: Tensor, counts: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Links as attention weights (B, T, S): equal weights on the linked source symbols."""
    row, link = (torch.arange(links.shape[1]) < counts[:, None])[:, ::2].nonzero(as_tuple=True)
    source, target = links[:, ::2][row, link], links[:, 1::2][row, link]
    linked = torch.zeros(shape)
    linked[row, target, source] = 1.0
    return linked / linked.sum(dim=2, keepdim=True).clamp(min=1.0)


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ``sequences`` padded at the end, int64 (N, longest), and their lengths, int64 (N,)."""
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths, default=0)
    # Padding lists takes a third of the time of padding a tensor, for one word.
    numbers: list[int] = []
    for sequence, length in zip(sequences, lengths, strict=True):
        numbers += sequence
        numbers += [PAD] * (longest - length)
    padded = torch.tensor(numbers, dtype=torch.int64).view(len(lengths), longest)
    return padded, torch.tensor(lengths, dtype=torch.int64)


def epoch_batches(examples: Examples, config: TrainingConfig, epoch: int) -> list[Tensor]:
    """Return the batches of an epoch, each as the indices of its pairs, int64 (B,).

    The order depends only on the arguments, so a run resumes in the middle of an epoch without a
    saved generator state. With ``config.bucket`` the sources of a batch have equal length, which
    avoids packing; the lengths of the targets vary. Pairs left over from each length are collected
    into mixed batches: a small batch of a rare length would otherwise be an optimizer step of its
    own, with the weight of a full batch.
    """
    generator = torch.Generator().manual_seed((config.seed << 20) + epoch)
    order = torch.randperm(len(examples), generator=generator)
    if not config.bucket:
        return list(order.split(config.batch_size))
    lengths = examples.source_lengths[order]
    # A stable sort keeps the random order within each length.
    counts = lengths.unique(return_counts=True)[1].tolist()
    cut = _by_pairs if config.batch_tokens is None else _by_tokens
    batches: list[Tensor] = []
    left_over: list[Tensor] = []
    for rows in order[lengths.argsort(stable=True)].split(counts):
        full, rest = cut(examples, rows, config)
        batches += full
        left_over.append(rest)
    mixed = torch.cat(left_over)
    if len(mixed):
        full, rest = cut(examples, mixed, config)
        batches += [*full, rest] if len(rest) else full
    shuffled = torch.randperm(len(batches), generator=generator)
    return [batches[i] for i in shuffled.tolist()]


def _by_pairs(
    examples: Examples, rows: Tensor, config: TrainingConfig
) -> tuple[list[Tensor], Tensor]:
    """Full batches of ``config.batch_size`` pairs, and the pairs left over."""
    full = len(rows) // config.batch_size * config.batch_size
    # Not sorted by target length. Sorting saves some padding, but the pairs of a batch with equal
    # target lengths are too much alike, and models trained on such batches are worse (DESIGN).
    return list(rows[:full].split(config.batch_size)) if full else [], rows[full:]


def _by_tokens(
    examples: Examples, rows: Tensor, config: TrainingConfig
) -> tuple[list[Tensor], Tensor]:
    """Batches of at most ``config.batch_tokens`` symbols, padding included, and the pairs left
    over. A pair longer than that is a batch by itself.
    """
    assert config.batch_tokens is not None
    widths = examples.source_lengths[rows] + examples.target_lengths[rows]
    by_width = widths.argsort(stable=True)
    rows, widths = rows[by_width], widths[by_width]
    batches: list[Tensor] = []
    while len(rows):
        most = max(1, config.batch_tokens // int(widths[0]))
        area = torch.arange(1, min(most, len(rows)) + 1) * widths[:most]
        count = max(1, int((area <= config.batch_tokens).sum()))
        if count == len(rows) and int(area[-1]) < config.batch_tokens // 2:
            break  # the last batch would be less than half full
        batches.append(rows[:count])
        rows, widths = rows[count:], widths[count:]
    return batches, rows


def split_batch(rows: Tensor, parts: int) -> list[Tensor]:
    """Split a batch into ``parts`` whose sizes differ by at most one; some may be empty."""
    return list(rows.tensor_split(parts))
