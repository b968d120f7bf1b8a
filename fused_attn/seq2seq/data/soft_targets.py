"""Soft targets: the teachers' K largest probabilities at each target position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fused_attn.seq2seq.devices import moved


@dataclass(frozen=True)
class SoftTargets:
    """The teachers' probabilities for the targets of a batch.

    symbols: int64 (B, T, K), the K most probable symbols.
    probabilities: float32 (B, T, K), summing to 1 over K; 0 where the target is padding.
    """

    symbols: Tensor
    probabilities: Tensor

    def to(self, device: torch.device) -> SoftTargets:
        """Return the soft targets on a device."""
        return SoftTargets(moved(self.symbols, device), moved(self.probabilities, device))

    def twice(self) -> SoftTargets:
        """Return the soft targets of the batch concatenated with itself, as R-Drop needs them."""
        symbols, probabilities = self.symbols, self.probabilities
        return SoftTargets(torch.cat([symbols, symbols]), torch.cat([probabilities, probabilities]))


class SoftTargetTable:
    """The soft targets of all training pairs.

    symbols: int32 (N, K), most probable first. N counts the symbols of all targets, concatenated,
        EOS included.
    probabilities: float16 (N, K), the mean over the teachers, scaled so that the K sum to 1.
    lengths: int64 (pairs,), the target lengths, EOS included.

    Raises ValueError if the sizes do not agree.
    """

    def __init__(self, symbols: Tensor, probabilities: Tensor, lengths: Tensor) -> None:
        if not len(symbols) == len(probabilities) == int(lengths.sum()):
            raise ValueError(
                f"the soft targets have {len(symbols)} and {len(probabilities)} rows, expected one "
                f"for each of the {int(lengths.sum())} target symbols"
            )
        self.symbols = symbols
        self.probabilities = probabilities
        self._lengths = lengths
        self._starts = lengths.cumsum(0) - lengths

    @classmethod
    def empty(cls, lengths: Tensor, kept: int) -> Self:
        """Return an uninitialized table for targets of these lengths, with K = ``kept``."""
        symbols = torch.empty(int(lengths.sum()), kept, dtype=torch.int32)
        return cls(symbols, symbols.to(torch.float16), lengths)

    def fill(self, rows: Tensor, symbols: Tensor, probabilities: Tensor) -> None:
        """Set the soft targets of the pairs with the indices ``rows``, int64 (B,).

        symbols, probabilities: (B, longest target of these, K), on any device.
        """
        inside, indices = self._indices(rows, symbols.shape[1])
        self.symbols[indices[inside]] = symbols.cpu()[inside].int()
        self.probabilities[indices[inside]] = probabilities.cpu()[inside].half()

    def rows(self, rows: Tensor) -> SoftTargets:
        """Return the soft targets of the pairs with the indices ``rows``, int64 (B,)."""
        inside, indices = self._indices(rows, int(self._lengths[rows].max()))
        probabilities = self.probabilities[indices].float() * inside[..., None]
        return SoftTargets(self.symbols[indices].long(), probabilities)

    def _indices(self, rows: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Bool (B, longest), whether a position is inside its target, and int64 (B, longest), its
        index in the table.
        """
        positions = torch.arange(longest)
        inside = positions < self._lengths[rows][:, None]
        return inside, (self._starts[rows][:, None] + positions).where(inside, 0)
