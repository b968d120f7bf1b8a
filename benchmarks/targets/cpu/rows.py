"""The rows of `python -m benchmarks cpu` as data: calls, sizes and targets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from benchmarks.common.problems import Row, Sizes

# The kinds of a second figure, and how their targets are shown.
SECOND_TARGETS = {
    "read": ">= {:.0%} of read",  # share of the machine's read bandwidth
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
class CpuRow(Row):
    """A call, and what is expected of it."""

    case: str = field(kw_only=True)
    threads: int | None = None  # None: those of the run
    isa: str | None = None  # None: the one in use
    speedup: float | None = None  # target; None: eager is not timed
    second: Second | None = None

    @property
    def label(self) -> str:
        """What `--rows` searches."""
        return f"{self.case} {self.sizes}"


STEPS = (Sizes(64, 1, 400, 512), Sizes(8, 1, 4096, 512), Sizes(1, 1, 16384, 512))
SENTENCES = Sizes(16, 64, 256, 512)
LONG = Sizes(4, 128, 1024, 512)
TRAINING = (SENTENCES, Sizes(64, 40, 50, 512), LONG, Sizes(32, 30, 40, 1024))
TINY = Sizes(2, 1, 12, 64)

_STEP = [
    CpuRow("dot", sizes, dtype, case=case, speedup=1.9, second=Second("read", 0.8))
    for case, dtype in (("dot, step", torch.float32), ("dot, step, bf16", torch.bfloat16))
    for sizes in STEPS
]
_TRAINING = [
    CpuRow("dot", sizes, case="dot", speedup=1.8, second=Second("peak", 0.5)) for sizes in TRAINING
]
_SCORE = CpuRow("projected", SENTENCES, case="concat score, prepared", memory_dim=16, prepared=True)
_CONCAT = [
    CpuRow("concat", sizes, case="concat, projections", speedup=15.0) for sizes in (SENTENCES, LONG)
]
_TINY = [
    CpuRow("dot", TINY, case="dot, tiny"),
    CpuRow("general", TINY, case="general, tiny"),
    CpuRow("projected", TINY, case="concat, tiny, prepared", prepared=True),
]

ROWS = (
    *_STEP,
    CpuRow("dot", STEPS[0], case="dot, step, fwd+bwd", backward=True, speedup=4.0),
    *_TRAINING,
    *(
        replace(row, case="dot, fwd+bwd", backward=True, speedup=1.6, second=None)
        for row in _TRAINING
    ),
    *(
        CpuRow("dot", sizes, torch.bfloat16, case="dot, bf16", speedup=1.3,
               second=Second("fp32", 1.0))
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
    CpuRow(
        "projected", STEPS[0], case="concat, step, prepared", prepared=True,
        speedup=10.0, second=Second("read", 0.7),
    ),
    *(replace(row, threads=1, speedup=1.0) for row in _TINY),
    CpuRow(
        "concat", Sizes(8, 96, 1024, 512), case="concat, projections, fwd+bwd, peak memory",
        backward=True, second=Second("memory", 12.0),
    ),
)  # fmt: skip

# Measured with one thread and with two.
THREAD_ROWS = (
    *(CpuRow("dot", sizes, case="dot, step") for sizes in STEPS[1:]),
    CpuRow("dot", LONG, case="dot"),
    _SCORE,
)

# Measured at these sizes and at three doublings of S, of T and of B.
_SMALL = Sizes(4, 32, 256, 256)
GROWTH_ROWS = (
    CpuRow("dot", _SMALL, case="dot"),
    CpuRow("projected", _SMALL, case="concat score and sum"),
    CpuRow("dot", _SMALL, case="dot, local, 21 positions", window=10),
)
