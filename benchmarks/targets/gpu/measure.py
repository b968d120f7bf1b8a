"""Time, error and memory of a call on a GPU. The device is an argument: tests have none."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.targets.gpu import lines as gpu_lines
from benchmarks.targets.gpu import rows as gpu_rows
from benchmarks.targets.gpu.limits import Rates
from benchmarks.targets.gpu.rows import Attend, Row, Tensors
from fused_attn import testing
from fused_attn.testing import Inputs

Run = Callable[[], object]
SLOW_S = 3e-3  # a call from Python that takes longer hides its own launch
COPIES_BYTES = 256 << 20  # inputs that are rotated fill this much, more than any L2 cache


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
        with torch.cuda.stream(stream):  # what compiles or allocates does so before the capture
            for run in runs:
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        return self.once(graph.replay, budget_s=budget_s) / len(runs)

    def peak(self, run: Run) -> int:
        """Bytes allocated at most during the call, above what was there before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

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
    """Hz, as the driver tells; that of an H200 where it does not."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        return float(shown.stdout.splitlines()[0]) * 1e6
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return 1.98e9


def call_of(row: Row, attend: Attend, inputs: Inputs) -> Run:
    """A call without arguments: forward, or forward and backward."""
    if not row.backward:
        tensors = gpu_rows.prepared(row, inputs.tensors)

        def forward() -> object:
            with torch.no_grad():
                return attend(tensors)

        return forward
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    wanted = list(leaves.values())

    def both() -> object:
        return torch.autograd.grad(attend(leaves)[0], wanted, inputs.grad_context)

    return both


@dataclass(frozen=True)
class Check:
    """The largest error of a result against fp64, as a share of what it may be."""

    share: float
    worst: str

    @property
    def passed(self) -> bool:
        return self.share <= 1.0  # False for NaN


def check(row: Row, backend: str, inputs: Inputs) -> Check:
    """Run the whole problem on poisoned outputs, and hold two of its batch rows against fp64."""
    attend = gpu_rows.ours(row, backend, inputs.masking)
    with testing.poisoned_empty():
        got = _results(row, attend, inputs)
    per_row = [name for name in got if name.removeprefix("grad_") not in ("weight", "v")]
    chosen = torch.tensor([0, row.batch - 1], device=inputs.grad_context.device)
    few = few_of(inputs, chosen)
    oracle, plain = testing.oracle(few), testing.plain(few)
    verdicts = {n: testing.judge(got[n][chosen], oracle[n], plain[n]) for n in per_row}
    shares = {
        n: v.error / v.budget if v.error == v.error else float("nan") for n, v in verdicts.items()
    }
    worst = max(shares, key=lambda n: (shares[n] != shares[n], shares[n]))
    return Check(shares[worst], worst)


def _results(row: Row, attend: Attend, inputs: Inputs) -> Tensors:
    """Context, weights if the row has them, and for a backward row the gradients."""
    if row.backward:
        leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
        context, _ = attend(leaves)
        grads = torch.autograd.grad(context, list(leaves.values()), inputs.grad_context)
        named = {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}
        return {"context": context.detach()} | named
    with torch.no_grad():
        context, weights = attend(gpu_rows.prepared(row, inputs.tensors))
    return {"context": context} | ({} if weights is None else {"weights": weights})


def few_of(inputs: Inputs, chosen: Tensor) -> Inputs:
    """The inputs of some rows of the batch."""
    masking, window = inputs.masking, inputs.masking.window
    if masking.memory_lengths is not None:
        masking = masking._replace(memory_lengths=masking.memory_lengths[chosen])
    if window is not None:
        masking = masking._replace(window=window._replace(centers=window.centers[chosen]))
    tensors = inputs.tensors.items()
    return replace(
        inputs,
        tensors={k: t if k in ("weight", "v") else t[chosen] for k, t in tensors},
        masking=masking,
        grad_context=inputs.grad_context[chosen],
        grad_weights=None if inputs.grad_weights is None else inputs.grad_weights[chosen],
    )


def time_of(device: Any, row: Row, attend: Attend, inputs: Inputs) -> dict[str, Any]:
    """Seconds: "kernel" in a graph, over rotated inputs if the row is cold; "call" from Python.

    A call of milliseconds needs no graph, and what cannot be captured has none: then "graph" is
    False or says why, and "kernel" is the time of a call, one straight after the other.
    """
    run = call_of(row, attend, inputs)
    found: dict[str, Any] = {"call": device.once(run)}
    if found["call"] > SLOW_S:
        return found | {"kernel": found["call"], "graph": False}
    size = sum(tensor.nbytes for tensor in inputs.tensors.values())
    copies = max(1, min(64, -(-COPIES_BYTES // size))) if row.cold else 1
    runs = [run]
    for _ in range(copies - 1):
        tensors = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
        runs.append(call_of(row, attend, replace(inputs, tensors=tensors)))
    runs *= max(1, 8 // len(runs))
    try:
        return found | {"kernel": device.replayed(runs), "graph": True}
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        in_turns = device.once(lambda: [run() for run in runs]) / len(runs)
        return found | {"kernel": in_turns, "graph": gpu_lines.short(error)}
