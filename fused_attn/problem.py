"""One attention call as numbers: sizes, dtype and score, with its FLOPs and memory traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """What a backend needs to know to accept a call, and a benchmark to rate it.

    ``score_dim`` is the width of the scored vectors: E for dot and general (whose query is
    already projected), A for concat. The counts leave out projections, which are library GEMMs.
    """

    score: str  # one of `choices.SCORES`, or "scores": those of concat without a softmax
    batch: int  # B
    queries: int  # T
    source: int  # S
    memory_dim: int  # E
    score_dim: int
    dtype: torch.dtype = torch.float32
    device_type: str = "cpu"
    return_weights: bool = False
    backward: bool = False  # a call of the backward operator
    prepared: bool = False  # concat: the exponentials of the memory are given
    windowed: bool = False  # local attention: each query attends to a window of positions

    @property
    def pairs(self) -> int:
        """The number of pairs of a query and a position, B T S."""
        return self.batch * self.queries * self.source

    @property
    def concat_elements(self) -> int:
        """Tanh evaluations in one pass over the scores: B T S A for concat, else 0."""
        return self.pairs * self.score_dim if self.score == "concat" else 0

    def flops(self, backward: bool = False, wanted: Sequence[bool] | None = None) -> int:
        """FLOPs of the matrix products; a multiply-add counts as two.

        Forward: scores and weighted sum, 4 B T S E. Backward: recomputed scores, dP, dQ and both
        halves of dMemory, 10 B T S E. For concat only the products with memory are counted here;
        `concat_elements` counts the score itself. ``wanted`` selects the gradients of a backward,
        in the order of the operator's results; None means all.
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
        """Minimum memory traffic in bytes: each input read once, each output written once."""
        size = self.dtype.itemsize
        memory = self.batch * self.source * self.memory_dim
        context = self.batch * self.queries * self.memory_dim
        query = self.batch * self.queries * self.score_dim
        memory_proj = self.batch * self.source * self.score_dim if self.score == "concat" else 0
        read = memory + memory_proj + query
        statistics = self.batch * self.queries * max(4, size)
        if backward:  # reads the inputs, dO and O, and writes a gradient for every input
            return size * (2 * read + 2 * context) + statistics
        weights = self.pairs if self.return_weights else 0
        return size * (read + context + weights) + statistics
