"""The pictures of the report, as SVG text."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from benchmarks.common.pictures import svg
from benchmarks.common.sides import EAGER
from benchmarks.suite.memory import row_of
from benchmarks.suite.results import Run, best_of_ours, rivals, score_of, speedup

_MARKS = {"dot": "o", "general": "s", "projected": "^", "concat": "D"}


def roofline(run: Run) -> str:
    """Operations per second over operations per byte, under the machine's roof."""
    read, peak = run.limits.read / 1e9, run.limits.peak / 1e9
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    ends = [0.1, peak / read, 200.0]
    axes.plot(ends, [min(peak, read * x) for x in ends], color="#444444", linewidth=1.2)
    seen: set[str] = set()
    for sides in run.by_case().values():
        record = best_of_ours(sides)
        if record is None or record.level != "operator" or record.seconds is None:
            continue
        if record.way != "forward" or record.read_share is None:
            continue
        row = row_of(record.id)
        work = row.problem.flops() + 2 * row.problem.concat_elements
        least = row.read_bytes if row.sizes.queries == 1 else row.problem.bytes()
        label = score_of(record) if record.score not in seen else None
        seen.add(record.score)
        axes.scatter(
            work / least, work / record.seconds.median / 1e9, label=label,
            marker=_MARKS.get(record.score, "o"), color="#1f6fb2", s=28,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")
    axes.grid(alpha=0.3)
    if seen:
        axes.legend()
    return svg(figure)


def memory_picture(run: Run) -> str:
    """Peak memory of a training step of concat by source length, a line for each side."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for side, peaks in run.memory.items():
        lengths = [int(length) for length in peaks]
        axes.plot(lengths, [peak / 1e6 for peak in peaks.values()], marker="o", label=side)
    axes.set(xscale="log", yscale="log", xlabel="source length S", ylabel="MB")
    lengths = sorted({int(length) for peaks in run.memory.values() for length in peaks})
    axes.set_xticks(lengths, [str(length) for length in lengths], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return svg(figure)


def growth_picture(run: Run) -> str:
    """Time over size, both relative to the first: linear growth has slope 1."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, seconds in run.growth.items():
        times = [value / seconds[0] for value in seconds]
        axes.plot([1 << i for i in range(len(times))], times, marker="o", markersize=4, label=name)
    axes.plot([1, 8], [1, 8], color="#888888", linestyle="--", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="relative size", ylabel="relative time")
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    return svg(figure)


def speedup_picture(run: Run) -> str:
    """Speedups over eager, of ours and of the best other side, as bars for each case."""
    rows = []
    for sides in run.by_case().values():
        ours, eager = best_of_ours(sides), sides.get(EAGER)
        factor = speedup(ours, eager)
        if ours is None or factor is None:
            continue
        others = [r for r in rivals(sides) if r.side != EAGER]
        best = speedup(others[0], eager) if others else None
        way = ", fwd+bwd" if ours.way == "both" else ""
        rows.append((f"{ours.name}, {score_of(ours)}{way}", factor, best))
    rows.reverse()  # the first at the top
    figure = Figure(figsize=(8, 0.32 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh([i + 0.2 for i in places], [r[1] for r in rows], 0.4, color="#1f6fb2", label="fused")
    found = [(i - 0.2, row[2]) for i, row in enumerate(rows) if row[2] is not None]
    axes.barh(
        [f[0] for f in found], [f[1] for f in found], 0.4, color="#b9c4d0", label="best other"
    )
    for i, row in enumerate(rows):
        axes.text(row[1], i + 0.2, f" {row[1]:.1f}x", va="center", fontsize="small")
    axes.axvline(1.0, color="#444444", linewidth=1)
    axes.set_yticks(list(places), [row[0] for row in rows])
    axes.set(xscale="log", xlabel="speedup over eager")
    axes.margins(x=0.12)
    ticks = [n for n in (0.5, 1, 2, 5, 10, 20, 50, 100) if n <= 1.3 * max(r[1] for r in rows)]
    axes.set_xticks(ticks, [f"{n:g}" for n in ticks])
    axes.minorticks_off()
    axes.legend(loc="lower right")
    return svg(figure)


def growth_table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Seconds after each doubling, and the exponent of the growth."""
    header = ["call, size", "1", "2", "4", "8", "exponent"]
    rows = []
    for name, seconds in run.growth.items():
        times = [f"{1e3 * value:.2f} ms" for value in seconds]
        rows.append([name, *times, f"{slope(seconds):.2f}"])
    return header, rows


def slope(seconds: list[float]) -> float:
    """Least-squares slope of log time over log size, for sizes that double."""
    logs = [math.log2(value) for value in seconds]
    middle, mean = (len(logs) - 1) / 2, sum(logs) / len(logs)
    top = sum((i - middle) * (value - mean) for i, value in enumerate(logs))
    return top / sum((i - middle) ** 2 for i in range(len(logs)))
