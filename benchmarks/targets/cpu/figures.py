"""One row of `python -m benchmarks cpu`: judged, then timed, then compared with its targets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, peak_memory
from benchmarks.common.calls import inputs_of
from benchmarks.common.judging import judge_fused
from benchmarks.common.measure import medians
from benchmarks.common.problems import dtype_name
from benchmarks.common.scaling import ROUNDS, timed
from benchmarks.common.sides import eager, fused
from benchmarks.common.table import WITHHELD
from benchmarks.targets.cpu.rows import CpuRow, Second
from fused_attn.testing import Verdict

GIGA = 1e9


@dataclass(frozen=True)
class Figure:
    """A measured number and its target."""

    value: float
    target: float
    text: str  # of the number
    wanted: str  # of the target
    most: bool = False  # the target is an upper limit, not a lower one

    @property
    def met(self) -> bool:
        return self.value < self.target if self.most else self.value >= self.target


@dataclass(frozen=True)
class Result:
    """A row with its figures; without, if a result was wrong or the row cannot run here."""

    row: CpuRow
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)  # by name of the result
    seconds: Mapping[str, float] = field(default_factory=dict)  # by name of the call
    speedup: Figure | None = None
    second: Figure | None = None
    unable: str = ""  # why it cannot run here

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts.values())

    @property
    def short(self) -> list[Figure]:
        """The figures that fall short of their targets."""
        return [figure for figure in (self.speedup, self.second) if figure and not figure.met]

    @property
    def verdict(self) -> str:
        if self.unable:
            return "not here"
        if not self.passed:
            return WITHHELD
        return "SHORT" if self.short else "ok"


def why_unable(row: CpuRow) -> str:
    """Why this machine cannot run the row, in a few words; empty if it can."""
    if row.isa is not None and row.isa not in machine.native().cpu_isas_supported():
        return f"this machine has no {row.isa}"
    if row.second is not None and row.second.kind == "memory" and sys.platform != "linux":
        return "peak memory is read from /proc, which this system lacks"
    return ""


def measure(row: CpuRow, threads: int, budget_s: float) -> Result:
    """The errors of the row; its figures only if every error lies within its budget."""
    if unable := why_unable(row):
        return Result(row, unable=unable)
    threads = row.threads or threads
    with machine.using_threads(threads), machine.using_isa(row.isa):
        inputs = inputs_of(row)
        verdicts = judge_fused(row, inputs)
        beside = None
        if row.second is not None and row.second.kind == "fp32":
            wide = replace(row, dtype=torch.float32)
            beside = wide, inputs_of(wide)
            verdicts |= {f"fp32 {name}": found for name, found in judge_fused(*beside).items()}
        judged = Result(row, verdicts)
        if not judged.passed:
            return judged
        if row.second is not None and row.second.kind == "memory":
            return replace(judged, second=_memory(row, row.second, threads))
        sides = [fused] if row.speedup is None else [fused, eager]
        is_read = row.second is not None and row.second.kind == "read"
        every = timed(row, inputs, *sides, read_bytes=machine.READ_BYTES if is_read else 0)
        calls = dict(zip(("fused", "eager"), every, strict=False))
        if beside:
            (calls["fp32"],) = timed(*beside, fused)
        operations = 0
        if row.second is not None and row.second.kind == "peak":
            calls["peak"], operations = machine.peak_call(threads)
        if is_read:
            calls["read"] = machine.read_call()
        with torch.set_grad_enabled(row.backward):
            seconds = medians(calls, budget_s, ROUNDS)
    return replace(judged, seconds=seconds, **_figures(row, seconds, threads, operations))


def _figures(
    row: CpuRow, seconds: Mapping[str, float], threads: int, operations: int
) -> dict[str, Figure]:
    found = {}
    if row.speedup is not None:
        value = seconds["eager"] / seconds["fused"]
        found["speedup"] = Figure(value, row.speedup, f"{value:.2f}x", f">= {row.speedup:g}x")
    if row.second is not None:
        value, text = _second(row, row.second.kind, seconds, threads, operations)
        found["second"] = Figure(value, row.second.target, text, str(row.second))
    return found


def _second(
    row: CpuRow, kind: str, seconds: Mapping[str, float], threads: int, operations: int
) -> tuple[float, str]:
    """The value and the text of the second figure."""
    ours = seconds["fused"]
    if kind == "elements":
        rate = row.problem.concat_elements / ours / threads / GIGA
        return rate, f"{rate:.1f} Gelem/s a core"
    if kind == "fp32":
        value = seconds["fp32"] / ours
        return value, f"{value:.2f}x fp32"
    amount, best, unit = {
        "read": (row.read_bytes, machine.READ_BYTES, "GB/s"),
        "peak": (row.problem.flops(), operations, "GFLOP/s"),
    }[kind]
    rate, limit = amount / ours / GIGA, best / seconds[kind] / GIGA
    return rate / limit, f"{rate:.1f} {unit} = {rate / limit:.1%} of {limit:.1f}"


def _memory(row: CpuRow, second: Second, threads: int) -> Figure:
    script = Path(peak_memory.__file__)
    command = [sys.executable, str(script), *map(str, (*row.sizes, threads))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    batch, queries, source, width = row.sizes
    held = 4 * (batch * (queries + source) * width + 2 * width * width + width)
    grown = int(done.stdout)
    text = f"{grown / held:.1f}x inputs ({grown / 1e6:.0f} MB)"
    return Figure(grown / held, second.target, text, str(second), most=True)


def as_json(result: Result, threads: int) -> dict[str, Any]:
    """The row as plain values, under the names of `CpuRow` and `Result`."""
    row = result.row
    return {
        "case": row.case,
        "sizes": row.sizes._asdict(),
        "dtype": dtype_name(row.dtype),
        "backward": row.backward,
        "threads": row.threads or threads,
        "isa": row.isa,
        "verdict": result.verdict,
        "unable": result.unable or None,
        "seconds": dict(result.seconds),
        "errors": {
            name: {"error": verdict.error, "budget": verdict.budget}
            for name, verdict in result.verdicts.items()
        },
        "speedup": result.speedup and asdict(result.speedup) | {"met": result.speedup.met},
        "second": result.second and asdict(result.second) | {"met": result.second.met},
    }
