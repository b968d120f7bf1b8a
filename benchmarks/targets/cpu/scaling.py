"""How the time of a fused call goes with the number of threads, and with S, T and B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from benchmarks.common import machine
from benchmarks.common.calls import fused, inputs_of, judge, timed
from benchmarks.common.measure import medians
from benchmarks.common.table import duration, render
from benchmarks.targets.cpu.figures import ROUNDS
from benchmarks.targets.cpu.rows import Row

THREADS = (1, 2)
AXES = {"S": "source", "T": "queries", "B": "batch"}
SIZES = AXES | {"D": "width"}
DOUBLINGS = 3
WITHHELD = "withheld"


@dataclass(frozen=True)
class Scaled:
    """Seconds of a row by thread count, or by how often one of its sizes was doubled."""

    row: Row
    name: str
    passed: bool
    seconds: dict[int, float] = field(default_factory=dict)


def measure_threads(row: Row, budget_s: float) -> Scaled:
    """The row with one thread and with two, if there are two cores, taking turns."""
    counts = [count for count in THREADS if count <= machine.cores()]
    with machine.using_threads(counts[-1]):
        inputs = inputs_of(row)
        if not all(verdict.passed for verdict in judge(row, inputs).values()):
            return Scaled(row, row.label, passed=False)
        (call,) = timed(row, inputs, fused)
        calls = {str(count): call for count in counts}
        with torch.no_grad():
            found = medians(calls, budget_s, ROUNDS, before=lambda name: _use(int(name)))
    return Scaled(row, row.label, True, {int(name): s for name, s in found.items()})


def _use(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def measure_growth(row: Row, axis: str, threads: int, budget_s: float) -> Scaled:
    """The row at its sizes and at three doublings of one of them, taking turns."""
    name, calls = f"{row.label}, {axis}", {}
    size = getattr(row.sizes, SIZES[axis])
    with machine.using_threads(threads):
        for doubling in range(DOUBLINGS + 1):
            larger = replace(row, sizes=row.sizes._replace(**{SIZES[axis]: size << doubling}))
            inputs = inputs_of(larger)
            if not all(verdict.passed for verdict in judge(larger, inputs).values()):
                return Scaled(row, name, passed=False)
            (calls[str(doubling)],) = timed(larger, inputs, fused)
        with torch.no_grad():
            found = medians(calls, budget_s, ROUNDS)
    return Scaled(row, name, True, {int(name): s for name, s in found.items()})


def threads_table(results: Sequence[Scaled]) -> str:
    rows = []
    for scaled in results:
        times = [duration(s) for s in scaled.seconds.values()] or [WITHHELD]
        cells = times + [""] * (len(THREADS) - len(times))
        first, *more = scaled.seconds.values() or [0.0]
        rows.append([scaled.name, *cells, f"{first / more[-1]:.2f}x" if more else ""])
    header = ["threads", *(str(count) for count in THREADS), "speedup"]
    return render(header, rows)


def growth_table(results: Sequence[Scaled]) -> str:
    rows = []
    for scaled in results:
        times = list(scaled.seconds.values())
        cells = [duration(times[0])] if times else [WITHHELD]
        cells += [f"{b / a:.2f}x" for a, b in pairwise(times)]
        rows.append([scaled.name, *cells, *[""] * (DOUBLINGS + 1 - len(cells))])
    factors = [f"{1 << doubling}/{1 << doubling >> 1}" for doubling in range(1, DOUBLINGS + 1)]
    return render(["growth (linear: 2.00x)", "time", *factors], rows)


def as_json(scaled: Scaled) -> dict[str, Any]:
    return {"name": scaled.name, "passed": scaled.passed, "seconds": scaled.seconds}
