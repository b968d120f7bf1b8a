"""The GPU backends against eager, torch.compile, SDPA, FlexAttention and the machine's limits."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_measure, gpu_model, gpu_rows, table
from benchmarks.gpu_rows import Row
from fused_attn import backends, info

# On an H200: least share of the limit, and least ratio to a peer.
TARGETS = {
    ("dot", 1, False): {"limit": 0.85},
    ("dot", 512, False): {"limit": 0.70},
    ("dot", 1024, False): {"limit": 0.60},
    ("dot", 512, True): {"sdpa": 3.0},
    ("dot", 1024, True): {"sdpa": 3.0},
    ("concat", 512, False): {"eager": 30.0},
}


def measure(row: Row, backend: str, device: Any, rates: Any) -> dict[str, Any]:
    """One line of the results. What fails is a word in it, and no speed without a passed check."""
    line: dict[str, Any] = {"case": str(row), "backend": backend, "peers": {}}
    problem = row.problem()
    try:
        inputs = gpu_rows.inputs_of(row, device.name)
        found = gpu_measure.check(row, backend, inputs)
        line |= {"error_share": found.share, "worst": found.worst}
        if not found.passed:
            return line | {"failed": f"{found.worst} has {found.share:.3g} of its error budget"}
        seconds = gpu_measure.time_of(device, row, gpu_rows.ours(row, backend), inputs)
        run = gpu_measure.call_of(row, gpu_rows.ours(row, backend), inputs)
        line |= seconds | {"peak_bytes": device.peak(run)}
    except Exception as error:  # a line says what failed; the others go on
        return line | {"failed": short(error)}
    least = gpu_model.limit(problem, rates)
    limit = least.seconds
    if row.backward:
        limit += gpu_model.limit(problem, rates, backward=True).seconds
    line |= {"limit": limit, "bound_by": least.bound_by, "share": limit / line["kernel"]}
    for name, attend in gpu_rows.peers(row).items():
        try:
            times = gpu_measure.time_of(device, row, attend, inputs)
            line["peers"][name] = times["kernel"] / line["kernel"]
        except Exception as error:
            line["peers"][name] = short(error)
        device.release()
    return line


def short(error: BaseException) -> str:
    """A word for a cell."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:60]


def verdict(row: Row, line: dict[str, Any]) -> str:
    """Which targets of the kind are met; nothing where there is none."""
    wanted = TARGETS.get((row.score, 1 if row.queries == 1 else row.width, row.backward), {})
    words = []
    for name, least in wanted.items():
        got = line["share"] if name == "limit" else line["peers"].get(name)
        if isinstance(got, float):
            words.append(f"{name} {'ok' if got >= least else f'short of {least:g}'}")
    return ", ".join(words)


HEADER = ["case", "backend", "kernel", "of limit", "by", "call", "eager", "compile", "sdpa", "flex",
          "peak", "error", "target"]  # fmt: skip


def cells(line: dict[str, Any]) -> list[str]:
    if "failed" in line:
        return [line["case"], line["backend"], line["failed"][:44], *[""] * (len(HEADER) - 3)]
    ratios = [line["peers"].get(name, "") for name in ("eager", "compile", "sdpa", "flex")]
    shown = [f"{x:.2f}x" if isinstance(x, float) else x.split(":")[0][:14] for x in ratios]
    return [
        *(line["case"], line["backend"], table.duration(line["kernel"])),
        *(f"{100 * line['share']:.0f} %", line["bound_by"], table.duration(line["call"])),
        *(*shown, f"{line['peak_bytes'] / 2**20:.0f} MiB", f"{line['error_share']:.2f}"),
        line.get("verdict", ""),
    ]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(directory: Path, results: dict[str, Any]) -> list[Path]:
    """Write the JSON, and the plots where matplotlib is there; each appears whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{results['date'][:10]}-gpu.json"
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(target)
    return [target, *_plots(directory, results)]


def _plots(directory: Path, results: dict[str, Any]) -> Iterable[Path]:
    lines = [line for line in results["rows"] if "share" in line]
    try:
        import matplotlib
    except ImportError:
        return []
    if not lines:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.25 * len(lines)), layout="constrained")
    names = [f"{line['case']} {line['backend']}" for line in lines]
    axes.barh(names, [100 * line["share"] for line in lines])
    axes.invert_yaxis()
    axes.set(xlabel="% of the limit", xlim=(0, 100), title=results["gpu"])
    target = directory / f"{results['date'][:10]}-gpu.png"
    partial = target.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=110)
    pyplot.close(figure)
    partial.replace(target)
    return [target]


def run(
    rows: list[Row], device: Any, rates: Any, end: float, is_judged: bool
) -> list[dict[str, Any]]:
    """Measure rows until ``end`` (of time.monotonic); those that had no time say so."""
    lines = []
    for row in rows:
        for backend in row.backends:
            if reasons := backends.unavailable_reasons(backend):
                lines.append({"case": str(row), "backend": backend, "failed": reasons[0]})
                continue
            if time.monotonic() > end:
                lines.append({"case": str(row), "backend": backend, "failed": "no time left"})
                continue
            line = measure(row, backend, device, rates[row.dtype])
            if is_judged and "share" in line:
                line["verdict"] = verdict(row, line)
            lines.append(line)
            device.release()
    return lines


def main(arguments: list[str]) -> int:
    """Measure, write, print; 1 if a result was wrong or a call failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds in all")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/GPU")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.budget
    if not math.isfinite(options.budget) or options.budget <= 0:
        parser.error(f"--budget must be a positive number of seconds, got {options.budget}")
    if not torch.cuda.is_available():
        print("python -m benchmarks gpu: torch finds no CUDA GPU", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name(0)
    device = gpu_measure.Device()
    rates = device.rates()
    lines = run(gpu_rows.rows(), device, rates, end, "H200" in name)
    facts = info.collect()
    results = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": name,
        "versions": facts["versions"],
        "rates": {str(dtype): vars(rate) for dtype, rate in rates.items()},
        "rows": lines,
    }
    directory = options.output or Path(__file__).parent / "results" / slug(name)
    for path in write(directory, results):
        print(path)
    bf16 = rates[torch.bfloat16]
    print(f"{name}: copy {bf16.copy / 1e12:.2f} TB/s, bf16 {bf16.matrix / 1e12:.0f} TFLOP/s")
    print(table.render(HEADER, [cells(line) for line in lines], text_columns=2))
    wrong = [line for line in lines if "failed" in line and line["failed"] != "no time left"]
    return 1 if wrong else 0
