"""What trained models say of every target symbol, for another model to learn beside the right one.

Distillation: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network"; of
sequences, Kim & Rush 2016, "Sequence-Level Knowledge Distillation", sections 2.2 and 3.1. The
teachers do not change, so that they are asked once, before the training, and not at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from fused_attn.seq2seq.checkpoints import files as checkpoint
from fused_attn.seq2seq.devices import moved

if TYPE_CHECKING:
    from fused_attn.seq2seq.data.examples import Examples
    from fused_attn.seq2seq.model.seq2seq import Seq2Seq

FILE = "teacher.safetensors"  # of a run
# Symbols whose probabilities are kept: a vocabulary of subwords at every step would be too large.
KEPT = 8
_BATCH = 256


@dataclass(frozen=True)
class Lesson:
    """What the teachers say of the targets of a batch.

    symbols: int64 (B, T, K). probabilities: float32 (B, T, K); 0 where the target is padding.
    """

    symbols: Tensor
    probabilities: Tensor

    def to(self, device: torch.device) -> Lesson:
        """Return it on a device."""
        return Lesson(moved(self.symbols, device), moved(self.probabilities, device))

    def twice(self) -> Lesson:
        """Return it for the batch and the same batch again."""
        symbols, probabilities = self.symbols, self.probabilities
        return Lesson(torch.cat([symbols, symbols]), torch.cat([probabilities, probabilities]))

    def loss(self, logits: Tensor) -> Tensor:
        """Return the cross-entropy of logits (B, T, V) with what the teachers say, summed."""
        log_probs = log_softmax(logits.float(), dim=-1).gather(2, self.symbols)
        return -(self.probabilities * log_probs).sum()


class Teaching:
    """What the teachers say of the targets of all training pairs.

    symbols: int32 (tokens, K), the likeliest first, of all targets one after another, EOS included.
    probabilities: float16 (tokens, K), the mean of the teachers', scaled so that the K sum to 1.
    lengths: int64 (N,), of the targets, with EOS.
    """

    def __init__(self, symbols: Tensor, probabilities: Tensor, lengths: Tensor) -> None:
        if not len(symbols) == len(probabilities) == int(lengths.sum()):
            raise ValueError("the teachers were asked about other pairs")
        self._symbols = symbols
        self._probabilities = probabilities
        self._lengths = lengths
        self._starts = lengths.cumsum(0) - lengths

    @classmethod
    @torch.no_grad()
    def of(cls, models: Sequence[Seq2Seq], examples: Examples) -> Self:
        """Ask models in their evaluation mode, all on one device."""
        device = next(models[0].parameters()).device
        lengths = examples.target_lengths - 1
        kept = min(KEPT, models[0].output.out_features)
        symbols = torch.empty(int(lengths.sum()), kept, dtype=torch.int32)
        taught = cls(symbols, symbols.to(torch.float16), lengths)
        # By length: little padding, and mostly none in the sources, which spares packing.
        order = lengths.argsort(stable=True)
        order = order[examples.source_lengths[order].argsort(stable=True)]
        for rows in order.split(_BATCH):
            batch = examples.batch(rows).to(device)
            given = batch.source, batch.source_lengths, batch.target[:, :-1]
            each = [model(*given)[0].float().softmax(dim=-1) for model in models]
            said = torch.stack(each).mean(dim=0).topk(kept, dim=-1)
            shares = said.values / said.values.sum(dim=-1, keepdim=True)
            inside, places = taught._places(rows, batch.target.shape[1] - 1)
            taught._symbols[places[inside]] = said.indices.cpu()[inside].int()
            taught._probabilities[places[inside]] = shares.cpu()[inside].half()
        return taught

    def lesson(self, rows: Tensor) -> Lesson:
        """Return what was said of the pairs ``rows``, int64 (B,)."""
        inside, places = self._places(rows, int(self._lengths[rows].max()))
        probabilities = self._probabilities[places].float() * inside[..., None]
        return Lesson(self._symbols[places].long(), probabilities)

    def _places(self, rows: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Which of (B, longest) positions are of targets, and where those are kept."""
        positions = torch.arange(longest)
        inside = positions < self._lengths[rows][:, None]
        return inside, (self._starts[rows][:, None] + positions).where(inside, 0)

    def save(self, directory: Path) -> None:
        """Write it into the directory of a run; raises OSError."""
        tensors = {"symbols": self._symbols, "probabilities": self._probabilities}
        checkpoint.save_tensors(directory / FILE, tensors)

    @classmethod
    def open(cls, directory: Path, examples: Examples) -> Self:
        """Map what `save` wrote: pages are read when they are needed. Raises `InputError`."""
        tensors = checkpoint.map_tensors(directory, FILE)
        try:
            lengths = examples.target_lengths - 1
            return cls(tensors["symbols"], tensors["probabilities"], lengths)
        except (KeyError, ValueError) as error:
            raise checkpoint.damaged(directory, error) from None
