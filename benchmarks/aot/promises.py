"""The cases that are compiled ahead of time, and what is promised of their kernels.

Little stack, shared memory that the chip has, matrix instructions, loads of 16 bytes, half a
reciprocal for each element of the concat loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch

from benchmarks.aot.compile import Case, Compiled, Gpu, launches, loop_elements, source_of
from fused_attn.backends.triton.call import Launch

STACK = {"cuda": 64, "hip": 128}  # bytes that a thread may spill
STACK_OF_FLAGS = 256  # with dropout or a gradient of the weights, which few calls have
WIDTHS = (64, 128, 256, 512, 1000, 1024, 2048)
SHAPES = ((1, 1024), (4, 1024), (16, 1024), (64, 1024), (50, 50), (128, 8192))  # (T, S)
# Kernels of matrix products, and the block that holds the left operand's rows: WGMMA takes 64.
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
    """Calls that reach every row of the launch table, some with every flag."""
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
    for queries, source in ((1, 1024), (64, 200)) if quick else heavy:  # one gradient fewer
        yield Case("dot", torch.bfloat16, queries, source, 512, flags="lengths frozen")
    if not quick:
        for score in ("dot", "concat"):  # no load of 16 bytes
            yield Case(score, torch.bfloat16, 50, 300, 999, flags="lengths")


def promises(result: Compiled, launch: Launch, gpu: Gpu) -> list[str]:
    """The promises that ``result`` breaks, as sentences."""
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
    # A thread's elements of concat scores share loads: a wide one needs 16 elements.
    tile = result.tiles.get("BLOCK_T", 0) * result.tiles.get("BLOCK_S", 0)
    is_small = _is_scores_alone(result) and tile < 16 * gpu.target.warp_size * result.num_warps
    if is_aligned and result.kernel in WIDE and not result.wide_loads and not is_small:
        yield "no load of 16 bytes"


def _is_scores_alone(result: Compiled) -> bool:
    """Whether the kernel makes concat scores and reads no memory, so that it has no product."""
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
    """Every specialised kernel that the cases would launch, once, as (case, launch)."""
    found: dict[str, tuple[str, Launch]] = {}
    for case in cases:
        for pass_, made in zip(("forward", "backward"), launches(case, gpu.chip), strict=True):
            for launch in made:
                source, options = source_of(launch)
                found.setdefault(f"{source.hash()} {options}", (f"{case} {pass_}", launch))
    return list(found.values())
