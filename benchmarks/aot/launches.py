"""What a call of the Triton backend costs in Python, and how many kernels random batches compile.

The driver here launches nothing, and nothing is compiled: what is timed is all that happens before
a launcher is called, allocation included. No GPU takes part.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.common import table

HEADER = ["call", "launches", "us a call", "us a launch"]
BATCHES = 600
LONGEST, LARGEST = 100, 128  # lengths and batch of a random batch


class Driver:
    """A GPU that is always idle."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Launcher:
    """Takes what Triton's launchers take, and counts."""

    launches = 0

    def __call__(
        self,
        gridX: int,
        gridY: int,
        gridZ: int,
        stream: int,
        function: int,
        kernel_metadata: Any,
        launch_metadata: Any,
        launch_enter_hook: Any,
        launch_exit_hook: Any,
        *args: Any,
    ) -> None:
        self.launches += 1


@contextmanager
def idle() -> Iterator[Launcher]:
    """Within it Triton's kernels are launched on `Driver`, without being compiled."""
    from triton.runtime import JITFunction, driver

    from fused_attn.backends.triton import call

    launcher = Launcher()

    class Compiled:
        run, function, packed_metadata = launcher, 1, (4, 1, 0)

    before = JITFunction.run, driver._active, call._facts
    JITFunction.run = lambda self, *args, **options: Compiled()
    driver.set_active(Driver())
    call._facts = lambda device: call.launch.Chip(132, 232448)
    try:
        yield launcher
    finally:
        JITFunction.run, driver._active, call._facts = before


def calls(queries: int, source: int, width: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward of both scores, in bfloat16."""
    from fused_attn.backends.triton import backward, forward

    def rows(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    batch, masking = 4, (None, None, None, 1.0, None)
    query, memory, v = rows(batch, queries, width), rows(batch, source, width), rows(width)
    saved = (torch.zeros_like(query), None, torch.zeros(batch, queries))
    operands = (query, memory, None, v, memory)
    gradients = (query, None, query, memory, v, memory)
    yield "dot forward", lambda: forward.dot(query, memory, 1.0, masking, False, True)
    yield (
        "dot backward",
        lambda: backward.dot(query, None, query, memory, 1.0, masking, saved, [True] * 3),
    )
    yield "concat forward", lambda: forward.concat(*operands, masking, False, True)
    yield (
        "concat backward",
        lambda: backward.concat(*gradients, masking, saved, [True] * 5),
    )


def cost(call: Callable[[], object], launcher: Launcher, seconds: float) -> tuple[int, float]:
    """Launches of a call, and its least time in us; of the thread, since others share the CPU."""
    call()
    launcher.launches = 0
    call()
    launches, best, end = launcher.launches, float("inf"), time.monotonic() + seconds
    while best == float("inf") or time.monotonic() < end:
        began = time.thread_time()
        for _ in range(50):
            call()
        best = min(best, (time.thread_time() - began) / 50)
    return launches, best * 1e6


def variants(score: str, dtype: torch.dtype, width: int = 512) -> int:
    """How many kernels `BATCHES` random batches compile, forward and backward."""
    from benchmarks.aot.command import distinct
    from benchmarks.aot.compile import GPUS, Case

    draw = random.Random(0)
    sizes = [(draw.randint(1, LONGEST), draw.randint(1, LONGEST)) for _ in range(BATCHES)]
    cases = (
        Case(score, dtype, *pair, width, draw.randint(1, LARGEST), "lengths") for pair in sizes
    )
    return len(distinct(cases, GPUS["sm_90"]))


def main(arguments: list[str]) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks launches", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each call")
    options = parser.parse_args(arguments)
    try:
        import triton
    except ImportError:
        parser.error("the package triton is not installed")
    if triton.knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: interpreted kernels are not launched")
    lines = []
    with idle() as launcher:
        for queries, source in ((1, 1024), (64, 1024), (50, 50)):
            for name, call in calls(queries, source, 512):
                launches, us = cost(call, launcher, options.seconds)
                case = f"{name} T={queries} S={source}"
                lines.append([case, str(launches), f"{us:.1f}", f"{us / launches:.1f}"])
    print(table.render(HEADER, lines, text_columns=1))
    print(f"\nkernels of {BATCHES} random batches, lengths to {LONGEST}, batch to {LARGEST}")
    for score in ("dot", "concat"):
        for dtype in (torch.bfloat16, torch.float32):
            print(f"{score} {str(dtype).removeprefix('torch.')}: {variants(score, dtype)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
