"""The lines of a run as tables: kernels beside rivals, models, candidates for the launch table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.common.table import duration, render
from benchmarks.targets.gpu import jsonl
from benchmarks.targets.gpu.jsonl import Line

KERNELS = ["case", "backend", "kernel", "of limit", "by", "call", "eager", "compile", "sdpa",
           "flex", "peak", "error", "target"]  # fmt: skip
MODELS = ["work", "ours", "eager", "times as fast", "tokens/s"]
SWEEP = ["target", "plan", "kernel", "times as fast"]
MOST_CANDIDATES = 5  # shown for a target


def kernels(results: Iterable[dict[str, Any]]) -> str:
    return render(KERNELS, [kernel_cells(line) for line in results], 2)


def kernel_cells(line: dict[str, Any]) -> list[str]:
    if "share" not in line:
        failed = line.get("failed", "no rates")
        return [line["case"], line["backend"], failed[:44], *[""] * (len(KERNELS) - 3)]
    ratios = [line["peers"].get(name, "") for name in ("eager", "compile", "sdpa", "flex")]
    shown = [f"{x:.2f}x" if isinstance(x, float) else x.split(":")[0][:14] for x in ratios]
    return [
        *(line["case"], line["backend"], duration(line["kernel"])),
        *(f"{100 * line['share']:.0f} %", line["bound_by"], duration(line["call"])),
        *(*shown, f"{line['peak_bytes'] / 2**20:.0f} MiB", f"{line['error_share']:.2f}"),
        line.get("verdict", ""),
    ]


def model_results(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Seconds of ours and of eager, and our tokens per second, of work that both sides did."""
    known = {item: line for (_, item), line in jsonl.items(lines).items() if "work" in line}
    found = []
    for item, line in known.items():
        work, side = item.split(" | ")
        if side != "eager" and (eager := known.get(f"{work} | eager")) is not None:
            both = {"ours": line["work"], "eager": eager["work"]}
            found.append({"work": work, "tokens_per_s": line["tokens_per_s"]} | both)
    return found


def models(lines: Iterable[Line]) -> str:
    rows = [
        [
            *(line["work"], duration(line["ours"]), duration(line["eager"])),
            *(f"{line['eager'] / line['ours']:.2f}x", str(line["tokens_per_s"])),
        ]
        for line in model_results(lines)
    ]
    return render(MODELS, rows, 1)


def sweep_results(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Each target whose own plan was timed, with its candidates, the fastest first."""
    timed: dict[str, list[Line]] = {}
    for (phase, _), line in jsonl.items(lines).items():
        if phase == "times" and "kernel" in line:
            timed.setdefault(line["target"], []).append(line)
    found = []
    for target, candidates in timed.items():
        own = [line["kernel"] for line in candidates if line["is_table"]]
        if own:
            ranked = sorted(candidates, key=lambda line: line["kernel"])
            plans = [
                {"plan": line["item"].split(" | ")[1], "kernel": line["kernel"]} for line in ranked
            ]
            found.append({"target": target, "table": own[0], "candidates": plans})
    return found


def sweep(lines: Iterable[Line]) -> str:
    rows = []
    for found in sweep_results(lines):
        best = found["candidates"][:MOST_CANDIDATES]
        if all(line["plan"] != "table" for line in best):
            best = [*best, {"plan": "table", "kernel": found["table"]}]
        for line in best:
            faster = f"{found['table'] / line['kernel']:.2f}x"
            shown = [line["plan"], duration(line["kernel"]), faster]
            rows.append([found["target"], *shown])
    return render(SWEEP, rows, 2)
