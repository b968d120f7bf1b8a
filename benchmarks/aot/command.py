"""What the Triton kernels become on GPUs that are not here: registers, spills, instructions.

Every row of the launch table is compiled ahead of time and held against its promises: little stack,
shared memory that the chip has, matrix instructions, loads of 16 bytes, half a reciprocal for each
element of the concat loop.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common import table

if TYPE_CHECKING:
    from benchmarks.aot.compile import Case, Compiled, Gpu
    from fused_attn.backends.triton.call import Launch

STACK = {"cuda": 64, "hip": 128}  # bytes a thread may spill
STACK_OF_FLAGS = 256  # with dropout or a gradient of the weights, which few calls have
WIDTHS = (64, 128, 256, 512, 1000, 1024, 2048)
SHAPES = ((1, 1024), (4, 1024), (16, 1024), (64, 1024), (50, 50), (128, 8192))  # (T, S)
# Kernels of matrix products, and the block that is the left side's rows: WGMMA takes 64 of them.
MATRIX = {
    "online_forward": "BLOCK_T",
    "online_backward": "BLOCK_T",
    "rows_forward": "BLOCK_T",
    "rows_backward": "BLOCK_T",
    "score_rows": "BLOCK_T",
    "context_columns": "BLOCK_T",
    "query_gradients": "BLOCK_T",
    "source_gradients": "BLOCK_S",
}
WIDE = (*MATRIX, "step_forward", "step_backward", "window_backward")


def cases(quick: bool) -> Iterator[Case]:
    """A call for every row of the launch table, and some with every flag."""
    from benchmarks.aot.compile import Case

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    shapes, widths, heavy = SHAPES, WIDTHS, ((1, 1024), (64, 1024), (50, 50))
    if quick:
        dtypes, shapes, widths, heavy = dtypes[:1], ((1, 1024), (64, 1024)), (512,), ((64, 200),)
    for dtype, width, (queries, source) in itertools.product(dtypes, widths, shapes):
        for score in ("dot", "concat"):
            yield Case(score, dtype, queries, source, width, flags="lengths")
    for (queries, source), score in itertools.product(heavy, ("dot", "concat")):
        for mask, width in itertools.product(("mask", "cube"), (512,) if quick else (512, 1024)):
            flags = f"lengths {mask} keep weights"
            yield Case(score, torch.bfloat16, queries, source, width, flags=flags)
    for dtype, width in itertools.product(dtypes, (512,) if quick else (64, 512, 1024, 2048)):
        for score in ("dot", "concat"):
            yield Case(score, dtype, 50, 1000, width, flags="lengths window")
        yield Case("scores", dtype, 50, 1000, width, flags="lengths")
    for queries, source in ((1, 1024), (64, 200)) if quick else heavy:  # one result less
        yield Case("dot", torch.bfloat16, queries, source, 512, flags="lengths frozen")
    if not quick:
        for score in ("dot", "concat"):  # no load of 16 bytes
            yield Case(score, torch.bfloat16, 50, 300, 999, flags="lengths")


def promises(result: Compiled, launch: Launch, gpu: Gpu) -> list[str]:
    """What ``result`` was to be and is not, in sentences."""
    return [
        *_memory_promises(result, launch, gpu),
        *_product_promises(result, launch, gpu),
        *_loop_promises(result, launch, gpu),
    ]


def _memory_promises(result: Compiled, launch: Launch, gpu: Gpu) -> Iterator[str]:
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    has_flags = given.get("keep") is not None or given.get("grad_weights") is not None
    most = STACK_OF_FLAGS if has_flags else STACK[gpu.target.backend]
    is_aligned = result.tiles.get("UNIT", 1) > 1
    if is_aligned and result.spills > most:
        yield f"{result.spills} bytes of stack, at most {most} expected"
    if result.shared > gpu.chip.shared_memory:
        chip = gpu.chip.shared_memory
        yield f"{result.shared} bytes of shared memory, the chip has {chip}"
    # Concat scores read what a thread's elements share: 16 of them are needed for a wide load.
    tile = result.tiles.get("BLOCK_T", 0) * result.tiles.get("BLOCK_S", 0)
    is_small = _is_scores_alone(result) and tile < 16 * gpu.target.warp_size * result.num_warps
    if is_aligned and result.kernel in WIDE and not result.wide_loads and not is_small:
        yield "no load of 16 bytes"


def _is_scores_alone(result: Compiled) -> bool:
    """Whether the kernel makes concat scores and reads no memory: it has no product."""
    return result.kernel == "score_rows" and bool(result.tiles["CONCAT"])


def _product_promises(result: Compiled, launch: Launch, gpu: Gpu) -> Iterator[str]:
    dtypes = {x.dtype for x in launch.arguments if isinstance(x, torch.Tensor)}
    is_short = bool(dtypes & {torch.bfloat16, torch.float16})
    if not is_short or result.kernel not in MATRIX or _is_scores_alone(result):
        return
    rows = result.tiles[MATRIX[result.kernel]]
    if not result.matrix:
        yield "no matrix instruction"
    elif gpu.name == "sm_90" and rows >= 64 and result.matrix != "wgmma":
        yield f"{rows} rows and no WGMMA"


def _loop_promises(result: Compiled, launch: Launch, gpu: Gpu) -> Iterator[str]:
    from benchmarks.aot.compile import loop_elements

    elements = loop_elements(launch)
    if gpu.target.backend != "cuda" or not elements:
        return
    if len(result.loops) != len(elements):
        yield f"{len(result.loops)} loops with paired reciprocals, expected {len(elements)}"
        return
    for loop, count in zip(result.loops, elements, strict=True):
        share = loop.reciprocals / count
        if share > 0.51:
            yield f"{share:.2f} reciprocals for an element of a concat loop, expected .5"


def distinct(cases: Iterable[Case], gpu: Gpu) -> list[tuple[str, Launch]]:
    """Each kernel that the cases would launch, specialised, once: (case, launch)."""
    from benchmarks.aot.compile import launches, source_of

    found: dict[str, tuple[str, Launch]] = {}
    for case in cases:
        for pass_, made in zip(("forward", "backward"), launches(case, gpu.chip), strict=True):
            for launch in made:
                source, options = source_of(launch)
                found.setdefault(f"{source.hash()} {options}", (f"{case} {pass_}", launch))
    return list(found.values())


def run(gpu: Gpu, quick: bool) -> tuple[list[dict[str, Any]], int]:
    """Compile all of a GPU's kernels: rows of what came of them, and how many broke a promise."""
    from benchmarks.aot.compile import compile_for, loop_elements

    def one(job: tuple[str, Launch]) -> dict[str, Any]:
        case, launch = job
        try:
            result = compile_for(launch, gpu)
        except Exception as error:  # the compiler raises anything
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
    parser.add_argument(
        "--output", type=Path, help="a directory for the tables, one file for each GPU"
    )
    parser.add_argument("--verbose", action="store_true", help="print the rows that are fine too")
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
            print(table.render(HEADER, [_cells(row) for row in shown], text_columns=2))
        seconds = time.monotonic() - began
        made = f"{name}, triton {triton.__version__}: {len(rows)} kernels in {seconds:.0f} s"
        print(f"{made}, {broken} with a broken promise", flush=True)
        if options.output:
            _write(options.output, name, triton.__version__, rows)
        failures += broken
    return 1 if failures else 0


def _write(directory: Path, name: str, version: str, rows: list[dict[str, Any]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    text = table.render(HEADER, [_cells(row) for row in rows], text_columns=2)
    head = f"{name}, triton {version}, compiled ahead of time; nothing here was run on a GPU.\n\n"
    target = directory / f"{name}-triton-{version}.txt"
    partial = target.with_suffix(".partial")
    partial.write_text(head + text + "\n", encoding="utf-8")
    partial.replace(target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
