"""The stage "kernels": every row is checked, then timed beside its rivals.

Checks run in parallel and leave the compiled kernels on the disk. Times are taken alone, one side
of a row after the other, those of torch's compilers last.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from benchmarks.targets.gpu import measure
from benchmarks.targets.gpu.pool import Phase
from benchmarks.targets.gpu.rows import COMPILERS, GpuRow, all_rows, inputs_of, side
from fused_attn.testing import Inputs

PHASES = (
    Phase("checks", jobs=10, limit_s=90.0, share=0.5),
    Phase("times", jobs=1, limit_s=40.0, share=0.9),
    Phase("compilers", jobs=1, limit_s=90.0),
)
RATES = "rates"


@cache
def rows(device: str) -> dict[str, GpuRow]:
    """The rows by name. On a CPU a few of the same kinds, small."""
    if device == "cuda":
        return {str(row): row for row in all_rows()}
    small = []
    for row in all_rows():
        sizes = row.sizes._replace(batch=2, queries=min(row.queries, 5), source=20, width=16)
        window = None if row.window is None else min(row.window, 3)
        backends = tuple(name for name in row.backends if name != "cuda")
        off = {"cold": False, "with_compilers": False}
        small.append(replace(row, sizes=sizes, window=window, backends=backends, **off))
    return {str(row): row for row in small[:70:6]}


def items(phase: str, options: argparse.Namespace) -> list[str]:
    found = [] if phase != "times" or options.device == "cpu" else [RATES]
    for name, row in rows(options.device).items():
        for who in row.sides():
            kind = "compilers" if who in COMPILERS else "times"
            if kind == phase or (phase == "checks" and who in row.backends):
                found.append(f"{name} | {who}")
    return found


_inputs: dict[str, Inputs] = {}  # of the last row


def _inputs_of(row: GpuRow, device: str) -> Inputs:
    if str(row) not in _inputs:
        _inputs.clear()
        _inputs[str(row)] = inputs_of(row, device)
    return _inputs[str(row)]


def run(phase: str, item: str, options: argparse.Namespace) -> dict[str, Any]:
    device = measure.device_named(options.device)
    if item == RATES:
        rates = device.rates()
        gpu = torch.cuda.get_device_name(0)
        return {"gpu": gpu, "rates": {str(dtype): vars(rate) for dtype, rate in rates.items()}}
    name, who = item.split(" | ")
    row = rows(options.device)[name]
    try:
        inputs = _inputs_of(row, options.device)
        if phase == "checks":
            found = measure.check(row, who, inputs)
            wrong = {"outcome": "failed", "error": f"{found.worst} exceeds its error budget"}
            fields = {"error_share": round(found.share, 4), "worst": found.worst}
            return fields if found.passed else fields | wrong
        attend = side(row, who, inputs)
        times = measure.time_of(device, row, attend, inputs)
        return times | {"peak_bytes": device.peak(measure.call_of(row, attend, inputs))}
    except torch.cuda.OutOfMemoryError:
        _inputs.clear()
        return {"outcome": "failed", "error": "out of memory"}
    finally:
        try:
            device.release()
        except Exception:  # the context is lost, which the worker finds out itself
            _inputs.clear()
