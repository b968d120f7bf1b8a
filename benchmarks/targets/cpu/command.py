"""The cpu backend against eager PyTorch and against the machine, with a target for each figure.

Each row's results are judged first, against float64. Then both sides and the yardstick of the
machine take turns, because clock and bandwidth of a shared machine drift by a third within minutes.
Ratios and shares are taken between medians of the same rounds. The read bandwidth is that of a sum
over a tensor that no cache holds, and rows judged by it cycle through copies of their inputs of the
same total size. The peak is that of multiply-adds in registers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine
from benchmarks.common.files import write_whole
from benchmarks.common.scaling import Scaled, measure_growth, measure_threads
from benchmarks.common.table import duration, progress, render
from benchmarks.targets.cpu import figures
from benchmarks.targets.cpu.figures import Result
from benchmarks.targets.cpu.rows import GROWTH_ROWS, ROWS, THREAD_ROWS, CpuRow
from benchmarks.targets.cpu.scaling import growth_table, threads_table
from fused_attn import backends

AXES = "STB"  # the sizes that are doubled
HEADER = ["case", "B, T, S, D", "fused", "eager", "ratio", "target", "second", "target", "verdict"]


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    rows: Sequence[CpuRow] = ROWS
    threads: Sequence[CpuRow] = THREAD_ROWS
    growth: Sequence[tuple[CpuRow, str]] = tuple(itertools.product(GROWTH_ROWS, AXES))

    def only(self, text: str) -> Plan:
        """The part whose labels contain ``text``, in any case."""

        def wanted(label: str) -> bool:
            return text.lower() in label.lower()

        return Plan(
            [row for row in self.rows if wanted(row.label)],
            [row for row in self.threads if wanted(f"threads {row.label}")],
            [(row, axis) for row, axis in self.growth if wanted(f"growth {row.label}, {axis}")],
        )


@dataclass
class Report:
    """What was measured, and its provenance."""

    provenance: dict[str, Any]
    rows: list[Result] = field(default_factory=list)
    threads: list[Scaled] = field(default_factory=list)
    growth: list[Scaled] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(found.passed for found in (*self.rows, *self.threads, *self.growth))

    def as_json(self) -> dict[str, Any]:
        threads = self.provenance["threads"]
        return {
            "provenance": self.provenance,
            "rows": [figures.as_json(result, threads) for result in self.rows],
            "threads": [asdict(scaled) for scaled in self.threads],
            "growth": [asdict(scaled) for scaled in self.growth],
        }


def run(plan: Plan, threads: int, budget_s: float) -> Report:
    """Measure everything in the plan, and show on a terminal what is being measured."""
    report = Report(machine.provenance(threads))
    for row in plan.rows:
        progress(row.label)
        report.rows.append(figures.measure(row, threads, budget_s))
    for row in plan.threads:
        progress(f"threads {row.label}")
        report.threads.append(measure_threads(row.label, row, budget_s))
    for row, axis in plan.growth:
        name = f"{row.label}, {axis}"
        progress(f"growth {name}")
        report.growth.append(measure_growth(name, row, axis, threads, budget_s))
    progress("")
    return report


def table_row(result: Result) -> list[str]:
    """The cells under `HEADER`."""
    start = [result.row.case, str(result.row.sizes)]
    targets = [
        "" if result.row.speedup is None else f">= {result.row.speedup:g}x",
        "" if result.row.second is None else str(result.row.second),
    ]
    times = [duration(result.seconds[k]) if k in result.seconds else "" for k in HEADER[2:4]]
    texts = [
        f"{figure.text}{'' if figure.met else '!'}" if figure else ""
        for figure in (result.speedup, result.second)
    ]
    return [*start, *times, texts[0], targets[0], texts[1], targets[1], result.verdict]


def endings(report: Report) -> list[str]:
    """What a reader must not overlook: missed targets, wrong results, rows that did not run."""
    short = [
        f"  {result.row.label}: {figure.text}, target {figure.wanted}"
        for result in report.rows
        for figure in result.short
    ]
    wrong = [
        f"  {result.row.label}: error of {name} {verdict.error:.2g}, budget {verdict.budget:.2g}"
        for result in report.rows
        for name, verdict in result.verdicts.items()
        if not verdict.passed
    ]
    wrong += [f"  threads {scaled.name}" for scaled in report.threads if not scaled.passed]
    wrong += [f"  growth {scaled.name}" for scaled in report.growth if not scaled.passed]
    unable = [f"  {result.row.label}: {result.unable}" for result in report.rows if result.unable]
    parts = {
        "SHORT of the target (!)": short,
        "WITHHELD, because results exceeded the error budget": wrong,
        "Not measured here": unable,
    }
    return [line for title, lines in parts.items() if lines for line in ("", title, *lines)]


def text_of(report: Report) -> str:
    """The report as text: tables and `endings`."""
    facts = report.provenance
    lines = [
        f"{facts['processor']}, {facts['instruction_set']}, threads: {facts['threads']}, "
        f"torch {facts['versions']['torch']}, {facts['date'][:10]}"
    ]
    if report.rows:
        table = render(HEADER, [table_row(result) for result in report.rows], text_columns=2)
        lines += ["", table]
    if report.threads:
        lines += ["", threads_table(report.threads)]
    if report.growth:
        lines += ["", growth_table(report.growth)]
    return "\n".join([*lines, *endings(report)])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main(arguments: Sequence[str] = (), plan: Plan | None = None) -> int:
    """Print the tables. Returns 1 if a result exceeded the error budget, 2 without the backend."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks cpu", description=summary)
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows that contain it")
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.5,
        help="about, for each row (default: 1.5)",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        default=torch.get_num_threads(),
        help="default: those of torch",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    options = parser.parse_args(arguments)
    chosen = (plan or Plan()).only(options.rows)
    if not (chosen.rows or chosen.threads or chosen.growth):
        parser.error(f"no row has {options.rows!r} in its label")
    if reasons := backends.unavailable_reasons("cpu"):
        print(f"the cpu backend is not usable: {'; '.join(reasons)}", file=sys.stderr)
        return 2
    report = run(chosen, options.threads, options.seconds)
    print(text_of(report))
    if options.json:
        write_whole(options.json, json.dumps(report.as_json(), indent=1) + "\n")
    return 0 if report.passed else 1
