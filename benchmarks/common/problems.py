"""The call of attention that a benchmark measures: score, sizes, dtype, passes, masking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fused_attn.problem import AttentionProblem


class Sizes(NamedTuple):
    """B, T, S and D. The memory and the concat score are as wide as the query."""

    batch: int
    queries: int
    source: int
    width: int

    def __str__(self) -> str:
        return f"({', '.join(map(str, self))})"


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def short_dtype_name(dtype: torch.dtype) -> str:
    """``"bf16"``."""
    return dtype_name(dtype).replace("float", "f")


@dataclass(frozen=True)
class Row:
    """One call of attention, on a CPU or on a GPU."""

    score: str  # one of testing.SCORES; "projected" is concat over finished projections
    sizes: Sizes
    dtype: torch.dtype = torch.float32
    backward: bool = False  # forward and backward of all inputs; otherwise forward alone
    prepared: bool = False  # with the exponentials of the memory's projection
    memory_dim: int | None = None  # E, where it is not D
    window: int | None = None  # half-width of a hard window of local attention
    lengths: bool = False  # lengths are drawn from 1..S; otherwise every position counts
    weights: bool = False  # the weights are returned too

    @property
    def batch(self) -> int:
        return self.sizes.batch

    @property
    def queries(self) -> int:
        return self.sizes.queries

    @property
    def source(self) -> int:
        return self.sizes.source

    @property
    def width(self) -> int:
        return self.sizes.width

    @property
    def formula(self) -> str:
        """The score as `AttentionProblem` names it: projected or not, concat is "concat"."""
        return "concat" if self.score == "projected" else self.score

    @property
    def problem(self) -> AttentionProblem:
        """The call as the package counts its work and traffic."""
        batch, queries, source, width = self.sizes
        return AttentionProblem(
            self.formula, batch, queries, source, self.memory_dim or width, width, self.dtype,
            return_weights=self.weights, prepared=self.prepared, windowed=self.window is not None,
        )  # fmt: skip

    @property
    def read_bytes(self) -> int:
        """Least traffic of a step in bytes: the memory, and its exponentials if prepared."""
        batch, _, source, width = self.sizes
        return batch * source * width * self.dtype.itemsize * (2 if self.prepared else 1)
