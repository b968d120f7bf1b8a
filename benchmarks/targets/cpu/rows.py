"""The rows of `python -m benchmarks cpu` as data: calls, sizes and targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fused_attn.problem import AttentionProblem


class Sizes(NamedTuple):
    """B, T, S and D; memory and the concat score are as wide as the query."""

    batch: int
    queries: int
    source: int
    width: int

    def __str__(self) -> str:
        return f"({', '.join(map(str, self))})"


# What a second figure is, and how its target reads.
SECOND_TARGETS = {
    "read": ">= {:.0%} of read",  # share of the read bandwidth of the machine
    "peak": ">= {:.0%} of peak",  # share of its multiply-adds
    "elements": ">= {:g} Gelem/s",  # T S A products of concat per second and thread
    "fp32": ">= {:g}x fp32",  # our float32 time over this one
    "memory": "< {:g}x inputs",  # growth of the process over the bytes of the inputs
}


@dataclass(frozen=True)
class Second:
    """A target beside the speedup."""

    kind: str  # one of SECOND_TARGETS
    target: float

    def __str__(self) -> str:
        return SECOND_TARGETS[self.kind].format(self.target)


@dataclass(frozen=True)
class Row:
    """One call, and what is expected of it."""

    case: str
    sizes: Sizes
    score: str  # one of testing.SCORES
    dtype: torch.dtype = torch.float32
    backward: bool = False  # forward and backward of all inputs; else forward under no_grad
    prepared: bool = False  # with the exponentials of the memory's projection
    memory_dim: int | None = None  # E, where it is not D
    threads: int | None = None  # None: those of the run
    isa: str | None = None  # None: the one in use
    window: int | None = None  # half-width of local attention
    speedup: float | None = None  # target; None: eager is not timed
    second: Second | None = None

    @property
    def label(self) -> str:
        """What `--rows` searches."""
        return f"{self.case} {self.sizes}"

    @property
    def problem(self) -> AttentionProblem:
        """Sizes as the package counts work by them."""
        batch, queries, source, width = self.sizes
        score = "concat" if self.score == "projected" else self.score
        memory_dim = self.memory_dim or width
        return AttentionProblem(score, batch, queries, source, memory_dim, width, self.dtype)

    @property
    def read_bytes(self) -> int:
        """Least traffic of one step: the memory, and what the prepared memory is scored with."""
        batch, _, source, width = self.sizes
        return batch * source * width * self.dtype.itemsize * (2 if self.prepared else 1)


STEPS = (Sizes(64, 1, 400, 512), Sizes(8, 1, 4096, 512), Sizes(1, 1, 16384, 512))
SENTENCES = Sizes(16, 64, 256, 512)
LONG = Sizes(4, 128, 1024, 512)
TRAINING = (SENTENCES, Sizes(64, 40, 50, 512), LONG, Sizes(32, 30, 40, 1024))
TINY = Sizes(2, 1, 12, 64)

_STEP = [
    Row(case, sizes, "dot", dtype, speedup=1.9, second=Second("read", 0.8))
    for case, dtype in (("dot, step", torch.float32), ("dot, step, bf16", torch.bfloat16))
    for sizes in STEPS
]
_TRAINING = [
    Row("dot", sizes, "dot", speedup=1.8, second=Second("peak", 0.5)) for sizes in TRAINING
]
_SCORE = Row("concat score, prepared", SENTENCES, "projected", memory_dim=16, prepared=True)
_CONCAT = [Row("concat, projections", sizes, "concat", speedup=15.0) for sizes in (SENTENCES, LONG)]
_TINY = [
    Row("dot, tiny", TINY, "dot"),
    Row("general, tiny", TINY, "general"),
    Row("concat, tiny, prepared", TINY, "projected", prepared=True),
]

ROWS = (
    *_STEP,
    Row("dot, step, fwd+bwd", STEPS[0], "dot", backward=True, speedup=4.0),
    *_TRAINING,
    *(
        replace(row, case="dot, fwd+bwd", backward=True, speedup=1.6, second=None)
        for row in _TRAINING
    ),
    *(
        Row("dot, bf16", sizes, "dot", torch.bfloat16, speedup=1.3, second=Second("fp32", 1.0))
        for sizes in TRAINING
    ),
    *(
        replace(_SCORE, case=f"{_SCORE.case}, {isa}", isa=isa, second=Second("elements", target))
        for isa, target in (("avx512", 15.0), ("avx2", 6.0))
    ),
    *_CONCAT,
    *(
        replace(row, case="concat, projections, fwd+bwd", backward=True, speedup=8.0)
        for row in _CONCAT
    ),
    Row(
        "concat, step, prepared", STEPS[0], "projected", prepared=True,
        speedup=10.0, second=Second("read", 0.7),
    ),
    *(replace(row, threads=1, speedup=1.0) for row in _TINY),
    Row(
        "concat, projections, fwd+bwd, peak memory", Sizes(8, 96, 1024, 512), "concat",
        backward=True, second=Second("memory", 12.0),
    ),
)  # fmt: skip

# Measured with one thread and with two.
THREAD_ROWS = (
    *(Row("dot, step", sizes, "dot") for sizes in STEPS[1:]),
    Row("dot", LONG, "dot"),
    _SCORE,
)

# Measured at these sizes and at three doublings of S, of T and of B.
GROWTH_ROWS = (
    Row("dot", Sizes(4, 32, 256, 256), "dot"),
    Row("concat score and sum", Sizes(4, 32, 256, 256), "projected"),
    Row("dot, local, 21 positions", Sizes(4, 32, 256, 256), "dot", window=10),
)
