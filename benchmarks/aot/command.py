"""What the Triton kernels compile to for absent GPUs: registers, spills, instructions.

Every row of the launch table is compiled ahead of time and checked against its promises: little
stack, shared memory that the chip has, matrix instructions, loads of 16 bytes, half a reciprocal
for each element of the concat loop.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.files import write_whole
from benchmarks.common.table import render

if TYPE_CHECKING:
    from benchmarks.aot.compile import Gpu
    from fused_attn.backends.triton.call import Launch


def run(gpu: Gpu, quick: bool) -> tuple[list[dict[str, Any]], int]:
    """Compile all kernels for a GPU. Returns a row for each, and how many break a promise."""
    from benchmarks.aot.compile import compile_for, loop_elements
    from benchmarks.aot.promises import cases, distinct, promises

    def one(job: tuple[str, Launch]) -> dict[str, Any]:
        case, launch = job
        try:
            result = compile_for(launch, gpu)
        except Exception as error:  # the compiler raises any type
            lines = str(error).splitlines() or [type(error).__name__]
            reason = f"does not compile: {lines[0][:200]}"
            return {"case": case, "kernel": launch.kernel.__name__, "broken": [reason]}
        broken = promises(result, launch, gpu)
        return {"case": case, **asdict(result), "elements": loop_elements(launch), "broken": broken}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(one, distinct(cases(quick), gpu)))
    return rows, sum(bool(row["broken"]) for row in rows)


def _cells(row: dict[str, Any]) -> list[str]:
    if "tiles" not in row:
        return [row["kernel"], *[""] * 7, "; ".join(row["broken"]), row["case"]]
    names = {k.removeprefix("BLOCK_").lower(): v for k, v in row["tiles"].items()}
    tiles = " ".join(f"{name}={value}" for name, value in names.items())
    per_element = ", ".join(
        f"{loop.reciprocals / count:.2f} of {loop.instructions / count:.1f}"
        for loop, count in zip(row["loops"], row["elements"], strict=False)
    )
    return [
        *(row["kernel"], f"{tiles} warps={row['num_warps']} stages={row['num_stages']}"),
        *(str(row[name]) for name in ("registers", "spills", "shared")),
        *(row["matrix"], f"{row['wide_loads']}/{row['narrow_loads']}", per_element),
        *("; ".join(row["broken"]) or "ok", row["case"]),
    ]


HEADER = [
    *("kernel", "tiles", "registers", "stack", "shared", "matrix", "16-byte/other loads"),
    *("reciprocals of instructions an element", "verdict", "first seen in"),
]


def main(arguments: list[str]) -> int:
    """Compile, print the table, and return 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks aot", description=__doc__)
    parser.add_argument(
        "--gpu", action="append", help="sm_80, sm_89, sm_90, sm_120 or gfx942; all if not given"
    )
    parser.add_argument("--quick", action="store_true", help="one width and few shapes")
    parser.add_argument("--output", type=Path, help="a directory for the tables, one file per GPU")
    parser.add_argument("--verbose", action="store_true", help="also print rows that are ok")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: interpreted kernels have no compiler")
    try:
        import triton
    except ImportError:
        parser.error("the package triton is not installed")
    from benchmarks.aot.compile import GPUS

    names = options.gpu or list(GPUS)
    if unknown := set(names) - GPUS.keys():
        parser.error(f"--gpu must be one of {', '.join(GPUS)}, got {', '.join(sorted(unknown))}")
    failures = 0
    for name in names:
        began = time.monotonic()
        rows, broken = run(GPUS[name], options.quick)
        shown = [row for row in rows if row["broken"] or options.verbose]
        if shown:
            print(render(HEADER, [_cells(row) for row in shown], text_columns=2))
        seconds = time.monotonic() - began
        made = f"{name}, triton {triton.__version__}: {len(rows)} kernels in {seconds:.0f} s"
        print(f"{made}, {broken} with a broken promise", flush=True)
        if options.output:
            _write(options.output, name, triton.__version__, rows)
        failures += broken
    return 1 if failures else 0


def _write(directory: Path, name: str, version: str, rows: list[dict[str, Any]]) -> None:
    text = render(HEADER, [_cells(row) for row in rows], text_columns=2)
    head = f"{name}, triton {version}, compiled ahead of time; nothing here was run on a GPU.\n\n"
    write_whole(directory / f"{name}-triton-{version}.txt", head + text + "\n")
