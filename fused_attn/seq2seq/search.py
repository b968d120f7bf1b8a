"""Finding the target of a source with a trained model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.seq2seq.model import Seq2Seq
from fused_attn.seq2seq.vocabulary import BOS, EOS

# A target that has not ended at factor * source length + margin symbols is cut there. Per row, so
# that the result of a source does not depend on the others in its batch.
_LIMIT_FACTOR, _LIMIT_MARGIN = 2, 10


@dataclass(frozen=True)
class Hypothesis:
    """A target found for one source."""

    tokens: list[int]  # without BOS and EOS
    weights: Tensor | None  # alignment (T, S), a row for each token; None if not asked for


@torch.inference_mode()
def greedy_search(
    model: Seq2Seq, source: Tensor, source_lengths: Tensor, *, return_weights: bool = False
) -> list[Hypothesis]:
    """Take the likeliest symbol at every step, for each row until it ends.

    source: int64 (B, S), padded at the end. source_lengths: int64 (B,), 1..S.

    Rows that have ended are dropped once they are half of the batch. The model should be in
    evaluation mode.
    """
    memory, state = model.encode(source, source_lengths)
    prepared = model.prepare_memory(memory, source_lengths)
    count = len(source)
    rows = torch.arange(count)  # of the batch, that are still in the tensors below
    limits = source_lengths * _LIMIT_FACTOR + _LIMIT_MARGIN
    active = torch.ones(count, dtype=torch.bool)
    inputs = torch.full((count, 1), BOS)
    tokens: list[list[int]] = [[] for _ in range(count)]
    alignments: list[list[Tensor]] = [[] for _ in range(count)]
    step = 0
    while True:
        logits, state, weights = model.decode(
            inputs, state, prepared, return_weights=return_weights
        )
        step += 1
        inputs = logits.argmax(dim=-1)
        active &= inputs[:, 0] != EOS
        for i in active.nonzero()[:, 0].tolist():
            tokens[rows[i]].append(int(inputs[i, 0]))
            if weights is not None:
                row = int(rows[i])
                alignments[row].append(weights[i, 0, : int(source_lengths[row])])
        active &= limits[rows] > step
        remaining = active.nonzero()[:, 0]
        if not len(remaining):
            break
        if 2 * len(remaining) <= len(rows):
            rows, active, inputs = rows[remaining], active[remaining], inputs[remaining]
            state = tuple(tensor[:, remaining] for tensor in state)
            prepared = prepared.index_select(remaining)
    return [
        Hypothesis(found, _stack(aligned, length) if return_weights else None)
        for found, aligned, length in zip(tokens, alignments, source_lengths.tolist(), strict=True)
    ]


def _stack(rows: list[Tensor], length: int) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, length)
