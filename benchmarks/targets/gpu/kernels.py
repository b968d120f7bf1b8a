"""The stage "kernels": every row is checked, then timed beside its rivals.

Checks run side by side, and leave the compiled kernels on the disk; times are taken alone, one side
of a row after the other, those of torch's compilers last.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from benchmarks.targets.gpu import measure as gpu_measure
from benchmarks.targets.gpu import rows as gpu_rows
from benchmarks.targets.gpu.pool import Phase
from benchmarks.targets.gpu.rows import Row
from fused_attn.testing import Inputs

PHASES = (
    Phase("checks", jobs=10, limit_s=90.0, share=0.5),
    Phase("times", jobs=1, limit_s=40.0, share=0.9),
    Phase("compilers", jobs=1, limit_s=90.0),
)
RATES = "rates"


class Host:
    """Stands in for the GPU where there is none: it runs everything, and reads no clock."""

    name = "cpu"

    def once(self, run: gpu_measure.Run) -> float:
        run()
        return 1e-3

    def replayed(self, runs: Sequence[gpu_measure.Run], budget_s: float = 0.3) -> float:
        for run in runs:
            run()
        return 1e-3

    def peak(self, run: gpu_measure.Run) -> int:
        run()
        return 0

    def release(self) -> None: ...


def device_of(options: argparse.Namespace) -> Any:
    return Host() if options.device == "cpu" else gpu_measure.Device()


@cache
def rows(device: str) -> dict[str, Row]:
    """By name. On a CPU the same kinds, small."""
    if device == "cuda":
        return {str(row): row for row in gpu_rows.rows()}
    small = []
    for row in gpu_rows.rows():
        queries, half = min(row.queries, 5), min(row.half_width, 3)
        sizes: dict[str, Any] = {
            "batch": 2,
            "queries": queries,
            "source": 20,
            "width": 16,
            "half_width": half,
        }
        backends = tuple(name for name in row.backends if name != "cuda")
        small.append(replace(row, **sizes, cold=False, with_compilers=False, backends=backends))
    return {str(row): row for row in small[:70:6]}


def items(phase: str, options: argparse.Namespace) -> list[str]:
    found = [] if phase != "times" or options.device == "cpu" else [RATES]
    for name, row in rows(options.device).items():
        for side in row.sides():
            kind = "compilers" if side in gpu_rows.COMPILERS else "times"
            if kind == phase or (phase == "checks" and side in row.backends):
                found.append(f"{name} | {side}")
    return found


_inputs: dict[str, Inputs] = {}  # of the row that was last


def _inputs_of(row: Row, device: str) -> Inputs:
    if str(row) not in _inputs:
        _inputs.clear()
        _inputs[str(row)] = gpu_rows.inputs_of(row, device)
    return _inputs[str(row)]


def run(phase: str, item: str, options: argparse.Namespace) -> dict[str, Any]:
    device = device_of(options)
    if item == RATES:
        rates = device.rates()
        gpu = torch.cuda.get_device_name(0)
        return {"gpu": gpu, "rates": {str(dtype): vars(rate) for dtype, rate in rates.items()}}
    name, side = item.split(" | ")
    row = rows(options.device)[name]
    try:
        inputs = _inputs_of(row, options.device)
        if phase == "checks":
            found = gpu_measure.check(row, side, inputs)
            wrong = {"outcome": "failed", "error": f"{found.worst} exceeds its error budget"}
            fields = {"error_share": round(found.share, 4), "worst": found.worst}
            return fields if found.passed else fields | wrong
        attend = gpu_rows.side(row, side, inputs)
        times = gpu_measure.time_of(device, row, attend, inputs)
        return times | {"peak_bytes": device.peak(gpu_measure.call_of(row, attend, inputs))}
    except torch.cuda.OutOfMemoryError:
        _inputs.clear()
        return {"outcome": "failed", "error": "out of memory"}
    finally:
        try:
            device.release()
        except Exception:  # of a context that is lost: whoever calls asks for it
            _inputs.clear()
