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
# What tells a bound by memory from one by tensor cores, latency or occupancy.
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
# Not every version knows these by that name, and one that does not measures nothing at all.
MORE = {
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor %",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
}
OURS = "regex:^(decode|step_|rows_|online_|merge_|source_|concat_|weight_|window_)"


def items(phase: str, options: argparse.Namespace) -> list[str]:
    """Of the kernels stage that was run into the same folder; the headline calls if none was."""
    from benchmarks.targets.gpu import lines as gpu_lines
    from benchmarks.targets.gpu import rows as gpu_rows
    from benchmarks.targets.gpu import summary as gpu_summary

    if options.device == "cpu":
        return []
    rows = gpu_rows.rows()
    lines = gpu_lines.read(options.lines.parent / "kernels.jsonl") if options.lines else []
    timed = [line for line in gpu_summary.measured(lines, rows) if "share" in line]
    worst = sorted(timed, key=lambda line: line["share"])[:MOST]
    found = [f"{line['case']} | {line['backend']}" for line in worst]
    headline = (rows[0], rows[5], rows[6], rows[10], rows[11], rows[15], rows[16])
    return found or [f"{row} | {row.backends[0]}" for row in headline]


def command(item: str, metrics: Iterable[str]) -> list[str]:
    profiler = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    options = ["--clock-control", "none", "--metrics", ",".join(metrics), "--csv", "--page", "raw"]
    # The calls before the last compile, and are not looked at.
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
        said = done.stdout.strip()[-600:]
        found = {"outcome": "failed", "error": said, "code": done.returncode}
    return found


def parsed(said: str) -> list[dict[str, str]]:
    """A kernel's name and metrics for each launch, from what ncu prints as CSV."""
    lines = said.splitlines()
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
    """Make the call some times, the last of them under the profiler."""
    import torch

    from benchmarks.targets.gpu import measure as gpu_measure
    from benchmarks.targets.gpu import rows as gpu_rows

    name, side = item.split(" | ")
    row = {str(row): row for row in gpu_rows.rows()}[name]
    inputs = gpu_rows.inputs_of(row, "cuda")
    run = gpu_measure.call_of(row, gpu_rows.side(row, side, inputs), inputs)
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
