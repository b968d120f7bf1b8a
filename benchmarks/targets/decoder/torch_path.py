"""The rival in torch: the same models step by step, with eager attention."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor

from benchmarks.targets.decoder.problem import Problem
from fused_attn.seq2seq.config import SearchConfig
from fused_attn.seq2seq.model.decoder import DecoderState
from fused_attn.seq2seq.model.seq2seq import Seq2Seq
from fused_attn.seq2seq.search.hypothesis import Hypothesis
from fused_attn.seq2seq.search.search import search


def eager(model: Seq2Seq) -> Seq2Seq:
    """The same parameters with the eager backend."""
    other = deepcopy(model)
    assert other.decoder.attention is not None
    other.decoder.attention.backend = "eager"
    return other


def steps(problem: Problem) -> Callable[[], Tensor]:
    """All steps of a problem: the symbols chosen, int64 (B, T)."""
    model = eager(problem.model)
    lengths = torch.full((problem.batch,), problem.sizes.source)

    def run() -> Tensor:
        symbols, found = problem.first()[:, None], []
        state = DecoderState((problem.hidden, problem.cell))
        prepared = model.prepare_memory(problem.memory, lengths)
        for _ in range(problem.sizes.steps):
            logits, state, _ = model.decode(symbols, state, prepared)
            symbols = logits.argmax(dim=-1)
            found.append(symbols)
        return torch.cat(found, dim=1)

    return run


def searched(
    model: Seq2Seq, source: Tensor, lengths: Tensor, config: SearchConfig
) -> Callable[[], list[list[Hypothesis]]]:
    """A search for the targets of a batch, as `search` takes it."""
    other = eager(model)
    return lambda: search(other, source, lengths, config)
