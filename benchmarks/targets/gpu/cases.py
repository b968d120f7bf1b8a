"""Small cases that together reach every tile variant of the launch table and the cuda backend.

Pure functions: the cases depend on the table alone, for an H100 or H200.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from fused_attn.kernels import launch

from benchmarks.common.chips import H100
from fused_attn.testing import Case

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BATCH = 3

# Cases by the regime that they reach. The most telling come first: a stage may end early.
_ONLINE = itertools.product(("dot",), (64, 20, 5), (300,), (512, 1024, 2048, 128, 200, 640), (0, 1))
_STEPS = itertools.product(
    ("dot", "concat"), (1, 8, 4), (300, 2100), (512, 1024, 37, 128, 2048, 640), (0,)
)
_ROWS = itertools.product(("dot", "concat"), (64, 20, 5), (300, 100, 20), (512, 37, 1024), (0, 1))


def variants(case: Case, chip: launch.Chip = H100) -> frozenset[tuple[object, ...]]:
    """The kernels, with their tiles, that a forward and backward call launches."""
    is_wide = case.dtype == F32
    width = case.memory_dim
    is_aligned = width % (4 if is_wide else 8) == 0
    kind = launch.Kind(is_wide, is_aligned, case.mask == "cube", case.keep)
    score = "concat" if case.score in ("concat", "projected") else "dot"
    sizes = (case.batch, case.queries, case.source, width, width)
    found: set[tuple[object, ...]] = set()
    for name, choose in (("forward", launch.forward), ("backward", launch.backward)):
        plan = choose(chip, score, sizes, kind)
        # The rows regime writes its weights itself; the others leave that to a merge.
        found.add((name, score, *_tiles(plan), case.weights and plan.regime != "rows"))
    if launch.backward(chip, score, sizes, kind).regime != "step":
        plan = launch.source_gradients(width, kind)
        found.add(("source", *_tiles(plan)))
    if score == "concat":
        found.add(("gradients", *_tiles(launch.concat_gradients(width, kind))))
    return frozenset((*variant, kind.mask_per_query, case.dtype) for variant in found)


def _tiles(plan: launch.Plan) -> tuple[object, ...]:
    tiles = tuple(plan.tiles.items())
    return plan.regime, tiles, plan.num_warps, plan.num_stages, plan.splits > 1


def _candidates() -> Iterator[Case]:
    sizes = itertools.chain(_ONLINE_SIZES, _STEP_SIZES, _ROW_SIZES)
    for number, (score, queries, source, width, is_cube) in enumerate(sizes):
        masks = ("cube",) if is_cube else (("none", "row", "shared")[number % 3],)
        for dtype, weights, mask in itertools.product((BF16, F16, F32), (False, True), masks):
            yield Case(
                "projected" if score == "concat" else score,
                *(dtype, BATCH, queries, source, width, width, width),
                lengths=True,
                mask=mask,
                keep=number % 4 == 1,
                weights=weights,
            )


_ONLINE_SIZES, _STEP_SIZES, _ROW_SIZES = tuple(_ONLINE), tuple(_STEPS), tuple(_ROWS)


def triton() -> list[Case]:
    """Cases that reach every variant, forward and backward, and then local attention."""
    found: list[Case] = []
    seen: set[tuple[object, ...]] = set()
    for case in _candidates():
        missing = variants(case) - seen
        # float16 differs from bfloat16 only in the operands' type, so not every size is repeated.
        is_short = case.memory_dim != 512 or case.mask == "cube" or case.queries == 20
        if case.dtype == F16 and is_short and case.memory_dim != 1024:
            continue
        if missing:
            seen |= missing
            found.append(case)
    for score, kind, dtype in itertools.product(
        ("dot", "projected"), ("hard", "gaussian"), (BF16, F32)
    ):
        for width, queries in ((512, 20), (37, 5)):
            sizes = (dtype, BATCH, queries, 300, width, width, width)
            found.append(Case(score, *sizes, lengths=True, window=kind))
    return found


def cuda() -> list[Case]:
    """Decoding steps of every width class, number of queries and dtype."""
    found = []
    widths = (37, 64, 96, 128, 256, 512, 640, 1024, 1536, 2048)
    for number, (width, dtype) in enumerate(itertools.product(widths, (BF16, F32, F16))):
        for score, queries in itertools.product(("dot", "projected"), (1, 2, 3, 4, 5, 8)):
            if (number + queries) % 2 and queries not in (1, 8):
                continue  # every width and every number of queries, but not all pairs
            source = (300, 1, 64, 2100)[(number + queries) % 4]
            mask = ("none", "row", "shared", "cube")[(number // 3 + queries) % 4]
            sizes = (dtype, BATCH, queries, source, width, width, width)
            is_even = (number + queries) % 4 < 2
            found.append(Case(score, *sizes, lengths=True, mask=mask, weights=is_even))
    return found
