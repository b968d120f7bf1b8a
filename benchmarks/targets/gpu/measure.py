"""Time, error and memory of a call on a GPU. The device is an argument, so tests need none."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.common import calls
from benchmarks.common.calls import Attend, copies_of
from benchmarks.common.judging import Part, results
from benchmarks.common.peak_memory import allocated_growth
from benchmarks.common.sides import fused
from benchmarks.targets.gpu import jsonl
from benchmarks.targets.gpu.limits import Rates
from benchmarks.targets.gpu.rows import GpuRow
from fused_attn import testing
from fused_attn.testing import Inputs

Run = Callable[[], object]
SLOW_S = 3e-3  # a longer call hides its own launch
COPIES_BYTES = 256 << 20  # rotated inputs fill this much, more than any L2 cache


class Device:
    """Clock, cache and memory of a GPU."""

    name = "cuda"

    def once(self, run: Run, rounds: int = 20, budget_s: float = 0.3) -> float:
        """Median seconds of a call from Python, by events on the stream."""
        run()
        torch.cuda.synchronize()
        found, end = [], time.monotonic() + budget_s
        for _ in range(rounds):
            begin, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            stop.record()
            stop.synchronize()
            found.append(begin.elapsed_time(stop) / 1000)
            if time.monotonic() > end:
                break
        return statistics.median(found)

    def replayed(self, runs: Sequence[Run], budget_s: float = 0.3) -> float:
        """Seconds of a call in a CUDA graph of all of ``runs``, in turns."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile and allocate before the capture
            for run in runs:
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        return self.once(graph.replay, budget_s=budget_s) / len(runs)

    def peak(self, run: Run) -> int:
        """Bytes allocated at most during the call, above what was allocated before it."""
        return allocated_growth(run)

    def release(self) -> None:
        torch.cuda.empty_cache()

    def rates(self) -> dict[torch.dtype, Rates]:
        """Copy bandwidth and matrix rates, measured; the clock is the driver's highest."""
        source = torch.randn(1 << 29, device="cuda")  # 2 GiB
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / self.once(partial(target.copy_, source))
        facts = torch.cuda.get_device_properties(0)
        clock = highest_clock()
        found = {}
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            size = 8192 if dtype != torch.float32 else 4096
            a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
            matrix = 2 * size**3 / self.once(partial(torch.matmul, a, b))
            found[dtype] = Rates(copy, matrix, facts.multi_processor_count, clock)
        self.release()
        return found


def highest_clock() -> float:
    """Hz, from the driver, or an H200's clock if the driver does not report it."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        return float(shown.stdout.splitlines()[0]) * 1e6
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return 1.98e9


class Host:
    """Stands in for the GPU where there is none: it runs everything and reads no clock."""

    name = "cpu"

    def once(self, run: Run) -> float:
        run()
        return 1e-3

    def replayed(self, runs: Sequence[Run], budget_s: float = 0.3) -> float:
        for run in runs:
            run()
        return 1e-3

    def peak(self, run: Run) -> int:
        run()
        return 0

    def release(self) -> None: ...


def device_named(name: str) -> Any:
    """The `Device`, or a `Host` for "cpu"."""
    return Host() if name == "cpu" else Device()


def call_of(row: GpuRow, attend: Attend, inputs: Inputs) -> Run:
    """A call without arguments: forward, or forward and backward."""
    run = calls.call_of(row, inputs, attend)
    if row.backward:
        return run

    def forward() -> object:
        with torch.no_grad():
            return run()

    return forward


@dataclass(frozen=True)
class Check:
    """The largest error of a result against fp64, as a share of its budget."""

    share: float
    worst: str

    @property
    def passed(self) -> bool:
        return self.share <= 1.0  # False for NaN


def check(row: GpuRow, backend: str, inputs: Inputs) -> Check:
    """Run the whole problem on poisoned outputs, and judge two of its batch rows against fp64."""
    with testing.poisoned_empty():
        got = results(row, inputs, fused(row, inputs, backend))
    per_row = [name for name in got if name.removeprefix("grad_") not in ("weight", "v")]
    part = Part(slice(0, None, max(1, row.batch - 1)), slice(None))
    few = part.inputs(inputs)
    oracle, plain = testing.oracle(few), testing.plain(few)
    verdicts = {n: testing.judge(part.take(n, got[n]), oracle[n], plain[n]) for n in per_row}
    shares = {
        n: v.error / v.budget if v.error == v.error else float("nan") for n, v in verdicts.items()
    }
    worst = max(shares, key=lambda n: (shares[n] != shares[n], shares[n]))
    return Check(shares[worst], worst)


def time_of(device: Any, row: GpuRow, attend: Attend, inputs: Inputs) -> dict[str, Any]:
    """Seconds: "kernel" in a graph, over rotated inputs if the row is cold; "call" from Python.

    A call of milliseconds needs no graph, and some calls cannot be captured. Then "graph" is False
    or gives the reason, and "kernel" is the time of a call, one straight after the other.
    """
    run = call_of(row, attend, inputs)
    found: dict[str, Any] = {"call": device.once(run)}
    if found["call"] > SLOW_S:
        return found | {"kernel": found["call"], "graph": False}
    size = sum(tensor.nbytes for tensor in inputs.tensors.values())
    count = max(1, min(64, -(-COPIES_BYTES // size))) if row.cold else 1
    runs = [run, *(call_of(row, attend, each) for each in copies_of(inputs, count)[1:])]
    runs *= max(1, 8 // len(runs))
    try:
        return found | {"kernel": device.replayed(runs), "graph": True}
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        in_turns = device.once(lambda: [run() for run in runs]) / len(runs)
        return found | {"kernel": in_turns, "graph": jsonl.short(error)}
