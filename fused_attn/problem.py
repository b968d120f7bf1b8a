"""One attention call as numbers: sizes, dtype, score, and the work and traffic they imply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SCORES = ("dot", "general", "concat")  # that are fused; the layer has one more


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """What a backend needs to know to accept a call, and a benchmark to judge it.

    ``score_dim`` is the width of the vectors that are scored: E for dot and general (whose query
    arrives projected), A for concat. The counts leave out projections, which are library GEMMs.
    """

    score: str  # one of SCORES
    batch: int  # B
    queries: int  # T
    source: int  # S
    memory_dim: int  # E
    score_dim: int
    dtype: torch.dtype = torch.float32
    device_type: str = "cpu"
    return_weights: bool = False
    backward: bool = False  # the backward operator is asked for, and not the forward one
    prepared: bool = False  # concat: the exponentials of the memory are there
    windowed: bool = False  # local attention: each query looks at a window of positions

    @property
    def pairs(self) -> int:
        """Query-position pairs B T S."""
        return self.batch * self.queries * self.source

    @property
    def concat_elements(self) -> int:
        """Evaluations of tanh in one pass over the scores: B T S A for concat, else 0."""
        return self.pairs * self.score_dim if self.score == "concat" else 0

    def flops(self, backward: bool = False, wanted: Sequence[bool] | None = None) -> int:
        """Multiply-adds of matrix products, counted as two operations each.

        Forward: scores and weighted sum, 4 B T S E. Backward: scores again, dP, dQ and both
        halves of dMemory, 10 B T S E. For concat only the products with memory are counted here;
        the score itself is counted by `concat_elements`. ``wanted`` says which gradients a backward
        computes, in the order of the operator's results; all of them if None.
        """
        product = 2 * self.pairs * self.memory_dim
        if self.score == "concat":
            if not backward:
                return product
            of_query, of_proj, of_v, of_memory, *rest = wanted or (True,) * 4
            return product * (any((of_query, of_proj, of_v, *rest)) + of_memory)
        if not backward:
            return 2 * product
        of_query, of_memory, *_ = wanted or (True, True)
        return product * (2 + of_query + 2 * of_memory)

    def bytes(self, backward: bool = False) -> int:
        """Least traffic in bytes: each input read once, each output written once."""
        size = self.dtype.itemsize
        memory = self.batch * self.source * self.memory_dim
        context = self.batch * self.queries * self.memory_dim
        query = self.batch * self.queries * self.score_dim
        memory_proj = self.batch * self.source * self.score_dim if self.score == "concat" else 0
        read = memory + memory_proj + query
        statistics = self.batch * self.queries * max(4, size)
        if backward:  # reads the same again with dO and O, writes a gradient for every input
            return size * (2 * read + 2 * context) + statistics
        weights = self.pairs if self.return_weights else 0
        return size * (read + context + weights) + statistics
