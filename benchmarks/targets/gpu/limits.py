"""The least time a GPU can take for a call: bytes over bandwidth, operations over rate."""

from __future__ import annotations

from dataclasses import dataclass

from fused_attn.problem import AttentionProblem

# Terms v tanh(q + m) that a multiprocessor computes per clock. Forward: two terms share one of its
# 16 reciprocals. Backward: seven instructions per term on 128 lanes.
TERMS_FORWARD = 32
TERMS_BACKWARD = 18


@dataclass(frozen=True)
class Rates:
    """What a GPU does at best: measured in the same run, except the terms, which are counted."""

    copy: float  # bytes/s, read and written together
    matrix: float  # flop/s of a large product in the dtype of the call
    multiprocessors: int
    clock: float  # Hz

    def terms(self, backward: bool) -> float:
        """Terms of the concat score per second."""
        per_clock = TERMS_BACKWARD if backward else TERMS_FORWARD
        return per_clock * self.multiprocessors * self.clock


@dataclass(frozen=True)
class Limit:
    """Seconds that each resource needs. They overlap, so the longest is the limit."""

    memory: float
    products: float
    terms: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.products, self.terms)

    @property
    def bound_by(self) -> str:
        named = {"memory": self.memory, "products": self.products, "terms": self.terms}
        return max(named, key=lambda name: named[name])


def limit(problem: AttentionProblem, rates: Rates, backward: bool = False) -> Limit:
    """The limit of a forward or a backward pass, without projections, as `AttentionProblem` counts.

    A single query needs no matrix units: its products hide under the read of the memory.
    """
    products = problem.flops(backward) / rates.matrix if problem.queries > 1 else 0.0
    terms = problem.concat_elements / rates.terms(backward)
    return Limit(problem.bytes(backward) / rates.copy, products, terms)
