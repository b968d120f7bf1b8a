"""Pairs of sequences as tensors, and the batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fused_attn.seq2seq.config import TrainingConfig
from fused_attn.seq2seq.data.sequences import Sequences, SequenceWriter
from fused_attn.seq2seq.data.soft_targets import SoftTargets, SoftTargetTable
from fused_attn.seq2seq.devices import moved
from fused_attn.seq2seq.vocabulary import BOS, EOS, PAD


@dataclass(frozen=True)
class Batch:
    """Pairs cut to the longest among them."""

    source: Tensor  # int64 (B, S)
    source_lengths: Tensor  # int64 (B,)
    target: Tensor  # int64 (B, T + 1), BOS ... EOS
    tokens: int  # target symbols to predict, EOS included
    alignment: Tensor | None = None  # float32 (B, T, S), rows of links that sum to 1, or of zeros
    soft_targets: SoftTargets | None = None  # the teachers'

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, but for the lengths of its sources: the host reads them."""
        return Batch(
            moved(self.source, device),
            self.source_lengths,
            moved(self.target, device),
            self.tokens,
            None if self.alignment is None else moved(self.alignment, device),
            None if self.soft_targets is None else self.soft_targets.to(device),
        )


# Source and target as numbers, without BOS and EOS, and the links between them, if there are any:
# numbers source, target, source, target ..., both counted from 0.
Encoded = tuple[Sequence[int], Sequence[int], Sequence[int]]


class Examples:
    """Encoded pairs, from which any can be drawn at once.

    soft_targets: the teachers', for training with distillation; None without.
    """

    def __init__(self, source: Sequences, target: Sequences, links: Sequences) -> None:
        self._source = source
        self._target = target
        self._links = links
        self.soft_targets: SoftTargetTable | None = None

    @classmethod
    def of(cls, sources: Iterable[Sequence[int]], targets: Iterable[Sequence[int]]) -> Self:
        """Keep pairs of sequences, without BOS and EOS, in memory."""
        return cls.collect((s, t, ()) for s, t in zip(sources, targets, strict=True))

    @classmethod
    def collect(cls, pairs: Iterable[Encoded], directory: Path | None = None) -> Self:
        """Keep pairs in memory, or in files in a directory; about 40 bytes a pair stay in memory.

        Raises OSError if the files cannot be written.
        """
        writers = [SequenceWriter(directory and directory / name) for name in _COLUMNS]
        for source, target, links in pairs:
            for writer, part in zip(writers, (source, [BOS, *target, EOS], links), strict=True):
                writer.append(part)
        return cls(*(writer.finish() for writer in writers))

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read pairs from where `collect` put them."""
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
        """int64 (N,), with BOS and EOS."""
        return self._target.lengths

    def batch(self, rows: Tensor) -> Batch:
        """Return the pairs ``rows``, int64 (B,), as a batch."""
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


def _alignment(links: Tensor, counts: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The links of each pair as shares of each target symbol's weight."""
    row, place = (torch.arange(links.shape[1]) < counts[:, None])[:, ::2].nonzero(as_tuple=True)
    source, target = links[:, ::2][row, place], links[:, 1::2][row, place]
    linked = torch.zeros(shape)
    linked[row, target, source] = 1.0
    return linked / linked.sum(dim=2, keepdim=True).clamp(min=1.0)


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ``sequences`` as int64 (N, longest), padded at the end, and their lengths (N,)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = torch.full((len(sequences), int(lengths.max()) if len(sequences) else 0), PAD)
    inside = torch.arange(padded.shape[1]) < lengths[:, None]
    padded[inside] = torch.tensor([number for sequence in sequences for number in sequence])
    return padded, lengths


def epoch_batches(examples: Examples, config: TrainingConfig, epoch: int) -> list[Tensor]:
    """Return the batches of an epoch, each as row numbers int64.

    The order depends on the arguments only, so that a run resumes inside an epoch without any
    state of a generator. With ``config.bucket`` sources in a batch are equally long, which spares
    packing; their targets are as they come. What a length leaves over fills mixed batches: small
    batches of the rare lengths would be steps of their own, as large as those of a full batch.
    """
    generator = torch.Generator().manual_seed((config.seed << 20) + epoch)
    order = torch.randperm(len(examples), generator=generator)
    if not config.bucket:
        return list(order.split(config.batch_size))
    lengths = examples.source_lengths[order]
    # A stable sort leaves the pairs of each length in their random order.
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
    """Full batches of equally many pairs, and what is left over."""
    full = len(rows) // config.batch_size * config.batch_size
    # Not sorted by their targets: that saves some padding, but a batch of targets of one length is
    # of one kind of pair, and models that learn from such batches are worse (DESIGN).
    return list(rows[:full].split(config.batch_size)) if full else [], rows[full:]


def _by_tokens(
    examples: Examples, rows: Tensor, config: TrainingConfig
) -> tuple[list[Tensor], Tensor]:
    """Batches with as many pairs as the symbols allow, padding counted, and what is left over."""
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
            break  # a batch of less than half the symbols
        batches.append(rows[:count])
        rows, widths = rows[count:], widths[count:]
    return batches, rows


def split_batch(rows: Tensor, parts: int) -> list[Tensor]:
    """Return the rows of a batch in parts of equal size, give or take one; some may be empty."""
    return list(rows.tensor_split(parts))
