"""The variants of the Triton kernels that the launch table can choose, and a small call for each.

A variant is compiled separately and lays out its work differently: a kernel with its tiles, warps
and stages, element size and load width. Options that only switch code on (a mask, a split of the
source) are counted once per kernel and not for each of its tiles. Kernels over all columns are an
exception: there every combination counts.

This file does not use the launch table itself: it calls the backend on meta tensors and records
what it would launch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import product
from typing import Any

import torch
from fused_attn.kernels.launch import Chip
from torch import Tensor

from fused_attn import backends
from fused_attn.backends.triton import call
from fused_attn.testing import Case

H200 = Chip(132, 232448)
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
Variant = tuple[Any, ...]

# Options of a launch that follow from the device or the element size.
_ELSEWHERE = {"enable_fp_fusion", "PRECISION", "WIDEN", "FAST_RCP"}
_FLAGS = {"MASK", "SPLIT", "CONCAT", "PROJ"}
# Sizes of loops and sums, counted separately from the tiles.
_COUNTS = {"BLOCK_SPLITS", "BLOCKS"}
# Tiles of another product in the same launch.
_BESIDE = {"QUERY_T", "QUERY_S", "QUERY_E"}


def variants_of(launch: call.Launch, case: Case) -> Iterator[Variant]:
    """The keys of one launch: tiles, flags and counts."""
    given = {name: value for name, value in launch.options.items() if name not in _ELSEWHERE}
    kernel, size = launch.kernel.__name__, case.dtype.itemsize
    if "UNIT" in given:
        given["aligned"] = given.pop("UNIT") > 1
    counts = {name: given.pop(name) for name in _COUNTS & set(given)}
    beside = {name: given.pop(name) for name in _BESIDE & set(given)}
    flags = {name: given[name] for name in _FLAGS & set(given)}
    tiles = given if kernel.startswith("online") else given.keys() - flags.keys()
    tiles = {name: given[name] for name in tiles}
    kind = [(name, flags[name]) for name in ("CONCAT", "PROJ") if name in flags]
    if flags.get("CONCAT") and "BLOCK_A" in tiles:  # score and memory have different widths
        columns = {name: tiles.pop(name) for name in ("BLOCK_A", "BLOCK_E")}
        for width in columns.items():
            yield (kernel, ("size", size), ("aligned", given.get("aligned")), *kind, width)
    # Sums are float32 for any dtype of the call.
    yield (kernel, ("size", 4 if kernel == "merge_alone" else size), *kind, *sorted(tiles.items()))
    if flags:
        apart = (("aligned", given.get("aligned")), ("weights", case.weights))
        yield (kernel, *apart, *sorted(flags.items()))
    for count in counts.items():
        yield (kernel, count)
    if beside:
        yield (kernel, ("size", size), *sorted(beside.items()))


def launches(case: Case, chip: Chip) -> list[call.Launch]:
    """The launches of forward and backward of ``case`` on a chip."""

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, queries, source = case.batch, case.queries, case.source
    lengths = empty(batch, dtype=torch.int64) if case.lengths else None
    shape = (batch, queries if case.mask == "cube" else 1, source)
    mask = None if case.mask == "none" else empty(*shape, dtype=torch.bool)
    keep = empty(batch, queries, source, dtype=torch.bool) if case.keep else None
    window = None
    if case.window != "none":
        window = (empty(batch, queries, dtype=FLOAT32), 3.5, case.window == "gaussian")
    masking = (lengths, mask, keep, 1.5, window)
    context, weights = empty(batch, queries, case.memory_dim), None
    if case.weights:
        weights = empty(batch, queries, source)
    saved = (context, weights, empty(batch, queries, dtype=FLOAT32))
    memory, triton = empty(batch, source, case.memory_dim), backends.load("triton")
    with call.recording(chip) as found:
        if case.score == "dot":
            operands = (empty(batch, queries, case.memory_dim), memory, 0.75, masking)
            triton.dot_forward(*operands, case.weights, True)
            triton.dot_backward(context, weights, *operands, saved, [True] * 3)
        else:
            width = case.attn_dim
            projections = (empty(batch, queries, width), empty(batch, source, width))
            operands = (*projections, None, empty(width), memory, masking)
            triton.concat_forward(*operands, case.weights, True)
            triton.concat_backward(context, weights, *operands, saved, [True] * 5)
    return found


@cache
def variants(case: Case, chip: Chip) -> frozenset[Variant]:
    return frozenset(v for one in launches(case, chip) for v in variants_of(one, case))


def _made(
    score: str, dtype: torch.dtype, sizes: tuple[int, ...], mask: str, full: bool, **options: Any
) -> Case:
    """A case with lengths, dropout and weights if ``full``, or with none of them."""
    batch, queries, source, memory_dim, attn_dim = sizes
    return Case(
        *(score, dtype, batch, queries, source, memory_dim, memory_dim, attn_dim),
        mask=mask,
        lengths=full,
        keep=full,
        weights=full,
        **options,
    )


# With some of these widths the last columns of a tile are unused; from 512 on with none.
ALIGNED = (16, 24, 64, 72, 200, 512, 1024, 2048)
UNALIGNED = (9, 31, 63, 127, 255, 511, 1023, 2047)
STYLES = tuple(product(("row", "cube", "none"), (True, False)))
DTYPES = (FLOAT32, BFLOAT16)


def _steps() -> Iterator[Case]:
    for width, dtype, style in product(ALIGNED + UNALIGNED, DTYPES, STYLES):
        yield _made("dot", dtype, (3, 1, 40, width, 1), *style)
    for source, score, width, style in product((5, 300), ("dot", "projected"), (64, 63), STYLES):
        yield _made(score, FLOAT32, (2, 2, source, width, width), *style)
    for widths in (ALIGNED, UNALIGNED):
        for memory_dim, attn_dim, dtype in product(widths, (widths[0], widths[-1]), DTYPES):
            yield _made("projected", dtype, (2, 2, 20, memory_dim, attn_dim), "row", True)
            yield _made("projected", dtype, (2, 2, 20, attn_dim, memory_dim), "row", True)
        for width, dtype in product(widths, DTYPES):
            yield _made("projected", dtype, (2, 2, 20, width, width), "row", True)
        for width, dtype, style in product((16, widths[2]), DTYPES, STYLES):
            yield _made("projected", dtype, (2, 2, 20, width, width), *style)
    for source in (300, 600, 1200, 2400, 4800, 9600, 16384):  # partial results to be merged
        yield _made("dot", FLOAT32, (1, 1, source, 1024, 1), "row", True)
        yield _made("projected", FLOAT32, (1, 1, source, 16, 16), "row", True)
        yield _made("dot", FLOAT32, (1, 9, source, 16, 1), "row", True)


def _rows() -> Iterator[Case]:
    widths = (16, 24, 64, 9, 31, 63)
    for width, source, queries in product(widths, (9, 20, 50, 100, 200), (9, 20, 64)):
        for score, dtype, mask in product(("dot", "projected"), DTYPES, ("row", "cube")):
            yield _made(score, dtype, (2, queries, source, width, width), mask, True)
    for source, score, width in product((50, 150), ("dot", "projected"), (64, 63)):
        for dtype, style in product(DTYPES, STYLES):
            yield _made(score, dtype, (2, 9, source, width, width), *style)
    for width, source, queries in product((128, 127), (9, 20, 50), (9, 40)):  # of gradients
        for score, dtype, mask in product(("dot", "projected"), DTYPES, ("row", "cube")):
            yield _made(score, dtype, (2, queries, source, width, width), mask, True)


def _windows() -> Iterator[Case]:
    for width, dtype, score in product(ALIGNED + UNALIGNED, DTYPES, ("dot", "projected")):
        for style in STYLES if width in (16, 63) else STYLES[:1]:
            yield _made(score, dtype, (2, 3, 40, width, width), *style, window="gaussian")
        yield _made(score, dtype, (2, 3, 9, width, width), *STYLES[0], window="gaussian")


def small() -> Iterator[Case]:
    """Calls that are small enough to be interpreted, or at least to be checked quickly."""
    for width, queries, style in product(ALIGNED, (16, 20, 64), STYLES):
        for source in (200, 300):
            yield _made("dot", BFLOAT16, (3, queries, source, width, 1), *style)
    for queries, style in product((16, 64), STYLES):
        yield _made("dot", BFLOAT16, (1, queries, 1024, 16, 1), *style)
    # Splits for more than 16 queries: two programs per batch row on a chip with twice as many.
    for width, mask in product((16, 24, 64, 72, 200, 512), ("row", "none")):
        for queries, source in ((20, 320), (64, 1024)):
            yield _made("dot", BFLOAT16, (3, queries, source, width, 1), mask, False)
    for width in (16, 64):  # with dropout the backward has more warps
        yield _made("projected", BFLOAT16, (2, 64, 300, width, width), "row", False)
    yield from _steps()
    yield from _rows()
    yield from _windows()


def large(number: int, seed: int = 0) -> Iterator[Case]:
    """Random calls of the sizes that occur in models."""
    draw = random.Random(seed)
    widths = (8, 32, 50, 64, 100, 128, 250, 256, 300, 511, 512, 600, 1000, 1024, 2001, 2048, 3000)
    for _ in range(number):
        score, window = draw.choice(("dot", "projected")), draw.choice(("none", "none", "gaussian"))
        memory_dim = draw.choice(widths)
        attn_dim = draw.choice((memory_dim, *widths))
        if window != "none":
            memory_dim, attn_dim = min(memory_dim, 2048), min(attn_dim, 2048)
        batch, queries = draw.choice((1, 16, 64, 256)), draw.choice((1, 2, 4, 8, 16, 30, 50, 64))
        source = draw.choice((5, 20, 50, 100, 200, 300, 1024, 8192))
        sizes = (batch, queries, source, memory_dim, attn_dim)
        style = draw.choice(STYLES)
        yield _made(score, draw.choice((*DTYPES, FLOAT16)), sizes, *style, window=window)


def work(case: Case) -> int:
    """Multiply-adds of the scores and the weighted sum, to order calls by cost."""
    sizes = case.batch * case.queries * case.source
    return sizes * (case.memory_dim + (case.attn_dim if case.score == "projected" else 0))


def interpreted(found: Iterable[Variant]) -> set[Variant]:
    """The variants that can be distinguished in the interpreter, which has no threads or loads."""
    apart = ("size", "aligned", "weights", "num_warps", "num_stages")
    return {(kernel, *(pair for pair in rest if pair[0] not in apart)) for kernel, *rest in found}


def chosen(
    calls: Iterable[tuple[Case, Chip]],
    seen_as: Callable[[Iterable[Variant]], set[Variant]] = set,
) -> list[tuple[Case, Chip]]:
    """A small subset of ``calls`` that covers all variants of ``calls``, preferring small calls."""
    seen: Counter[Variant] = Counter()
    reached = {one: seen_as(variants(*one)) for one in calls}
    found = []
    for one in sorted(reached, key=lambda one: work(one[0])):
        new = reached[one]
        if not all(seen[variant] for variant in new):
            seen.update(new)
            found.append(one)
    for one in list(found):  # remove calls whose variants are covered by larger, needed ones
        if all(seen[variant] > 1 for variant in reached[one]):
            seen.subtract(reached[one])
            found.remove(one)
    return found
