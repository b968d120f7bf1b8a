"""Forward kernels of the dot score: one query, short rows, long rows; and the merge of splits.

Every program reads its part of the memory once for the score and the weighted sum. Where S is
split, a program leaves a normalised context, its largest score and the sum of the exponentials, and
`merge_forward` combines them in the order of the splits, so that results repeat bit for bit.
"""

import triton
import triton.language as tl

from .tiles import (
    bell,
    counted_positions,
    elements,
    entry,
    exp,
    hide,
    inverse_or_zero,
    kept_factor,
    load_tile,
    log_sum,
    pair_tile,
    peak_or_zero,
    product,
    readable_rows,
    row_count,
    split_nonfinite,
    store_softmax,
    window_bounds,
)


@triton.jit
def store_rows(tile, start, offs_row, rows, offs_col, width):
    at = start + offs_row.to(tl.int64)[:, None] * width + offs_col[None, :]
    inside = (offs_row < rows)[:, None] & (offs_col < width)[None, :]
    tl.store(at, tile.to(start.dtype.element_ty), mask=inside)


@entry
def rows_forward(
    query, memory, lengths, mask, keep, context, weights, logsumexp,
    query_b, query_t, memory_b, memory_s, lengths_stride, mask_b, mask_t, mask_s,
    T, S, E, scale, keep_scale,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Rows of scores that fit on chip: two sweeps over the columns of all S <= BLOCK_S memory rows.

    The first sweep makes the scores, the second the weighted sum, chunk of columns by chunk: no
    accumulator is as wide as the memory, so any width will do. The second reads the same few
    kilobytes again, from the cache.

    query (B, T, E), memory (B, S, E); context (B, T, E), weights (B, T, S) or None, logsumexp
    (B, T) or None. Strides and widths come in units of UNIT elements.
    """
    query_b, query_t = elements(query_b, UNIT), elements(query_t, UNIT)
    memory_b, memory_s = elements(memory_b, UNIT), elements(memory_s, UNIT)
    E = E * UNIT
    program = tl.program_id(0)
    t_blocks = tl.cdiv(T, BLOCK_T)
    t_block = program % t_blocks
    b = program // t_blocks
    offs_t = t_block * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_s = tl.arange(0, BLOCK_S)
    offs_e = tl.arange(0, BLOCK_E)
    queries = offs_t < T
    count = row_count(lengths, lengths_stride, b, S)
    rows = readable_rows(mask, mask_b, mask_s, b, offs_s, count, MASK)
    counts = counted_positions(mask, mask_b, mask_t, mask_s, b, offs_t, offs_s, rows, T, MASK)
    memory += b.to(tl.int64) * memory_b
    query += b.to(tl.int64) * query_b
    bad = offs_s < 0
    scores = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for e in range(0, E, BLOCK_E):
        tile = load_tile(memory, memory_s, offs_s, rows, e + offs_e, E)
        if MASK == 2:
            tile, spoiled = split_nonfinite(tile)
            bad = bad | spoiled
        heads = load_tile(query, query_t, offs_t, queries, e + offs_e, E)
        scores = product(heads, tl.trans(tile), scores, PRECISION, WIDEN)
    scores = hide(scores * scale, counts, bad, MASK)
    peak = peak_or_zero(tl.max(scores, axis=1))
    exps = exp(scores - peak[:, None])
    total = tl.sum(exps, axis=1)
    normal = exps * inverse_or_zero(total)[:, None]
    inside = queries[:, None] & (offs_s < S)[None, :]
    context += b.to(tl.int64) * T * E
    if logsumexp is not None:
        log = log_sum(peak, total)
        tl.store(logsumexp + b.to(tl.int64) * T + offs_t, log, mask=queries)
    if weights is not None:
        at = pair_tile(weights, b, offs_t, offs_s, T, S)
        tl.store(at, normal.to(weights.dtype.element_ty), mask=inside)

    if keep is not None:
        normal *= kept_factor(keep, keep_scale, b, offs_t, offs_s, T, S)
    normal = normal.to(memory.dtype.element_ty)
    for e in range(0, E, BLOCK_E):
        tile = load_tile(memory, memory_s, offs_s, rows, e + offs_e, E)
        if MASK == 2:
            tile, _ = split_nonfinite(tile)
        zero = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        store_rows(product(normal, tile, zero, PRECISION, WIDEN), context, offs_t, T, e + offs_e, E)


@entry
def online_forward(
    query, memory, lengths, mask, keep,
    context, weights, logsumexp, scores_out,
    query_b, query_t, memory_b, memory_s, lengths_stride, mask_b, mask_t, mask_s,
    T, S, E, scale, keep_scale, splits, segment,
    MASK: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Long rows: a softmax that is corrected as tiles of memory come by, each loaded once.

    BLOCK_E covers all columns: the tile in shared memory is an operand of both products. A program
    walks ``segment`` rows of memory. Without SPLIT context, logsumexp as in `rows_forward`. With
    SPLIT they hold splits: context (B, splits, T, E) and, in the place of logsumexp, peak and total
    (B, splits, T, 2), in float32. ``weights`` is None: `merge_forward` makes them from scores_out
    (B, T, S), since their sum is known last.
    """
    query_b, query_t = elements(query_b, UNIT), elements(query_t, UNIT)
    memory_b, memory_s = elements(memory_b, UNIT), elements(memory_s, UNIT)
    E = E * UNIT
    program = tl.program_id(0)
    t_blocks = tl.cdiv(T, BLOCK_T)
    t_block = program % t_blocks  # innermost: programs that share memory run at the same time
    split = (program // t_blocks) % splits
    b = program // (splits * t_blocks)
    offs_t = t_block * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    queries = offs_t < T
    count = row_count(lengths, lengths_stride, b, S)
    begin = split * segment
    end = tl.minimum(begin + segment, count)
    if SPLIT:
        if begin >= count:
            return
    memory += b.to(tl.int64) * memory_b
    heads = load_tile(query + b.to(tl.int64) * query_b, query_t, offs_t, queries, offs_e, E)
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    peak = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(begin, end, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        rows = readable_rows(mask, mask_b, mask_s, b, offs_s, end, MASK)
        counts = counted_positions(mask, mask_b, mask_t, mask_s, b, offs_t, offs_s, rows, T, MASK)
        tile = load_tile(memory, memory_s, offs_s, rows, offs_e, E)
        bad = offs_s < 0
        if MASK == 2:
            tile, bad = split_nonfinite(tile)
        zero = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
        scores = product(heads, tl.trans(tile), zero, PRECISION, WIDEN) * scale
        scores = hide(scores, counts, bad, MASK)
        if scores_out is not None:
            inside = queries[:, None] & (offs_s < end)[None, :]
            tl.store(pair_tile(scores_out, b, offs_t, offs_s, T, S), scores, mask=inside)
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        shift = peak_or_zero(higher)
        exps = exp(scores - shift[:, None])
        fade = exp(peak - shift)
        total = total * fade + tl.sum(exps, axis=1)
        peak = higher
        if keep is not None:
            exps *= kept_factor(keep, keep_scale, b, offs_t, offs_s, T, S)
        exps = exps.to(memory.dtype.element_ty)
        acc = product(exps, tile, acc * fade[:, None], PRECISION, WIDEN)
    acc *= inverse_or_zero(total)[:, None]
    slot = b.to(tl.int64) * splits + split
    if SPLIT:
        store_softmax(logsumexp, slot * T + offs_t, peak_or_zero(peak), total, queries)
    elif logsumexp is not None:
        log = log_sum(peak_or_zero(peak), total)
        tl.store(logsumexp + slot * T + offs_t, log, mask=queries)
    store_rows(acc, context + slot * T * E, offs_t, T, offs_e, E)


@entry
def merge_forward(
    partial, stats, scores, lengths, centers, context, weights, logsumexp,
    lengths_stride, T, S, E, half_width, rate, splits, segment,
    WINDOW: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one query in their order, and turn its scores into weights.

    partial (B, splits, T, E), stats (B, splits, T, 2) as `store_softmax` leaves them, scores
    (B, T, S) or None. WINDOW and centers as in `step_forward`.
    """
    E = E * UNIT
    chunks = tl.cdiv(E if weights is None else max(E, S), BLOCK)
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    b = row // T
    t = row % T
    count = row_count(lengths, lengths_stride, b, S)
    live = tl.cdiv(count, segment)  # the splits that had something to do
    index = tl.arange(0, BLOCK_SPLITS)
    first = b.to(tl.int64) * splits
    at_stats = stats + 2 * ((first + index) * T + t)
    totals = tl.load(at_stats + 1, mask=index < live, other=0.0)
    peaks = tl.load(at_stats, mask=index < live, other=float("-inf"))
    peaks = tl.where(totals == 0.0, float("-inf"), peaks)
    peak = peak_or_zero(tl.max(peaks, axis=0))
    total = tl.sum(totals * exp(peaks - peak), axis=0)
    inverse = inverse_or_zero(total)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, live):
        at_split = stats + 2 * ((first + split) * T + t)
        part_total = tl.load(at_split + 1)
        at = partial + ((first + split) * T + t) * E + offs
        part = tl.load(at, mask=offs < E, other=0.0)
        share = part_total * exp(tl.load(at_split) - peak) * inverse
        acc += tl.where((part_total == 0.0) | (share == 0.0), 0.0, share * part)
    place = row.to(tl.int64)
    tl.store(context + place * E + offs, acc.to(context.dtype.element_ty), mask=offs < E)
    if logsumexp is not None:
        tl.store(logsumexp + place, log_sum(peak, total), mask=chunk == 0)
    if weights is not None:
        seen = offs < count
        if WINDOW:
            center = tl.load(centers + place)
            begin, end = window_bounds(center, half_width, S)
            seen = seen & (offs >= begin) & (offs < end)
        score = tl.load(scores + place * S + offs, mask=seen, other=float("-inf"))
        weight = exp(score - peak) * inverse
        if WINDOW == 2:
            weight = tl.where(seen, weight * bell(offs, center, rate), 0.0)
        tl.store(weights + place * S + offs, weight.to(weights.dtype.element_ty), mask=offs < S)
