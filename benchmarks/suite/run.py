"""Running the suite: which cases, which sides, on what."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.suite import memory as suite_memory
from benchmarks.suite import models as suite_models
from benchmarks.suite import results as suite_results
from benchmarks.suite.cases import Case, cases
from benchmarks.suite.measure import Record, measure_case, measure_limits
from benchmarks.suite.results import RESULTS, Run, machine_name, provenance, text_of
from benchmarks.suite.sides import EAGER, Side, sides
from benchmarks.targets.cpu.rows import Row, Sizes
from benchmarks.targets.cpu.scaling import SIZES, measure_growth
from fused_attn import backends

_SOURCES = (128, 256, 512, 1024)  # at which memory is measured
_GROWTH = Sizes(4, 32, 128, 256)


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Options that the suites share."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    made.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this")
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
    """Measure everything that was asked for, and say on a terminal what is being measured."""
    torch.set_num_threads(options.threads)
    device, only = options.device, options.only
    limits = measure_limits(device, options.threads)
    compared = [side for side in chosen or sides(device) if not (quick and side.slow)]
    records: list[Record] = []
    for case in cases(quick=quick, only=only):
        _tell(case.id)
        found = measure_case(case, compared, device, limits, budget_s)
        if not quick:
            found = [_with_memory(case, record, device) for record in found]
        records += found
    backend = next((n for n in backends.BACKENDS if _runs(n, device)), "eager")
    levels: tuple[tuple[Sequence[Any], Callable[..., list[Record]]], ...] = (
        (suite_models.LAYERS, suite_models.measure_layer),
        (suite_models.MODELS, suite_models.measure_model),
    )
    for group, measure in levels:
        for case in group:
            if (case.quick or not quick) and only.lower() in case.name.lower():
                _tell(case.name)
                records += measure(case, device, backend, budget_s)
    whole = not quick and not only
    growth = _growth(options.threads, budget_s) if whole and device == "cpu" else {}
    memory = _memory(compared, device) if whole else {}
    _tell("")
    facts = provenance(options.threads, device)
    return Run(facts, limits, records, growth, memory, installed_bytes())


def short_cases() -> set[str]:
    """The ids of all cases of the short suite."""
    layers = {suite_models.layer_id(case) for case in suite_models.LAYERS if case.quick}
    models = {suite_models.model_id(case) for case in suite_models.MODELS if case.quick}
    return {case.id for case in cases(quick=True)} | layers | models


def _runs(backend: str, device: str) -> bool:
    return not backends.unavailable_reasons(backend) and (backend == "cpu") == (device == "cpu")


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _with_memory(case: Case, record: Record, device: str) -> Record:
    """The record with the peak of its memory, measured in a process of its own."""
    from dataclasses import replace

    if record.seconds is None or case.row.sizes.queries == 1:  # a step needs next to none
        return record
    return replace(record, peak_bytes=_peak(case.id, record.side, device))


def _peak(case: str, side: str, device: str) -> int | None:
    """Bytes of a call in a process of its own; None if it fails there."""
    command = [sys.executable, "-m", suite_memory.__name__, case, side, device]
    place = RESULTS.parent.parent
    # The package of benchmarks is found in the directory that it is run in.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    return None if done.returncode else int(done.stdout)


def _memory(compared: Sequence[Side], device: str) -> dict[str, dict[str, int]]:
    """Peaks of a training step of concat, by side and length of the source."""
    found: dict[str, dict[str, int]] = {}
    for side in compared:
        if not (side.ours or side.name in (EAGER, "in chunks")):
            continue
        for source in _SOURCES:
            _tell(f"memory {side.name}, S = {source}")
            peak = _peak(f"concat:8x40x{source}x256", side.name, device)
            if peak is not None:
                found.setdefault(side.name, {})[str(source)] = peak
    return found


def _growth(threads: int, budget_s: float) -> dict[str, list[float]]:
    found = {}
    calls = [(Row(score, _GROWTH, score), axis, axis) for score in ("dot", "concat")
             for axis in SIZES]  # fmt: skip
    # With a memory of its own width, that of the score is A alone.
    score = Row("concat, prepared", _GROWTH, "projected", prepared=True, memory_dim=64)
    for row, axis, name in (*calls, (score, "D", "A")):
        _tell(f"growth of {row.case}, {name}")
        scaled = measure_growth(row, axis, threads, budget_s)
        if scaled.passed:
            found[f"{row.case}, {name}"] = list(scaled.seconds.values())
    return found


def installed_bytes() -> dict[str, int]:
    """Size of the native module, and of the package with it."""
    place = Path(backends.__file__).parent.parent
    found = {"native module": sum(file.stat().st_size for file in place.glob("_C.*"))}
    files = [f for f in place.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    found["package"] = sum(file.stat().st_size for file in files)
    wheels = sorted((RESULTS.parent.parent / "dist").glob("*.whl"))
    if wheels:
        found["wheel"] = wheels[-1].stat().st_size
    return found


def finish(found: Run, options: argparse.Namespace, default: Path | None = None) -> int:
    """Print the table and write the results. Returns 1 if one of ours was wrong."""
    print(text_of(found))
    path = options.output or default
    if path is not None:
        found.save(path)
        print(f"\nwritten: {path}")
    return 1 if suite_results.cases_that_are_wrong(found.records) else 0


def default_path(found: Run) -> Path:
    """Where the full suite writes: by machine and day."""
    facts = found.provenance
    return RESULTS / machine_name(facts) / f"{facts['date'][:10]}.json"
