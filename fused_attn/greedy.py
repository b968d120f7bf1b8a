"""Greedy search with a `LuongDecoder`, step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from fused_attn.decoder_parts import DecoderState, GreedyOutput
from fused_attn.prepared import PreparedMemory
from fused_attn.reference import arithmetic_dtype


class _Columns:
    """The results so far: one column for each step, with a place for every row of the call.

    ``rows`` are the places of the rows that are still computed, and ``is_going`` says which of them
    have not ended.
    """

    def __init__(self, rows: int, eos: int, like: Tensor) -> None:
        self.count, self.eos, self.like = rows, eos, like
        self.rows = torch.arange(rows, device=like.device)
        self.is_going = torch.ones(rows, dtype=torch.bool, device=like.device)
        self.lengths = self.rows.new_zeros(rows)
        self.symbols: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self.weights: list[Tensor] = []

    def add(self, symbols: Tensor, log_probs: Tensor, weights: Tensor | None) -> Tensor:
        """Append a step of the computed rows; returns the symbols to feed next, (n,)."""
        going = self.is_going
        symbols = torch.where(going, symbols, self.eos)
        self.symbols.append(self._column(symbols, self.eos))
        self.log_probs.append(self._column(torch.where(going, log_probs, 0.0), 0))
        if weights is not None:
            kept = torch.where(going[:, None], weights[:, 0], 0.0)
            self.weights.append(self._column(kept, 0))
        self.lengths = self.lengths.index_add(0, self.rows, going.to(torch.int64))
        self.is_going = going & (symbols != self.eos)
        return symbols

    def keep_going(self) -> Tensor:
        """Leave out the rows that have ended; returns which of the computed rows remain, (m,)."""
        kept = self.is_going.nonzero()[:, 0]
        self.rows, self.is_going = self.rows[kept], self.is_going[kept]
        return kept

    def result(self, source: int | None) -> GreedyOutput:
        """``source`` is the number of positions of the weights, or None without weights."""
        if not self.symbols:
            weights = None if source is None else self.like.new_zeros(self.count, 0, source)
            empty = self.lengths.new_zeros(self.count, 0)
            return GreedyOutput(empty, self.like.new_zeros(self.count, 0), self.lengths, weights)
        weights = torch.stack(self.weights, 1) if self.weights else None
        log_probs = torch.stack(self.log_probs, 1)
        return GreedyOutput(torch.stack(self.symbols, 1), log_probs, self.lengths, weights)

    def _column(self, values: Tensor, fill: int) -> Tensor:
        whole = values.new_full((self.count, *values.shape[1:]), fill)
        return whole.index_copy(0, self.rows, values)


def search(
    decoder: Any,
    memory: PreparedMemory | None,
    state: DecoderState,
    limits: tuple[int, int, int],
    return_weights: bool,
) -> GreedyOutput:
    """`LuongDecoder.greedy` for checked arguments. ``limits`` are bos, eos and max_length."""
    bos, eos, max_length = limits
    hidden = state.hidden[0]
    dtype = arithmetic_dtype(hidden.dtype)
    found = _Columns(hidden.shape[1], eos, hidden.new_empty(0, dtype=dtype))
    inputs = found.lengths.new_full((found.count,), bos)
    for _ in range(max_length if found.count else 0):
        output, state = decoder(inputs[:, None], memory, state=state, return_weights=return_weights)
        logits = output.logits[:, 0]
        log_probs = log_softmax(logits.to(arithmetic_dtype(logits.dtype)), dim=-1)
        best = log_probs.argmax(dim=-1)
        gained = log_probs.gather(1, best[:, None])[:, 0]
        inputs = found.add(best, gained, output.weights)
        going = int(found.is_going.sum())
        if going == 0:
            break
        # Leaving rows out copies the memory, so it is done when half of them have ended.
        if 2 * going <= len(inputs):
            rows = found.keep_going()
            memory = None if memory is None else memory.index_select(rows)
            state, inputs = state.index_select(rows), inputs[rows]
    source = None if memory is None or not return_weights else memory.memory.shape[1]
    return found.result(source)
