"""The lines of a run summed up: a page for the terminal, and the results that are kept."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common.files import write_whole
from benchmarks.common.machine import slug
from benchmarks.common.table import duration
from benchmarks.targets.gpu import jsonl, tables
from benchmarks.targets.gpu.jsonl import Line
from benchmarks.targets.gpu.limits import Rates, limit
from benchmarks.targets.gpu.rows import COMPILERS, GpuRow, all_rows

STAGES = ("smoke", "contract", "kernels", "models", "sanitize", "sweep", "profile")
GOOD = ("passed", "skipped", "deferred")
MOST_BYTES, MOST_FAILURES, MOST_SHARES = 4000, 15, 15

# On an H200, by formula, queries or width, and backward: share of the limit, ratio to a rival.
TARGETS = {
    ("dot", 1, False): {"limit": 0.85},
    ("dot", 512, False): {"limit": 0.70},
    ("dot", 1024, False): {"limit": 0.60},
    ("dot", 512, True): {"sdpa": 3.0},
    ("dot", 1024, True): {"sdpa": 3.0},
}


def lines_of(directory: Path) -> dict[str, list[Line]]:
    """The lines of each stage that was run."""
    found = {name: jsonl.read(directory / f"{name}.jsonl") for name in STAGES}
    return {name: lines for name, lines in found.items() if lines}


def failures(lines: Iterable[Line]) -> list[Line]:
    """The last line of each item that failed, and workers that did not start."""
    lines = list(lines)
    starts = [line for line in lines if line.get("item") == "(start)"]
    rest = [line for key, line in jsonl.items(lines).items() if key[1] != "(start)"]
    return starts[:3] + [line for line in rest if line["outcome"] not in GOOD]


def rates_of(lines: Iterable[Line]) -> dict[str, Rates]:
    """What the GPU does at best, by dtype; empty if it was not measured."""
    for line in lines:
        if "rates" in line:
            return {dtype: Rates(**fields) for dtype, fields in line["rates"].items()}
    return {}


def limit_of(row: GpuRow, rates: Rates) -> tuple[float, str]:
    """The least seconds of a row, and the resource that bounds it."""
    problem = row.problem
    least = limit(problem, rates)
    seconds = least.seconds
    if row.backward:
        seconds += limit(problem, rates, backward=True).seconds
    return seconds * row.read, least.bound_by


def measured(lines: Iterable[Line], rows: Iterable[GpuRow]) -> list[dict[str, Any]]:
    """A result for every row and backend with a line; no time without a passed check."""
    lines = list(lines)
    known = jsonl.items(lines)
    rates, found = rates_of(lines), []
    for row in rows:
        rivals = {}
        for side in row.sides():
            phase = "compilers" if side in COMPILERS else "times"
            line = known.get((phase, f"{row} | {side}"))
            if side not in row.backends and line is not None:
                rivals[side] = line
        for backend in row.backends:
            checked = known.get(("checks", f"{row} | {backend}"))
            timed = known.get(("times", f"{row} | {backend}"))
            if checked is not None or timed is not None:
                given = rates.get(str(row.dtype))
                found.append(_result(row, backend, checked, timed, rivals, given))
    return found


def _result(
    row: GpuRow,
    backend: str,
    checked: Line | None,
    timed: Line | None,
    rivals: dict[str, Line],
    rates: Rates | None,
) -> dict[str, Any]:
    result: dict[str, Any] = {"case": str(row), "backend": backend, "peers": {}}
    for name, line in (("check", checked), ("time", timed)):
        if line is None:
            return result | {"failed": f"no {name}"}
        result |= {k: line[k] for k in ("error_share", "worst") if k in line}
        if line["outcome"] != "passed":
            return result | {"failed": f"{name}: {reason(line)}"}
    assert timed is not None
    result |= {name: timed[name] for name in ("kernel", "call", "graph", "peak_bytes")}
    for name, line in rivals.items():
        is_timed = line["outcome"] == "passed"
        result["peers"][name] = line["kernel"] / timed["kernel"] if is_timed else reason(line)[:60]
    if rates is not None:
        least, bound_by = limit_of(row, rates)
        result |= {"limit": least, "bound_by": bound_by, "share": least / timed["kernel"]}
        result["verdict"] = verdict(row, result)
    return result


def reason(line: Line) -> str:
    """Why a line failed, in one line."""
    error = str(line.get("error") or line.get("cuda") or "").strip()
    if not error:
        error = (str(line.get("log", "")).strip().splitlines() or [""])[-1]
    word = "" if line["outcome"] == "failed" else f"{line['outcome']}: "
    return word + (error.splitlines() or [""])[0]


def verdict(row: GpuRow, line: dict[str, Any]) -> str:
    """Which targets of the row are met; empty where it has none."""
    wanted = TARGETS.get((row.formula, 1 if row.queries == 1 else row.width, row.backward), {})
    if row != GpuRow(row.score, row.sizes, backward=row.backward, backends=row.backends,
                     with_compilers=row.with_compilers):  # fmt: skip
        return ""
    words = []
    for name, least in wanted.items():
        got = line["share"] if name == "limit" else line["peers"].get(name)
        if isinstance(got, float):
            words.append(f"{name} {'ok' if got >= least else f'short of {least:g}'}")
    return ", ".join(words)


def _counts(directory: Path, found: dict[str, list[Line]]) -> list[str]:
    last = {str(line.get("stage")): line for line in jsonl.read(directory / "run.jsonl")}
    words = []
    for name in dict.fromkeys((*last, *found)):
        lines = jsonl.items(found.get(name, [])).values()
        outcomes = Counter(line["outcome"] for line in lines)
        counted = ", ".join(f"{number} {word}" for word, number in sorted(outcomes.items()))
        run = last.get(name, {})
        ends = (
            f" of {run['items']} items in {run.get('seconds', 0):.0f} s" if "items" in run else ""
        )
        error = f" ERROR {str(run['error'])[-300:]}" if "error" in run else ""
        words.append(f"{name}: {counted or run.get('note', 'nothing')}{ends}{error}")
    return words


def _failures(found: dict[str, list[Line]]) -> list[str]:
    """One line for each kind of failure."""
    failed = [(name, line) for name, lines in found.items() for line in failures(lines)]
    kinds: dict[tuple[str, str], list[Line]] = {}
    for name, line in failed:
        alike = re.sub(r"[-\d.e+]+", "#", reason(line))[:60]
        kinds.setdefault((name, alike), []).append(line)
    words = []
    for (name, _), lines in list(kinds.items())[:MOST_FAILURES]:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        item = lines[0]["item"].rpartition("/")[2]
        words.append(f"{name} {item[:70]}: {reason(lines[0])[:90]}{more}")
    if len(kinds) > MOST_FAILURES:
        words.append(f"... and {len(kinds) - MOST_FAILURES} other kinds of failure")
    return words


def _speeds(results: list[dict[str, Any]]) -> list[str]:
    timed = [line for line in results if "share" in line]
    words = ["worst shares of the limit:"] if timed else []
    for line in sorted(timed, key=lambda line: line["share"])[:MOST_SHARES]:
        ratios = ", ".join(
            f"{value:.2f}x {name}"
            for name, value in line["peers"].items()
            if isinstance(value, float)
        )
        kernel, call = duration(line["kernel"]), duration(line["call"])
        shown = f"  {100 * line['share']:.0f} % {line['case']} {line['backend']}"
        words.append(f"{shown}: {kernel}, call {call}; {ratios}"[:120])
    best: dict[str, tuple[float, str]] = {}
    for line in timed:
        for name, value in line["peers"].items():
            if isinstance(value, float) and value > best.get(name, (0.0, ""))[0]:
                best[name] = (value, f"{line['case']} {line['backend']}")
    for name, (value, case) in best.items():
        words.append(f"best against {name}: {value:.2f}x, {case}")
    return words


def summary(directory: Path) -> tuple[str, bool]:
    """A text of under 4 KB, and whether everything that was run passed."""
    found = lines_of(directory)
    last = {str(line.get("stage")): line for line in jsonl.read(directory / "run.jsonl")}
    failed = _failures(found)
    words = [*_counts(directory, found)]
    words += ["failures:", *(f"  {line}" for line in failed)] if failed else []
    words += _speeds(measured(found.get("kernels", []), all_rows()))
    words += _others(found)
    incomplete = any(line.get("done", 0) < line.get("items", 1) for line in last.values())
    passed = bool(last) and not failed and not incomplete
    words.append(f"gpu-check: {'passed' if passed else 'FAILED'}")
    shown = "\n".join(words)
    if len(shown.encode()) > MOST_BYTES:
        end = words[-1]
        cut = shown.encode()[: MOST_BYTES - len(end) - 8].decode(errors="ignore")
        shown = f"{cut}\n...\n{end}"
    return shown, passed


def _others(found: dict[str, list[Line]]) -> list[str]:
    """Models against eager, and candidates that are faster than the launch table."""
    words = []
    for line in tables.model_results(found.get("models", [])):
        words.append(f"{line['work']}: {line['eager'] / line['ours']:.2f}x eager")
    for line in tables.sweep_results(found.get("sweep", [])):
        best = line["candidates"][0]
        if best["plan"] != "table":
            faster = line["table"] / best["kernel"]
            words.append(f"{line['target']}: {best['plan']} is {faster:.2f}x the table")
    return words


def everything(directory: Path) -> str:
    """Tables of everything that was timed."""
    found = lines_of(directory)
    shown = [tables.kernels(measured(found.get("kernels", []), all_rows()))]
    shown += [tables.models(found["models"])] if "models" in found else []
    shown += [tables.sweep(found["sweep"])] if "sweep" in found else []
    return "\n\n".join(shown)


def results_of(directory: Path) -> dict[str, Any]:
    """What is kept of a run: its rows, and everything else as it was written."""
    found = lines_of(directory)
    kernels = found.get("kernels", [])
    gpu = next((line["gpu"] for line in kernels if "gpu" in line), "unknown")
    newest = max((path.stat().st_mtime for path in directory.glob("*.jsonl")), default=0.0)
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(newest)),
        "gpu": gpu,
        "run": jsonl.read(directory / "run.jsonl"),
        "rates": {dtype: vars(rate) for dtype, rate in rates_of(kernels).items()},
        "counts": {
            name: dict(Counter(line["outcome"] for line in jsonl.items(lines).values()))
            for name, lines in found.items()
        },
        "rows": measured(kernels, all_rows()),
        "models": tables.model_results(found.get("models", [])),
        "sweep": tables.sweep_results(found.get("sweep", [])),
        "profile": list(jsonl.items(found.get("profile", [])).values()),
        "failures": [line for lines in found.values() for line in failures(lines)],
    }


def write(directory: Path, target: Path) -> list[Path]:
    """Write the results of a run below ``target``/GPU: JSON, and a plot if matplotlib is installed.

    Each file appears complete or not at all.
    """
    results = results_of(directory)
    where = target / slug(results["gpu"])
    path = where / f"{results['date'][:10]}-gpu.json"
    write_whole(path, json.dumps(results, indent=1) + "\n")
    return [path, *_plots(where, results)]


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
    figure.savefig(partial, format="png", dpi=60)
    pyplot.close(figure)
    partial.replace(target)
    return [target]
