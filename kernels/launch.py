"""The launch table: which kernel, which tiles, how many splits, as pure functions of the problem.

Nothing is tuned at run time: the first call of a shape is as fast as the next, and a CUDA graph can
capture it. Lengths are data and do not matter here.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

STEP_WIDTH = 2048  # columns that one tile of a step may hold in registers
# Bytes of shared memory that only chips with wgmma have, whose products read it directly.
WGMMA_MEMORY = 200_000
SHORT = 128  # rows of memory whose scores one program keeps on chip


class Chip(NamedTuple):
    """What the table needs to know about a GPU."""

    multiprocessors: int
    shared_memory: int  # bytes that one program may use
    is_nvidia: bool = True


class Kind(NamedTuple):
    """What the choice of tiles depends on besides the sizes."""

    is_float32: bool  # products without matrix units
    is_aligned: bool  # loads of 16 bytes
    mask_per_query: bool
    has_dropout: bool = False  # on the weights


@dataclass(frozen=True)
class Plan:
    """One row of the table."""

    # How the memory is read: "step", "rows", "columns" or "online". Gradients that are computed
    # without reading it: "source" (of the memory) and "concat" (of the projections).
    regime: str
    splits: int  # the number of segments that S is cut into
    segment: int  # rows of a segment
    tiles: dict[str, int] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 2

    @cached_property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        return {**self.tiles, "num_warps": self.num_warps, "num_stages": self.num_stages}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(size: int, least: int = 1) -> int:
    return max(least, 1 << max(size - 1, 0).bit_length())


def _segments(source: int, block: int, wanted: int) -> tuple[int, int]:
    """Cut ``source`` rows into at most ``wanted`` segments of whole blocks: (splits, segment)."""
    segment = block * max(1, cdiv(cdiv(source, block), max(wanted, 1)))
    return max(1, cdiv(source, segment)), segment


def _block(size: int, *blocks: int) -> int:
    """The smallest block that holds ``size``, or the largest one.

    The choice is small because every block is another kernel to compile when lengths vary.
    """
    return next((block for block in blocks if size <= block), blocks[-1])


def _fill(chip: Chip, programs: int, per_multiprocessor: int) -> int:
    """How often to split ``programs`` so that each multiprocessor gets ``per_multiprocessor``."""
    return max(1, chip.multiprocessors * per_multiprocessor // max(programs, 1))


def _spread(
    chip: Chip, batch: int, tiles: dict[str, int], sizes: dict[str, int], order: tuple[str, ...]
) -> None:
    """Halve blocks, in this order and down to 16, while a tenth of the chip would be idle."""

    def programs() -> int:
        count = batch
        for name, size in sizes.items():
            count *= cdiv(max(size, 1), tiles[name])
        return count

    for name in order:
        while tiles[name] > 16 and 10 * programs() < 9 * chip.multiprocessors:
            tiles[name] //= 2


def step(
    chip: Chip,
    batch: int,
    queries: int,
    source: int,
    memory_dim: int,
    score_dim: int,
    backward: bool = False,
) -> Plan:
    """One query per program, tiles of memory in registers: 32 to 64 elements per thread.

    The forward of dot (score_dim 1) has half as many warps, with loads several stages ahead.
    """
    width = max(power_of_2(memory_dim, 16), power_of_2(score_dim, 16))
    block_s = max(4, min(64, 4096 // width))
    warps = 8 if block_s * width > 4096 else 4
    each, stages = 8 * 4 // warps, 1
    if score_dim == 1 and not backward:
        warps, each, stages = warps // 2, each // 2, 3
    # Segments of at least 4 tiles: a split costs reading the query and a partial context.
    most = cdiv(source, 4 * block_s)
    # A short memory takes less time than the launch of a merge.
    wanted = min(most, _fill(chip, batch * queries, each)) if source > SHORT else 1
    splits, segment = _segments(source, block_s, wanted)
    tiles = {"BLOCK_S": block_s, "BLOCK_E": power_of_2(memory_dim, 16), "STAGES": stages}
    return Plan("step", splits, segment, tiles, warps)


@lru_cache(maxsize=1024)
def window(source: int, memory_dim: int, score_dim: int, backward: bool = False) -> Plan:
    """Local attention: one query per program, whose window is its only segment."""
    width = max(power_of_2(memory_dim, 16), power_of_2(score_dim, 16))
    tiles = {"BLOCK_S": max(2, min(32, 4096 // width)), "BLOCK_E": power_of_2(memory_dim, 16)}
    if not backward:
        tiles["STAGES"] = 1
    return Plan("step", 1, max(source, 1), tiles, 8 if width > 2048 else 4, num_stages=2)


@lru_cache(maxsize=1024)
def window_source(width: int) -> Plan:
    """Gradients of the memory or its projection with windows: 32 elements per thread."""
    tiles = {"BLOCK_S": 32, "BLOCK_E": min(128, power_of_2(width, 16))}
    return Plan("source", 1, 32, tiles, 4, 2)


# By columns of the tile: (queries, rows of memory, warps). The forward holds a query tile, a
# context of the same shape in registers, and `stages` tiles of memory; the backward also holds a
# tile of grad_context.
_ONLINE_FORWARD = {
    128: (64, 64, 4),
    256: (64, 64, 4),
    512: (64, 32, 8),
    1024: (16, 32, 8),
    2048: (16, 16, 8),
}
_ONLINE_BACKWARD = {128: (64, 64, 8), 256: (32, 64, 8), 512: (16, 64, 8), 1024: (16, 32, 8)}
# For wider memories with more queries than one block two plain products are faster.
_WIDEST_FORWARD_BLOCKS, _WIDEST_BACKWARD_BLOCKS = 512, 256


def online(
    chip: Chip, batch: int, queries: int, source: int, memory_dim: int, kind: Kind, backward: bool
) -> Plan | None:
    """Tiles of all columns in shared memory, 16-bit types; None if the chip has too little."""
    width = power_of_2(memory_dim, 16)
    table = _ONLINE_BACKWARD if backward else _ONLINE_FORWARD
    # With a per-query mask, rows are searched for infinities and NaN in registers.
    widest = 256 if kind.mask_per_query else max(table)
    if queries > 16:
        widest = min(widest, _WIDEST_BACKWARD_BLOCKS if backward else _WIDEST_FORWARD_BLOCKS)
    if width > widest or not kind.is_aligned:
        return None
    most_t, block_s, warps = table[max(width, 128)]
    if kind.mask_per_query:
        most_t = max(most_t // 2, 16)
    block_t = min(most_t, power_of_2(queries, 16))
    held = block_t * (2 if backward else 1)
    free = chip.shared_memory - 16384
    stages = 3
    while stages > 2 and 2 * width * (held + stages * block_s) > free:
        stages -= 1
    if 2 * width * (held + stages * block_s) > free:
        return None
    programs = batch * cdiv(queries, block_t)
    # The partial result of a split has 4 bytes an element, the memory 2: with more than S / (8 T)
    # splits it would be half of the traffic.
    wanted = min(_fill(chip, programs, 1), max(1, source // (8 * max(queries, 16))))
    splits, segment = _segments(source, block_s, wanted)
    halved = cdiv(width, 32) * cdiv(queries, 16)  # the "columns" regime's blocks, at their smallest
    if 10 * programs * splits < 9 * chip.multiprocessors and batch * halved > programs * splits:
        return None
    tiles = {"BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_E": width}
    return Plan("online", splits, segment, tiles, warps, stages)


@lru_cache(maxsize=1024)
def rows(
    chip: Chip,
    sizes: tuple[int, int, int, int],
    kind: Kind,
    is_concat: bool,
    backward: bool,
) -> Plan:
    """Scores of up to SHORT rows on chip, columns in chunks; blocks of rows if S is longer.

    ``sizes`` are (B, T, S, E).
    """
    batch, queries, source, memory_dim = sizes
    is_crowded = is_concat or kind.mask_per_query or (kind.is_float32 and backward)
    is_cut = is_concat or (is_crowded and source > SHORT)
    block_s = 64 if is_cut else _block(source, 64, SHORT)
    is_small = is_concat or kind.is_float32 or kind.mask_per_query or not kind.is_aligned
    most_t = 16 if is_crowded and block_s == SHORT else 32 if is_small else 64
    block_t = _block(queries, 16, most_t)
    block_e = min(32 if kind.is_float32 else 64, power_of_2(memory_dim, 16))
    # The scores of concat are recomputed: larger tiles of them, and narrower ones of the memory.
    is_plain = (
        chip.is_nvidia and kind.is_aligned and not kind.is_float32 and not kind.mask_per_query
    )
    if is_concat and backward and is_plain and source > block_s and queries > 32:
        block_t, block_e = 64, min(32, block_e)
    if is_concat and backward and source <= block_s:
        block_t = 32
    tiles = {"BLOCK_T": block_t, "BLOCK_S": block_s, "BLOCK_E": block_e}
    # Not for a short memory: its tiles would vary from batch to batch, each a kernel to compile.
    if source > SHORT:
        _spread(chip, batch, tiles, {"BLOCK_T": queries, "BLOCK_S": source}, ("BLOCK_S", "BLOCK_T"))
    elif (
        source <= block_s
        and not is_concat
        and 10 * batch * cdiv(queries, block_t) < 9 * chip.multiprocessors
    ):
        tiles["BLOCK_T"] = 16
    block_t, block_s = tiles["BLOCK_T"], tiles["BLOCK_S"]
    # Unaligned loads need an address for each element: with more threads each has fewer.
    is_large = kind.is_float32 or (source <= block_s and not is_concat)
    # Dropout needs more threads too, and so do products whose operands come through registers.
    is_large |= kind.has_dropout or (chip.is_nvidia and chip.shared_memory < WGMMA_MEMORY)
    warps = 8 if not kind.is_aligned or (backward and is_large and block_t * block_s > 2048) else 4
    stages = 2 if kind.is_float32 else 3
    splits = cdiv(max(source, 1), block_s)
    regime = "columns" if is_concat or splits > 1 else "rows"
    return Plan(regime, splits, block_s, tiles, warps, stages)


@lru_cache(maxsize=1024)
def context_columns(
    chip: Chip, sizes: tuple[int, int, int, int], kind: Kind, backward: bool = False
) -> Plan:
    """The second product of the "columns" regime; in the backward the query's gradient."""
    batch, queries, source, memory_dim = sizes
    is_small = kind.is_float32 or kind.mask_per_query or not kind.is_aligned
    most_s, most_e, warps = (64, 128, 4) if backward else (32, 256, 8)
    if is_small:
        most_s, most_e, warps = 32, 64, 4
    tiles = {
        "BLOCK_T": min(32 if is_small else 64, power_of_2(queries, 16)),
        "BLOCK_S": most_s,
        "BLOCK_E": min(most_e, power_of_2(memory_dim, 16)),
    }
    if source > SHORT:
        blocked = {"BLOCK_T": queries, "BLOCK_E": memory_dim}
        _spread(chip, batch, tiles, blocked, ("BLOCK_E", "BLOCK_T"))
    elif not is_small:
        tiles |= {"BLOCK_T": 32, "BLOCK_E": min(128, tiles["BLOCK_E"])}
    if tiles["BLOCK_T"] * tiles["BLOCK_E"] <= 4096:
        warps = 4
    return Plan("columns", 1, tiles["BLOCK_S"], tiles, warps, 2 if kind.is_float32 else 3)


@lru_cache(maxsize=4096)
def forward(
    chip: Chip,
    score: str,
    sizes: tuple[int, int, int, int, int],
    kind: Kind,
) -> Plan:
    """The forward plan of (B, T, S, E, K)."""
    batch, queries, source, memory_dim, score_dim = sizes
    fits = max(memory_dim, score_dim) <= STEP_WIDTH
    if score == "concat":
        if queries <= 8 and fits:
            return step(chip, batch, queries, source, memory_dim, score_dim)
        return rows(chip, sizes[:4], kind, is_concat=True, backward=False)
    # No matrix unit computes exact float32 products: a few queries are processed one by one.
    if fits and queries <= (4 if kind.is_float32 else 1):
        return step(chip, batch, queries, source, memory_dim, 1)
    plan = None
    if not kind.is_float32 and source > SHORT:
        plan = online(chip, batch, queries, source, memory_dim, kind, backward=False)
    return plan or rows(chip, sizes[:4], kind, is_concat=False, backward=False)


@lru_cache(maxsize=4096)
def backward(chip: Chip, score: str, sizes: tuple[int, int, int, int, int], kind: Kind) -> Plan:
    """The plan of the kernel that reads the memory; `source_gradients` plans its gradient."""
    batch, queries, source, memory_dim, _ = sizes
    if score == "concat":
        return rows(chip, sizes[:4], kind, is_concat=True, backward=True)
    if queries == 1 and memory_dim <= STEP_WIDTH:
        return step(chip, batch, queries, source, memory_dim, 1, backward=True)
    plan = None
    if not kind.is_float32 and source > SHORT:
        plan = online(chip, batch, queries, source, memory_dim, kind, backward=True)
    return plan or rows(chip, sizes[:4], kind, is_concat=False, backward=True)


@lru_cache(maxsize=1024)
def source_gradients(memory_dim: int, kind: Kind) -> Plan:
    """dMemory: plain products over the queries."""
    block_s = 32 if kind.is_float32 else 64
    block_e = min(64 if kind.is_float32 else 128, power_of_2(memory_dim, 16))
    tiles = {"BLOCK_T": 32, "BLOCK_S": block_s, "BLOCK_E": block_e}
    return Plan("source", 1, block_s, tiles, 4, 2 if kind.is_float32 else 3)


@lru_cache(maxsize=1024)
def concat_gradients(score_dim: int, kind: Kind) -> Plan:
    """Gradients of the projections: sums of 16 elements per thread, never across threads.

    With wider tiles Triton moves a row of the other side through shared memory, with a barrier.
    """
    tiles = {"BLOCK_T": 32, "BLOCK_S": 16, "BLOCK_A": min(64, power_of_2(score_dim, 16))}
    return Plan("concat", 1, tiles["BLOCK_S"], tiles, 4, 1)
