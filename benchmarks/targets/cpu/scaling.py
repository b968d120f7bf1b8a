"""Tables of how fused calls scale with threads and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from benchmarks.common.scaling import DOUBLINGS, THREADS, Scaled
from benchmarks.common.table import WITHHELD, duration, render


def threads_table(results: Sequence[Scaled]) -> str:
    """A line for each row: seconds by thread count, and the speedup of the most threads."""
    rows = []
    for scaled in results:
        times = [duration(s) for s in scaled.seconds.values()] or [WITHHELD]
        cells = times + [""] * (len(THREADS) - len(times))
        first, *more = scaled.seconds.values() or [0.0]
        rows.append([scaled.name, *cells, f"{first / more[-1]:.2f}x" if more else ""])
    header = ["threads", *(str(count) for count in THREADS), "speedup"]
    return render(header, rows)


def growth_table(results: Sequence[Scaled]) -> str:
    """A line for each row: its time, and the factor of each doubling."""
    rows = []
    for scaled in results:
        times = list(scaled.seconds.values())
        cells = [duration(times[0])] if times else [WITHHELD]
        cells += [f"{b / a:.2f}x" for a, b in pairwise(times)]
        rows.append([scaled.name, *cells, *[""] * (DOUBLINGS + 1 - len(cells))])
    factors = [f"{1 << doubling}/{1 << doubling >> 1}" for doubling in range(1, DOUBLINGS + 1)]
    return render(["growth (linear: 2.00x)", "time", *factors], rows)
