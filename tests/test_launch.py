"""The launch table: a pure function of the problem, within the limits of GPUs and of Triton."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")

from fused_attn.kernels import launch
from fused_attn.kernels.launch import Chip, Kind

H200, A100, MI300 = Chip(132, 232448), Chip(108, 166912), Chip(304, 65536, is_nvidia=False)
BFLOAT16 = Kind(is_float32=False, is_aligned=True, mask_per_query=False)
SIZES = (1, 2, 7, 8, 9, 17, 64, 100)


def plans(chip: Chip) -> object:
    for queries, source, width in itertools.product(
        SIZES, (0, 1, 37, 128, 129, 1024, 8192), (1, 17, 512, 640, 2048, 3000)
    ):
        for score, is_float32, per_query in itertools.product(("dot", "concat"), (0, 1), (0, 1)):
            kind = Kind(bool(is_float32), width % 8 == 0, bool(per_query))
            sizes = (3, queries, source, width, width)
            for choose in (launch.forward, launch.backward):
                yield sizes, kind, choose(chip, score, sizes, kind), score


@pytest.mark.parametrize("chip", [H200, A100, MI300], ids=["h200", "a100", "mi300"])
def test_every_plan_covers_the_source_and_fits(chip: Chip) -> None:
    for (_, _, source, width, _), kind, plan, score in plans(chip):
        assert plan.splits >= 1
        assert (plan.splits - 1) * plan.segment < max(source, 1) <= plan.splits * plan.segment
        assert plan.segment % plan.tiles["BLOCK_S"] == 0
        blocks = [size for name, size in plan.tiles.items() if name.startswith("BLOCK")]
        assert all(size & (size - 1) == 0 for size in blocks)
        if plan.regime in ("step", "online"):
            assert plan.tiles["BLOCK_E"] >= width
        if plan.regime == "online":
            assert not kind.is_float32 and kind.is_aligned and source > launch.SHORT
            tile = plan.tiles["BLOCK_S"] * plan.num_stages + plan.tiles["BLOCK_T"]
            assert 2 * tile * plan.tiles["BLOCK_E"] < chip.shared_memory
        if plan.regime in ("rows", "columns"):
            assert plan.segment == plan.tiles["BLOCK_S"] <= launch.SHORT
            assert plan.regime == "columns" if plan.splits > 1 or score == "concat" else "rows"


def test_regimes() -> None:
    def regime(
        queries: int, source: int, width: int, score: str = "dot", is_float32: bool = False
    ) -> str:
        sizes = (64, queries, source, width, width)
        kind = BFLOAT16._replace(is_float32=is_float32)
        return launch.forward(H200, score, sizes, kind).regime

    assert regime(1, 8192, 512) == "step"
    assert regime(8, 1024, 512) == "online"
    assert regime(64, 1024, 1024) == "columns"
    assert regime(8, 1024, 1024) == "online"
    assert regime(50, 50, 512) == "rows"
    assert regime(64, 1024, 512, is_float32=True) == "columns"
    assert regime(4, 1024, 512, is_float32=True) == "step"
    assert regime(8, 1024, 512, "concat") == "step"
    assert regime(9, 1024, 512, "concat") == "columns"
    assert regime(1, 1024, 2049) == "columns"


def test_one_row_of_the_batch_is_split_over_the_chip_and_many_are_not() -> None:
    kind = BFLOAT16
    alone = launch.forward(H200, "dot", (1, 1, 16384, 512, 512), kind)
    assert alone.splits >= 132
    assert launch.forward(H200, "dot", (4096, 1, 1024, 512, 512), kind).splits == 1
    assert launch.forward(H200, "dot", (132, 64, 1024, 512, 512), kind).splits == 1
    # A partial result of 64 queries costs as much as 256 rows of memory, so there are few splits.
    few = launch.forward(H200, "dot", (1, 64, 1024, 512, 512), kind)
    assert few.regime == "columns" or few.splits <= 2


def test_a_chip_with_little_shared_memory_gets_narrow_tiles() -> None:
    sizes, kind = (108, 64, 1024, 512, 512), BFLOAT16
    assert launch.forward(A100, "dot", sizes, kind).num_stages < 3
    assert launch.forward(MI300, "dot", sizes, kind).regime == "columns"


@pytest.mark.parametrize("multiprocessors", [128, 170])  # RTX 4090 and RTX 5090
@pytest.mark.parametrize("width", [512, 1024])
@pytest.mark.parametrize("queries", [2, 16, 64])
def test_99_kilobytes_are_enough_for_matrix_products(
    multiprocessors: int, width: int, queries: int
) -> None:
    chip, kind = Chip(multiprocessors, 101376), BFLOAT16
    sizes = (64, queries, 1024, width, width)
    for plan in (
        launch.forward(chip, "dot", sizes, kind),
        launch.backward(chip, "dot", sizes, kind),
    ):
        assert plan.regime in ("online", "columns")  # "step" has no matrix products
        block_t, block_s, columns = (plan.tiles[f"BLOCK_{name}"] for name in "TSE")
        tile = block_s + block_t
        if plan.regime == "online":  # one tile of queries, and of memory one for each stage
            tile += (plan.num_stages - 1) * block_s
        assert 2 * columns * tile <= 101376
        assert min(block_t, block_s, columns) >= 16  # what a product takes


def test_a_tile_that_would_spill_has_more_warps() -> None:
    """64 queries and 128 rows: 4 warps if products read from shared memory, without dropout."""

    def warps(chip: Chip, has_dropout: bool) -> int:
        kind = BFLOAT16._replace(has_dropout=has_dropout)
        plan = launch.backward(chip, "dot", (64, 64, 1024, 1024, 1024), kind)
        assert (plan.tiles["BLOCK_T"], plan.tiles["BLOCK_S"]) == (64, 128)
        return plan.num_warps

    assert warps(H200, has_dropout=False) == 4
    assert warps(H200, has_dropout=True) == 8
    assert warps(A100, has_dropout=False) == 8
    assert warps(Chip(128, 101376), has_dropout=False) == 8
