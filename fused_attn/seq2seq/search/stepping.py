"""One decoding step of one or several models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fused_attn.prepared import PreparedMemory
from fused_attn.reference import arithmetic_dtype
from fused_attn.seq2seq.model.decoder import DecoderState
from fused_attn.seq2seq.model.seq2seq import Seq2Seq


class Stepper(Protocol):
    """Decoders with their states, for N rows: the beams of each sentence next to one another."""

    def step(self, symbols: Tensor) -> tuple[Tensor, Tensor | None]:
        """Feed a symbol to each row.

        symbols: int64 (N,). Returns the log probabilities of the next symbols, (N, V), valid until
        the next step, and the alignment weights (N, S), or None if not asked for or no model has
        attention.
        """

    def reorder(self, rows: Tensor) -> None:
        """Give each row the state of the row it continues, ``rows`` int64 (N,)."""

    def keep(self, sentences: Tensor) -> None:
        """Keep only these sentences, int64 (M,), in ascending order."""


@dataclass
class Decoders:
    """The input of a step: the state and the memory of each model."""

    states: list[DecoderState]
    prepared: list[PreparedMemory | None]
    beams: int
    return_weights: bool


def joint_step(
    models: Sequence[Seq2Seq], decoders: Decoders, symbols: Tensor
) -> tuple[Tensor, list[DecoderState], Tensor | None]:
    """Run one step of each model and average probabilities and weights over the models.

    symbols: int64 (N,). Returns the log probabilities (N, V), the next states, and the weights
    (N, S) or None.
    """
    found, states, alignments = [], [], []
    for model, state, prepared in zip(models, decoders.states, decoders.prepared, strict=True):
        logits, after, weights = model.decode(
            symbols[:, None], state, prepared, return_weights=decoders.return_weights
        )
        states.append(after)
        dtype = arithmetic_dtype(logits.dtype)
        found.append(torch.log_softmax(logits[:, 0].to(dtype), dim=-1))
        if decoders.return_weights and weights is not None:
            alignments.append(weights[:, 0])
    log_probs = found[0]
    if len(found) > 1:
        log_probs = torch.logsumexp(torch.stack(found), dim=0) - math.log(len(found))
    if not alignments:
        return log_probs, states, None
    aligned = alignments[0] if len(alignments) == 1 else torch.stack(alignments).mean(0)
    return log_probs, states, aligned


class EagerStepper:
    """A `Stepper` that calls the models in every step."""

    def __init__(self, models: Sequence[Seq2Seq], decoders: Decoders) -> None:
        self._models = models
        self.decoders = decoders

    def step(self, symbols: Tensor) -> tuple[Tensor, Tensor | None]:
        log_probs, self.decoders.states, weights = joint_step(self._models, self.decoders, symbols)
        return log_probs, weights

    def reorder(self, rows: Tensor) -> None:
        self.decoders.states = [state.index_select(rows) for state in self.decoders.states]

    def keep(self, sentences: Tensor) -> None:
        self.reorder(rows_of(sentences, self.decoders.beams))
        self.decoders.prepared = [
            None if memory is None else memory.index_select(sentences)
            for memory in self.decoders.prepared
        ]


def rows_of(sentences: Tensor, beams: int) -> Tensor:
    """Return the rows of sentences int64 (M,), with K beams each: int64 (M K,)."""
    if beams == 1:
        return sentences
    return (sentences[:, None] * beams + torch.arange(beams, device=sentences.device)).flatten()
