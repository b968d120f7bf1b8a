"""Pairs of sequences as tensors, and the batches of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.seq2seq.vocabulary import BOS, EOS, PAD


@dataclass(frozen=True)
class Batch:
    """Pairs cut to the longest among them."""

    source: Tensor  # int64 (B, S)
    source_lengths: Tensor  # int64 (B,)
    target: Tensor  # int64 (B, T + 1), BOS ... EOS
    tokens: int  # target symbols to predict, EOS included


class Examples:
    """Encoded pairs, padded once, so that making a batch is one gather.

    sources, targets: numbers of the symbols, without BOS and EOS.
    """

    def __init__(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> None:
        self.source, self.source_lengths = pad(sources)
        self.target, self.target_lengths = pad([[BOS, *target, EOS] for target in targets])

    def __len__(self) -> int:
        return len(self.source_lengths)

    def batch(self, rows: Tensor) -> Batch:
        """Return the pairs ``rows``, int64 (B,), as a batch."""
        source_lengths, target_lengths = self.source_lengths[rows], self.target_lengths[rows]
        return Batch(
            self.source[rows, : int(source_lengths.max())],
            source_lengths,
            self.target[rows, : int(target_lengths.max())],
            int(target_lengths.sum()) - len(rows),
        )


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ``sequences`` as int64 (N, longest), padded at the end, and their lengths (N,)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = torch.full((len(sequences), int(lengths.max()) if len(sequences) else 0), PAD)
    inside = torch.arange(padded.shape[1]) < lengths[:, None]
    padded[inside] = torch.tensor([number for sequence in sequences for number in sequence])
    return padded, lengths


def epoch_batches(examples: Examples, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Return the batches of an epoch, each as row numbers int64 (<= batch_size,).

    The order depends on the arguments only, so that a run resumes inside an epoch without any
    state of a generator. Sources in a batch are equally long, which spares packing, and their
    targets nearly so. What a length leaves over fills mixed batches: small batches of the rare
    lengths would be steps of their own, as large as those of a full batch.
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(len(examples), generator=generator)
    lengths = examples.source_lengths[order]
    batches: list[Tensor] = []
    left_over = []
    for length in lengths.unique().tolist():
        rows = order[lengths == length]
        full = len(rows) // batch_size * batch_size
        by_target = examples.target_lengths[rows[:full]].argsort(stable=True)
        batches += rows[:full][by_target].split(batch_size) if full else ()
        left_over.append(rows[full:])
    mixed = torch.cat(left_over)
    batches += mixed.split(batch_size) if len(mixed) else ()
    shuffled = torch.randperm(len(batches), generator=generator)
    return [batches[i] for i in shuffled.tolist()]
