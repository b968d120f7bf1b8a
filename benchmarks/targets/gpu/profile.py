"""The stage "profile": Nsight Compute over the calls that are furthest from their limit.

``python -m benchmarks.targets.gpu.profile "CASE | BACKEND"`` makes the call under the profiler.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from benchmarks.targets.gpu.pool import Phase
from benchmarks.targets.gpu.worker import die_with_parent

PHASES = (Phase("calls", jobs=1, limit_s=45.0, start_s=60.0),)
MOST = 8
# These tell whether memory, tensor cores, latency or occupancy is the bound.
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2 %",
    "l1tex__throughput.avg.pct_of_peak_sustained_active": "l1 and shared %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "programs",
}
# Some versions do not know these names, and then measure nothing at all.
MORE = {
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
}
OURS = "regex:^(decode|step_|rows_|online_|merge_|source_|concat_|weight_|window_)"


def items(phase: str, options: argparse.Namespace) -> list[str]:
    """The slowest calls of a "kernels" stage in the same folder; without one, headline calls."""
    from benchmarks.targets.gpu import jsonl, summary
    from benchmarks.targets.gpu.rows import all_rows

    if options.device == "cpu":
        return []
    rows = all_rows()
    lines = jsonl.read(options.lines.parent / "kernels.jsonl") if options.lines else []
    timed = [line for line in summary.measured(lines, rows) if "share" in line]
    worst = sorted(timed, key=lambda line: line["share"])[:MOST]
    found = [f"{line['case']} | {line['backend']}" for line in worst]
    headline = (rows[0], rows[5], rows[6], rows[10], rows[11], rows[15], rows[16])
    return found or [f"{row} | {row.backends[0]}" for row in headline]


def command(item: str, metrics: Iterable[str]) -> list[str]:
    profiler = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    options = ["--clock-control", "none", "--metrics", ",".join(metrics), "--csv", "--page", "raw"]
    # The calls before the last one compile, and are not profiled.
    options += ["--profile-from-start", "off", "--kernel-name-base", "function"]
    options += ["--kernel-name", OURS, "--launch-count", "12"]
    return [profiler, *options, sys.executable, "-m", "benchmarks.targets.gpu.profile", item]


def run(phase: str, item: str, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metrics in (METRICS | MORE, METRICS):
        done = subprocess.run(
            command(item, metrics), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", preexec_fn=die_with_parent,
        )  # fmt: skip
        if kernels := parsed(done.stdout):
            return {"kernels": kernels}
        printed = done.stdout.strip()[-600:]
        found = {"outcome": "failed", "error": printed, "code": done.returncode}
    return found


def parsed(printed: str) -> list[dict[str, str]]:
    """The name and metrics of each launch, from the CSV that ncu prints."""
    lines = printed.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith('"ID"')]
    if not starts:
        return []
    heading, units, *rows = csv.reader(io.StringIO("\n".join(lines[starts[0] :])))
    unit_of = dict(zip(heading, units, strict=False))
    found = []
    for row in rows:
        fields = dict(zip(heading, row, strict=False))
        if not fields.get("Kernel Name"):
            continue
        kernel = {"kernel": fields["Kernel Name"][:60]}
        for name, word in (METRICS | MORE).items():
            if fields.get(name):
                unit = "" if word.endswith("%") else unit_of.get(name, "")
                kernel[word] = f"{fields[name]} {unit}".strip()
        found.append(kernel)
    return found


def call(item: str) -> int:
    """Make the call four times, the last one under the profiler."""
    import torch

    from benchmarks.targets.gpu.measure import call_of
    from benchmarks.targets.gpu.rows import all_rows, inputs_of, side

    name, who = item.split(" | ")
    row = {str(row): row for row in all_rows()}[name]
    inputs = inputs_of(row, "cuda")
    run = call_of(row, side(row, who, inputs), inputs)
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(call(*sys.argv[1:]))
