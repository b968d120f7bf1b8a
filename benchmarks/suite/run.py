"""Running the suite: which cases, which sides, on which device."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.files import RESULTS, ROOT
from benchmarks.common.problems import Row, Sizes
from benchmarks.common.scaling import SIZES, measure_growth
from benchmarks.common.sides import EAGER
from benchmarks.common.table import progress
from benchmarks.suite import memory, models
from benchmarks.suite.cases import Case, cases
from benchmarks.suite.measure import Record, measure_case, measure_limits
from benchmarks.suite.results import (
    Run,
    cases_that_are_wrong,
    machine_name,
    provenance,
    text_of,
)
from benchmarks.suite.sides import Side, sides
from fused_attn import backends

_SOURCES = (128, 256, 512, 1024)  # at which memory is measured
_GROWTH = Sizes(4, 32, 128, 256)


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The options that `quick` and `full` share."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    made.add_argument("--only", default="", metavar="TEXT", help="only cases that contain it")
    made.add_argument(
        "--device", choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    made.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of torch"
    )
    made.add_argument("--output", type=Path, metavar="FILE", help="write the results there")
    return made


def run(
    options: argparse.Namespace,
    *,
    quick: bool,
    budget_s: float,
    chosen: Sequence[Side] | None = None,
) -> Run:
    """Measure everything that was asked for, and show on a terminal what is being measured."""
    torch.set_num_threads(options.threads)
    device, only = options.device, options.only
    limits = measure_limits(device, options.threads)
    compared = [side for side in chosen or sides(device) if not (quick and side.slow)]
    records: list[Record] = []
    for case in cases(quick=quick, only=only):
        progress(case.id)
        found = measure_case(case, compared, device, limits, budget_s)
        if not quick:
            found = [_with_memory(case, record, device) for record in found]
        records += found
    backend = next((n for n in backends.BACKENDS if _runs(n, device)), "eager")
    levels: tuple[tuple[Sequence[Any], Callable[..., list[Record]]], ...] = (
        (models.LAYERS, models.measure_layer),
        (models.MODELS, models.measure_model),
    )
    for group, measure in levels:
        for case in group:
            if (case.quick or not quick) and only.lower() in case.name.lower():
                progress(case.name)
                records += measure(case, device, backend, budget_s)
    whole = not quick and not only
    growth = _growth(options.threads, budget_s) if whole and device == "cpu" else {}
    peaks = _memory(compared, device) if whole else {}
    progress("")
    facts = provenance(options.threads, device)
    return Run(facts, limits, records, growth, peaks, installed_bytes())


def short_cases() -> set[str]:
    """The ids of all cases of the short suite."""
    layers = {models.layer_id(case) for case in models.LAYERS if case.quick}
    whole = {models.model_id(case) for case in models.MODELS if case.quick}
    return {case.id for case in cases(quick=True)} | layers | whole


def _runs(backend: str, device: str) -> bool:
    return not backends.unavailable_reasons(backend) and (backend == "cpu") == (device == "cpu")


def _with_memory(case: Case, record: Record, device: str) -> Record:
    """The record with its peak memory, measured in a process of its own."""
    if record.seconds is None or case.row.sizes.queries == 1:  # a step needs hardly any
        return record
    return replace(record, peak_bytes=_peak(case.id, record.side, device))


def _peak(case: str, side: str, device: str) -> int | None:
    """Bytes of a call in a process of its own; None if it fails there."""
    command = [sys.executable, "-m", memory.__name__, case, side, device]
    # The package is found in the working directory.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return None if done.returncode else int(done.stdout)


def _memory(compared: Sequence[Side], device: str) -> dict[str, dict[str, int]]:
    """Peak bytes of a training step of concat, by side and source length."""
    found: dict[str, dict[str, int]] = {}
    for side in compared:
        if not (side.ours or side.name in (EAGER, "in chunks")):
            continue
        for source in _SOURCES:
            progress(f"memory {side.name}, S = {source}")
            peak = _peak(f"concat:8x40x{source}x256", side.name, device)
            if peak is not None:
                found.setdefault(side.name, {})[str(source)] = peak
    return found


def _growth(threads: int, budget_s: float) -> dict[str, list[float]]:
    """Seconds after each doubling of each size, by call and size."""
    found = {}
    calls = [(f"{score}, {axis}", Row(score, _GROWTH), axis) for score in ("dot", "concat")
             for axis in SIZES]  # fmt: skip
    # The memory keeps a width of its own, so that doubling D doubles A alone.
    score = Row("projected", _GROWTH, prepared=True, memory_dim=64)
    for name, row, axis in (*calls, ("concat, prepared, A", score, "D")):
        progress(f"growth of {name}")
        scaled = measure_growth(name, row, axis, threads, budget_s)
        if scaled.passed:
            found[name] = list(scaled.seconds.values())
    return found


def installed_bytes() -> dict[str, int]:
    """Bytes of the native module, of the package with it, and of the wheel if there is one."""
    place = Path(backends.__file__).parent.parent
    found = {"native module": sum(file.stat().st_size for file in place.glob("_C.*"))}
    files = [f for f in place.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    found["package"] = sum(file.stat().st_size for file in files)
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if wheels:
        found["wheel"] = wheels[-1].stat().st_size
    return found


def finish(found: Run, options: argparse.Namespace, default: Path | None = None) -> int:
    """Print the table and write the results. Returns 1 if one of our results was wrong."""
    print(text_of(found))
    path = options.output or default
    if path is not None:
        found.save(path)
        print(f"\nwritten: {path}")
    return 1 if cases_that_are_wrong(found.records) else 0


def default_path(found: Run) -> Path:
    """Where the full suite writes its results: by machine and day."""
    facts = found.provenance
    return RESULTS / machine_name(facts) / f"{facts['date'][:10]}.json"
