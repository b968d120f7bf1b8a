"""One or several models that read the same sources and write one target together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.prepared import PreparedMemory
from fused_attn.reference import arithmetic_dtype
from fused_attn.seq2seq.decoder import DecoderState
from fused_attn.seq2seq.model import Seq2Seq


@dataclass
class _Member:
    model: Seq2Seq
    state: DecoderState
    prepared: PreparedMemory | None


class Ensemble:
    """The decoders of models on a batch of sources, each with as many rows as there are beams.

    A step's probabilities are the mean of the members' (as the alignment is); the models share both
    vocabularies.
    """

    def __init__(
        self, models: Sequence[Seq2Seq], source: Tensor, lengths: Tensor, beams: int = 1
    ) -> None:
        self.beams = beams
        self.members = []
        for model in models:
            memory, state = model.encode(source, lengths)
            if beams > 1:
                state = state.index_select(repeated(len(source), beams, source.device))
            self.members.append(_Member(model, state, model.prepare_memory(memory, lengths)))
        self.has_attention = any(m.prepared is not None for m in self.members)

    def step(self, symbols: Tensor, return_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Feed a symbol to each row.

        symbols: int64 (N,). Returns the log-probabilities of the next, (N, V), and the alignment
        weights (N, S) if asked for and any model has them.
        """
        found, alignments = [], []
        for member in self.members:
            logits, member.state, weights = member.model.decode(
                symbols[:, None], member.state, member.prepared, return_weights=return_weights
            )
            dtype = arithmetic_dtype(logits.dtype)
            found.append(torch.log_softmax(logits[:, 0].to(dtype), dim=-1))
            if weights is not None:
                alignments.append(weights[:, 0])
        log_probs = found[0]
        if len(found) > 1:
            log_probs = torch.logsumexp(torch.stack(found), dim=0) - math.log(len(found))
        if not alignments:
            return log_probs, None
        return log_probs, alignments[0] if len(alignments) == 1 else torch.stack(alignments).mean(0)

    def reorder(self, rows: Tensor) -> None:
        """Go on from ``rows`` int64 (N,) of the rows: each beam from the one it continues."""
        for member in self.members:
            member.state = member.state.index_select(rows)

    def keep(self, sentences: Tensor) -> None:
        """Go on with these sentences only, int64 (M,)."""
        offsets = torch.arange(self.beams, device=sentences.device)
        self.reorder((sentences[:, None] * self.beams + offsets).flatten())
        for member in self.members:
            if member.prepared is not None:
                member.prepared = member.prepared.index_select(sentences)


def repeated(batch: int, beams: int, device: torch.device) -> Tensor:
    """0, 0, ..., 1, 1, ...: the sentence of each row."""
    return torch.arange(batch, device=device).repeat_interleave(beams)
