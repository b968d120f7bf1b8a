"""Time, error and memory of a call on a GPU. The device is an argument: tests have none."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_rows
from benchmarks.gpu_model import Rates
from benchmarks.gpu_rows import Row, Tensors
from fused_attn import testing
from fused_attn.testing import Inputs

Run = Callable[[], object]
COPIES_BYTES = 256 << 20  # inputs that are rotated fill this much, more than any L2 cache


class Device:
    """Clock, cache and memory of a GPU."""

    name = "cuda"

    def once(self, run: Run, rounds: int = 20, budget_s: float = 1.0) -> float:
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

    def replayed(self, runs: list[Run]) -> float:
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
        return self.once(graph.replay) / len(runs)

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
        query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
        shown = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        clock = float(shown.splitlines()[0]) * 1e6
        found = {}
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            size = 8192 if dtype != torch.float32 else 4096
            a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
            matrix = 2 * size**3 / self.once(partial(torch.matmul, a, b))
            found[dtype] = Rates(copy, matrix, facts.multi_processor_count, clock)
        self.release()
        return found


def call_of(row: Row, attend: Callable[[Tensors], Tensor], inputs: Inputs) -> Run:
    """A call without arguments: forward, or forward and backward."""
    if not row.backward:
        tensors = gpu_rows.prepared(row, inputs.tensors)

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(tensors)

        return forward
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    wanted = list(leaves.values())

    def both() -> object:
        return torch.autograd.grad(attend(leaves), wanted, inputs.grad_context)

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
    attend = gpu_rows.ours(row, backend)
    with testing.poisoned_empty():
        if row.backward:
            leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
            context = attend(leaves)
            grads = torch.autograd.grad(context, list(leaves.values()), inputs.grad_context)
            got = {"context": context.detach()}
            got |= {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}
        else:
            with torch.no_grad():
                got = {"context": attend(gpu_rows.prepared(row, inputs.tensors))}
    per_row = [name for name in got if name.removeprefix("grad_") not in ("weight", "v")]
    chosen = torch.tensor([0, row.batch - 1], device=inputs.grad_context.device)
    few = replace(
        inputs,
        tensors={k: t if k in ("weight", "v") else t[chosen] for k, t in inputs.tensors.items()},
        grad_context=inputs.grad_context[chosen],
    )
    oracle, plain = testing.oracle(few), testing.plain(few)
    verdicts = {n: testing.judge(got[n][chosen], oracle[n], plain[n]) for n in per_row}
    shares = {
        n: v.error / v.budget if v.error == v.error else float("nan") for n, v in verdicts.items()
    }
    worst = max(shares, key=lambda n: (shares[n] != shares[n], shares[n]))
    return Check(shares[worst], worst)


def time_of(
    device: Any, row: Row, attend: Callable[[Tensors], Tensor], inputs: Inputs
) -> dict[str, float]:
    """Seconds: "kernel" in a graph, over rotated inputs if the row is cold; "call" from Python."""
    run = call_of(row, attend, inputs)
    seconds = {"call": device.once(run)}
    size = sum(tensor.nbytes for tensor in inputs.tensors.values())
    copies = max(1, min(64, -(-COPIES_BYTES // size))) if row.cold else 1
    runs = [run]
    for _ in range(copies - 1):
        tensors = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
        runs.append(call_of(row, attend, replace(inputs, tensors=tensors)))
    seconds["kernel"] = device.replayed(runs * max(1, 8 // len(runs)))
    return seconds
