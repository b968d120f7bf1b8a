"""Tile primitives that the kernels share: which positions count, loads, products, softmax.

A tile of memory is (BLOCK_S, width), a query tile (BLOCK_T, width), a tile of scores
(BLOCK_T, BLOCK_S).

All kernels use the same names in a softmax: running_max and running_sum are its state while rows
of memory are read; split_max and split_sum are that state as a split leaves it in scratch memory;
row_max and row_sum belong to rows of scores that are on chip as a whole.

In Triton's interpreter a dot product of bfloat16 operands is silently wrong. ``WIDEN`` casts them
to float32 there, after rounding them as the compiled kernel does.
"""

from functools import partial

import triton
import triton.language as tl

# Every number that a kernel takes at run time. By default Triton compiles a kernel again when a
# number is 1 or a multiple of 16, so batches of different lengths would need different kernels.
# The divisibility that addresses need is in the constants: widths and strides come in units.
NUMBERS = (
    *("query_b", "query_t", "memory_b", "memory_s", "proj_b", "proj_s", "exp_b", "exp_s"),
    *("grad_context_b", "grad_context_t", "grad_weights_b", "grad_weights_t", "grad_weights_s"),
    *("mask_b", "mask_t", "mask_s"),
    *("lengths_stride", "T", "S", "E", "A", "P", "exp_width", "exp_queries", "exp_source"),
    *("scale", "keep_scale", "half_width", "rate", "width", "splits", "segment"),
    *("blocks", "sources", "merges", "merged", "v_rows", "v_width", "score_t"),
)
entry = partial(triton.jit, do_not_specialize=NUMBERS)  # decorates the kernels that are launched

# Values of the constant ``MASK``.
MASK_NONE = tl.constexpr(0)
MASK_SHARED = tl.constexpr(1)  # one row (S,), the same for all queries
MASK_PER_QUERY = tl.constexpr(2)  # each query has its own row
# Values of the constant ``WINDOW``.
WINDOW_NONE = tl.constexpr(0)
WINDOW_HARD = tl.constexpr(1)  # each query has a window around its center, and no other segment
WINDOW_GAUSSIAN = tl.constexpr(2)  # with weights multiplied by a Gaussian of the distance

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PITCH = tl.constexpr(16)  # rows of workspaces (B, T, S) are padded to a multiple of this


@triton.jit
def elements(stride, UNIT: tl.constexpr):
    """A stride in elements, as int64: a batch of long sequences has more than 2^31 elements."""
    return tl.cast(stride, tl.int64) * UNIT


@triton.jit
def padded(count):
    """``count`` rounded up to PITCH, so that loads of 16 bytes need no finer mask."""
    return tl.cdiv(count, PITCH) * PITCH


@triton.jit
def row_count(lengths, lengths_stride, b, S):
    """The length of batch row ``b``, clamped to 0..S; S without lengths. Any integer type."""
    count = S
    if lengths is not None:
        length = tl.load(lengths + b.to(tl.int64) * lengths_stride).to(tl.int32)
        count = tl.minimum(tl.maximum(length, 0), S)
    return count


@triton.jit
def readable_rows(mask, mask_b, mask_s, b, offs_s, count, MASK: tl.constexpr):
    """Bool (BLOCK_S,): the memory rows that may be read. No other row ever is."""
    rows = offs_s < count
    if MASK == MASK_SHARED:
        at = mask + b.to(tl.int64) * mask_b + offs_s.to(tl.int64) * mask_s
        rows = rows & (tl.load(at, mask=rows, other=0) != 0)
    return rows


@triton.jit
def counted_positions(mask, mask_b, mask_t, mask_s, b, offs_t, offs_s, rows, T, MASK: tl.constexpr):
    """Bool (BLOCK_T or 1, BLOCK_S): the positions that each query may attend to."""
    counts = rows[None, :]
    if MASK == MASK_PER_QUERY:
        at = mask + b.to(tl.int64) * mask_b + offs_t.to(tl.int64)[:, None] * mask_t
        at += offs_s.to(tl.int64)[None, :] * mask_s
        inside = counts & (offs_t < T)[:, None]
        counts = inside & (tl.load(at, mask=inside, other=0) != 0)
    return counts


@triton.jit
def load_tile(start, row_stride, offs_row, rows, offs_col, width):
    """The (rows, columns) tile of a matrix whose last dimension has unit stride; 0 elsewhere."""
    at = start + offs_row.to(tl.int64)[:, None] * row_stride + offs_col[None, :]
    return tl.load(at, mask=rows[:, None] & (offs_col < width)[None, :], other=0.0)


@triton.jit
def split_nonfinite(tile):
    """The tile with 0 for infinities and NaN, and a bool for each row that held one.

    Needed with a per-query mask: 0 x NaN must not reach the queries that do not see the row.
    """
    value = tile.to(tl.float32)
    finite = tl.abs(value) < float("inf")  # False for NaN
    spoiled = tl.max(tl.where(finite, 0, 1), axis=1)
    return tl.where(finite, value, 0.0).to(tile.dtype), spoiled != 0


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """acc + a @ b in float32, on the matrix units if they support the dtype."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def in_squares(tile):
    """The same tile in a layout in which each thread holds squares of 4 x 4.

    A float32 product has that layout, and elementwise operations keep it: an outer product then
    needs 2 loads of 16 bytes for 16 elements. Adding the zero product costs next to nothing.
    """
    left = tl.zeros((tile.shape[0], 16), tl.float32)
    right = tl.zeros((16, tile.shape[1]), tl.float32)
    return tl.dot(left, right, tile, input_precision="ieee")


@triton.jit
def hide(scores, counts, spoiled, MASK: tl.constexpr):
    """Scores with -inf at masked positions, and NaN where a query sees a row that is not finite."""
    if MASK == MASK_PER_QUERY:
        scores = tl.where(spoiled[None, :], float("nan"), scores)
    return tl.where(counts, scores, float("-inf"))


@triton.jit
def exp(x):
    """exp of a difference of scores, by exp2, the only exponential the hardware has.

    The difference is scaled, not the scores: scores in units of log2 would be rounded once more,
    which for large scores is an error in the exponent.
    """
    return tl.exp2(x * LOG2E)


@triton.jit
def finite_max(row_max):
    """The maximum, or 0 where no position counts: exp(-inf - 0) is 0, exp(-inf + inf) NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def inverse_or_zero(x):
    return tl.where(x == 0.0, 0.0, 1.0 / tl.where(x == 0.0, 1.0, x))


@triton.jit
def log_sum_exp(row_max, row_sum):
    """log(sum(exp(scores))) from the maximum and the sum relative to it; -inf for an empty row."""
    empty = row_sum == 0.0
    return tl.where(empty, float("-inf"), row_max + tl.log2(tl.where(empty, 1.0, row_sum)) * LN2)


@triton.jit
def store_softmax(stats, at, split_max, split_sum, rows):
    """A split's softmax state: its largest score, and the sum of exp(score - that).

    They are stored apart: a log-sum-exp would be rounded to a unit of the score, which at scores
    of 1e6 is an error of several percent in the share of a split. ``stats`` (..., 2), float32.
    """
    tl.store(stats + 2 * at, split_max, mask=rows)
    tl.store(stats + 2 * at + 1, split_sum, mask=rows)


@triton.jit
def bell(offs_s, center, rate):
    """exp(-((s - center) rate)^2 / 2), the factor of a Gaussian window."""
    distance = (offs_s.to(tl.float32) - center) * rate
    return tl.exp2(distance * distance * (-0.5 * LOG2E))


@triton.jit
def window_bounds(center, half_width, S):
    """The first position of a window and the one after its last, as `reference.window_bounds`.

    The additions are the same, in float32: any other rounding would move the edges. A center that
    is NaN gives the whole row.
    """
    first = tl.ceil(center - half_width)
    last = tl.floor(center + half_width)
    first = tl.where(first == first, first, 0.0)
    end = tl.where(last == last, last + 1.0, float("inf"))
    most = S * 1.0
    begin = tl.minimum(tl.maximum(first, 0.0), most).to(tl.int32)
    end = tl.minimum(tl.maximum(end, 0.0), most).to(tl.int32)
    return tl.minimum(begin, S), tl.minimum(end, S)


@triton.jit
def kept_factor(keep, keep_scale, b, offs_t, offs_s, T, S):
    """Dropout's factor of the weights (BLOCK_T, BLOCK_S); keep is (B, T, S)."""
    at = keep + (b.to(tl.int64) * T + offs_t.to(tl.int64)[:, None]) * S + offs_s[None, :]
    inside = (offs_t < T)[:, None] & (offs_s < S)[None, :]
    return tl.where(tl.load(at, mask=inside, other=0) != 0, keep_scale, 0.0)


@triton.jit
def pair_tile(start, b, offs_t, offs_s, T, S):
    """Pointers (BLOCK_T, BLOCK_S) into a contiguous (B, T, S)."""
    return start + (b.to(tl.int64) * T + offs_t.to(tl.int64)[:, None]) * S + offs_s[None, :]
