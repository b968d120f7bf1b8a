"""Tile primitives that the kernels share: which positions count, loads, products, softmax.

A tile of memory is (BLOCK_S, width), a tile of queries (BLOCK_T, width), a tile of scores
(BLOCK_T, BLOCK_S).
``MASK`` says what the mask is: 0 none, 1 the same for all queries, 2 one for each query.

A dot product of bfloat16 is silently wrong in Triton's interpreter: ``WIDEN`` casts operands to
float32 for it, after they were rounded as the compiled kernel rounds them.
"""

from functools import partial

import triton
import triton.language as tl

# Every number that a kernel takes at run time. Triton would compile a kernel anew for those that
# are 1 and those that 16 divides, so for each batch of another length. What the addresses need is
# in the constants: widths and strides come in units.
NUMBERS = (
    *("query_b", "query_t", "memory_b", "memory_s", "proj_b", "proj_s", "exp_b", "exp_s"),
    *("seed_b", "seed_t", "extra_b", "extra_t", "extra_s", "mask_b", "mask_t", "mask_s"),
    *("lengths_stride", "T", "S", "E", "A", "P", "exp_width", "exp_queries", "exp_source"),
    *("scale", "keep_scale", "half_width", "rate", "width", "splits", "segment"),
    *("blocks", "sources", "merges", "merged", "v_rows", "v_width", "score_t"),
)
entry = partial(triton.jit, do_not_specialize=NUMBERS)  # what is launched, not called

LOG2E = tl.constexpr(1.4426950408889634)
PITCH = tl.constexpr(16)  # rows of workspaces (B, T, S) are padded to multiples of so many elements
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def elements(stride, UNIT: tl.constexpr):
    """A stride in elements. Widened first: a batch of long sequences has more than 2^31 of them."""
    return tl.cast(stride, tl.int64) * UNIT


@triton.jit
def padded(count):
    """The end of such a row: so many elements that loads of 16 bytes need no other mask."""
    return tl.cdiv(count, PITCH) * PITCH


@triton.jit
def row_count(lengths, lengths_stride, b, S):
    """How many positions of batch row ``b`` lie within its length. Any integer type; clamped."""
    count = S
    if lengths is not None:
        length = tl.load(lengths + b.to(tl.int64) * lengths_stride).to(tl.int32)
        count = tl.minimum(tl.maximum(length, 0), S)
    return count


@triton.jit
def readable_rows(mask, mask_b, mask_s, b, offs_s, count, MASK: tl.constexpr):
    """Bool (BLOCK_S,): the memory rows that may be read. Nothing else ever is."""
    rows = offs_s < count
    if MASK == 1:
        at = mask + b.to(tl.int64) * mask_b + offs_s.to(tl.int64) * mask_s
        rows = rows & (tl.load(at, mask=rows, other=0) != 0)
    return rows


@triton.jit
def counted_positions(mask, mask_b, mask_t, mask_s, b, offs_t, offs_s, rows, T, MASK: tl.constexpr):
    """Bool (BLOCK_T or 1, BLOCK_S): the positions that each query may look at."""
    counts = rows[None, :]
    if MASK == 2:
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
    """The tile with 0 for what is not finite, and which rows held such a thing.

    Needed where a mask differs between queries: 0 x NaN must not reach those that look elsewhere.
    """
    wide = tile.to(tl.float32)
    finite = tl.abs(wide) < float("inf")  # False for NaN
    bad = tl.max(tl.where(finite, 0, 1), axis=1)
    return tl.where(finite, wide, 0.0).to(tile.dtype), bad != 0


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """acc + a @ b in float32, on the matrix units where the dtype has them."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def in_squares(tile):
    """The same tile, of which each thread then holds squares of 4 x 4.

    Such is the layout of a float32 product, and what is computed with it takes it over: an outer
    product then needs 2 loads of 16 bytes for 16 elements. The zeros cost next to nothing.
    """
    left = tl.zeros((tile.shape[0], 16), tl.float32)
    right = tl.zeros((16, tile.shape[1]), tl.float32)
    return tl.dot(left, right, tile, input_precision="ieee")


@triton.jit
def hide(scores, counts, bad, MASK: tl.constexpr):
    """Scores with NaN where a query looks at a row that is not finite, -inf where none counts."""
    if MASK == 2:
        scores = tl.where(bad[None, :], float("nan"), scores)
    return tl.where(counts, scores, float("-inf"))


@triton.jit
def exp(x):
    """For differences of scores, which are scaled as such: the hardware has exp2 only.

    Scores in units of log2 would be rounded once more: an error of the exponent if they are large.
    """
    return tl.exp2(x * LOG2E)


@triton.jit
def peak_or_zero(peak):
    """A row's largest score, 0 for a row of nothing: exp(-inf - 0) is 0, and not NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def inverse_or_zero(total):
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit
def log_sum(peak, total):
    """Logarithm of the sum of exp(scores), from their peak on; -inf for a row of nothing."""
    empty = total == 0.0
    return tl.where(empty, float("-inf"), peak + tl.log2(tl.where(empty, 1.0, total)) * LN2)


@triton.jit
def store_softmax(stats, at, peak, total, rows):
    """What a split knows of its softmax: the largest score, and the sum of exp(score - that).

    They stay apart, since their log-sum-exp would be rounded to a unit of the score: at scores of
    1e6 that is an error of some percent in the share of a split. ``stats`` (..., 2), float32.
    """
    tl.store(stats + 2 * at, peak, mask=rows)
    tl.store(stats + 2 * at + 1, total, mask=rows)


@triton.jit
def bell(offs_s, center, rate):
    """exp(-((s - center) rate)^2 / 2): what a Gaussian window multiplies the weights with."""
    distance = (offs_s.to(tl.float32) - center) * rate
    return tl.exp2(distance * distance * (-0.5 * LOG2E))


@triton.jit
def window_bounds(center, half_width, S):
    """First position of a window and the one after its last, as `reference.window_bounds`.

    The same additions in float32: a rounding of its own would move the edges. A center that is NaN
    gives the whole row.
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
    """(BLOCK_T, BLOCK_S): what dropout multiplies the weights with; keep is (B, T, S)."""
    at = keep + (b.to(tl.int64) * T + offs_t.to(tl.int64)[:, None]) * S + offs_s[None, :]
    inside = (offs_t < T)[:, None] & (offs_s < S)[None, :]
    return tl.where(tl.load(at, mask=inside, other=0) != 0, keep_scale, 0.0)


@triton.jit
def pair_tile(start, b, offs_t, offs_s, T, S):
    """Pointers (BLOCK_T, BLOCK_S) into a contiguous (B, T, S)."""
    return start + (b.to(tl.int64) * T + offs_t.to(tl.int64)[:, None]) * S + offs_s[None, :]
