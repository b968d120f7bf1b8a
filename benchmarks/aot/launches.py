"""The cost of a Triton call in Python, and the number of kernels that random batches compile.

The driver here launches nothing and nothing is compiled. The measured time covers everything before
the launcher is called, including allocation. No GPU is needed.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.common.problems import dtype_name
from benchmarks.common.table import render

HEADER = ["call", "launches", "us a call", "us a launch"]
BATCHES = 600
LONGEST, LARGEST = 100, 128  # greatest length and size of a random batch


class Driver:
    """A GPU that is always idle."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Launcher:
    """Takes the arguments of Triton's launchers, and counts its calls."""

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
    """A context in which Triton launches kernels on `Driver`, without compiling them."""
    from triton.runtime import JITFunction, driver

    from benchmarks.common.chips import H100
    from fused_attn.backends.triton import call

    launcher = Launcher()

    class Compiled:
        run, function, packed_metadata = launcher, 1, (4, 1, 0)

    before = JITFunction.run, driver._active, call._facts
    JITFunction.run = lambda self, *args, **options: Compiled()
    driver.set_active(Driver())
    call._facts = lambda device: H100
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
    """Launches of a call, and its least CPU time in us: other processes share the processor."""
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
    """The number of kernels that `BATCHES` random batches compile, forward and backward."""
    from benchmarks.aot.compile import GPUS, Case
    from benchmarks.aot.promises import distinct

    draw = random.Random(0)
    sizes = [(draw.randint(1, LONGEST), draw.randint(1, LONGEST)) for _ in range(BATCHES)]
    cases = (
        Case(score, dtype, *pair, width, draw.randint(1, LARGEST), "lengths") for pair in sizes
    )
    return len(distinct(cases, GPUS["sm_90"]))


def main(arguments: list[str]) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks launches", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each call (default: 1)")
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
    print(render(HEADER, lines, text_columns=1))
    print(f"\nkernels of {BATCHES} random batches, lengths to {LONGEST}, batch to {LARGEST}")
    for score in ("dot", "concat"):
        for dtype in (torch.bfloat16, torch.float32):
            print(f"{score} {dtype_name(dtype)}: {variants(score, dtype)}")
    return 0
