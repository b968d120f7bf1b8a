"""Forward kernels of the dot score for several queries, and the merge of splits.

`rows_forward` takes short memories, `online_forward` long ones; step.py has the kernel for single
queries, columns.py the one for long memories with many queries. Where S is split, a program leaves
a normalised context, its largest score and the sum of the exponentials, and `merge_forward`
combines them in the order of the splits, so that results repeat bit for bit.
"""

import triton
import triton.language as tl

from .tiles import (
    MASK_PER_QUERY,
    WINDOW_GAUSSIAN,
    bell,
    counted_positions,
    elements,
    entry,
    exp,
    finite_max,
    hide,
    inverse_or_zero,
    kept_factor,
    load_tile,
    log_sum_exp,
    pair_tile,
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

    The first sweep computes the scores, the second the weighted sum, one chunk of columns at a
    time. No accumulator is as wide as the memory, so any width will do. The second sweep reads the
    same few kilobytes again, from the cache.

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
    spoiled = offs_s < 0
    scores = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for e in range(0, E, BLOCK_E):
        tile = load_tile(memory, memory_s, offs_s, rows, e + offs_e, E)
        if MASK == MASK_PER_QUERY:
            tile, tile_spoiled = split_nonfinite(tile)
            spoiled = spoiled | tile_spoiled
        query_tile = load_tile(query, query_t, offs_t, queries, e + offs_e, E)
        scores = product(query_tile, tl.trans(tile), scores, PRECISION, WIDEN)
    scores = hide(scores * scale, counts, spoiled, MASK)
    row_max = finite_max(tl.max(scores, axis=1))
    exps = exp(scores - row_max[:, None])
    row_sum = tl.sum(exps, axis=1)
    normal = exps * inverse_or_zero(row_sum)[:, None]
    inside = queries[:, None] & (offs_s < S)[None, :]
    context += b.to(tl.int64) * T * E
    if logsumexp is not None:
        log = log_sum_exp(row_max, row_sum)
        tl.store(logsumexp + b.to(tl.int64) * T + offs_t, log, mask=queries)
    if weights is not None:
        at = pair_tile(weights, b, offs_t, offs_s, T, S)
        tl.store(at, normal.to(weights.dtype.element_ty), mask=inside)

    if keep is not None:
        normal *= kept_factor(keep, keep_scale, b, offs_t, offs_s, T, S)
    normal = normal.to(memory.dtype.element_ty)
    for e in range(0, E, BLOCK_E):
        tile = load_tile(memory, memory_s, offs_s, rows, e + offs_e, E)
        if MASK == MASK_PER_QUERY:
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
    """Long rows: an online softmax over tiles of memory, each loaded once.

    BLOCK_E covers all columns: the tile in shared memory is an operand of both products. A program
    walks ``segment`` rows of memory. Without SPLIT context and logsumexp are as in `rows_forward`.
    With SPLIT they are float32 with one entry per split: context (B, splits, T, E) and, in place
    of logsumexp, split_max and split_sum (B, splits, T, 2). ``weights`` is None: `merge_forward`
    computes them from scores_out (B, T, S), since the sum is known only at the end.
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
    query_tile = load_tile(query + b.to(tl.int64) * query_b, query_t, offs_t, queries, offs_e, E)
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    running_max = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(begin, end, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        rows = readable_rows(mask, mask_b, mask_s, b, offs_s, end, MASK)
        counts = counted_positions(mask, mask_b, mask_t, mask_s, b, offs_t, offs_s, rows, T, MASK)
        tile = load_tile(memory, memory_s, offs_s, rows, offs_e, E)
        spoiled = offs_s < 0
        if MASK == MASK_PER_QUERY:
            tile, spoiled = split_nonfinite(tile)
        zero = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
        scores = product(query_tile, tl.trans(tile), zero, PRECISION, WIDEN) * scale
        scores = hide(scores, counts, spoiled, MASK)
        if scores_out is not None:
            inside = queries[:, None] & (offs_s < end)[None, :]
            tl.store(pair_tile(scores_out, b, offs_t, offs_s, T, S), scores, mask=inside)
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        base = finite_max(new_max)
        exps = exp(scores - base[:, None])
        rescale = exp(running_max - base)
        running_sum = running_sum * rescale + tl.sum(exps, axis=1)
        running_max = new_max
        if keep is not None:
            exps *= kept_factor(keep, keep_scale, b, offs_t, offs_s, T, S)
        exps = exps.to(memory.dtype.element_ty)
        acc = product(exps, tile, acc * rescale[:, None], PRECISION, WIDEN)
    acc *= inverse_or_zero(running_sum)[:, None]
    slot = b.to(tl.int64) * splits + split
    if SPLIT:
        store_softmax(logsumexp, slot * T + offs_t, finite_max(running_max), running_sum, queries)
    elif logsumexp is not None:
        log = log_sum_exp(finite_max(running_max), running_sum)
        tl.store(logsumexp + slot * T + offs_t, log, mask=queries)
    store_rows(acc, context + slot * T * E, offs_t, T, offs_e, E)


@entry
def merge_forward(
    partial, stats, scores, lengths, centers, context, weights, logsumexp,
    lengths_stride, T, S, E, half_width, rate, splits, segment,
    WINDOW: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one query in order, and turn its scores into weights.

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
    live = tl.cdiv(count, segment)  # splits with at least one row
    index = tl.arange(0, BLOCK_SPLITS)
    first = b.to(tl.int64) * splits
    at_stats = stats + 2 * ((first + index) * T + t)
    split_sum = tl.load(at_stats + 1, mask=index < live, other=0.0)
    split_max = tl.load(at_stats, mask=index < live, other=float("-inf"))
    split_max = tl.where(split_sum == 0.0, float("-inf"), split_max)
    row_max = finite_max(tl.max(split_max, axis=0))
    row_sum = tl.sum(split_sum * exp(split_max - row_max), axis=0)
    inverse = inverse_or_zero(row_sum)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, live):
        at_split = stats + 2 * ((first + split) * T + t)
        part_sum = tl.load(at_split + 1)
        at = partial + ((first + split) * T + t) * E + offs
        part = tl.load(at, mask=offs < E, other=0.0)
        share = part_sum * exp(tl.load(at_split) - row_max) * inverse
        acc += tl.where((part_sum == 0.0) | (share == 0.0), 0.0, share * part)
    place = row.to(tl.int64)
    tl.store(context + place * E + offs, acc.to(context.dtype.element_ty), mask=offs < E)
    if logsumexp is not None:
        tl.store(logsumexp + place, log_sum_exp(row_max, row_sum), mask=chunk == 0)
    if weights is not None:
        seen = offs < count
        if WINDOW:
            center = tl.load(centers + place)
            begin, end = window_bounds(center, half_width, S)
            seen = seen & (offs >= begin) & (offs < end)
        score = tl.load(scores + place * S + offs, mask=seen, other=float("-inf"))
        weight = exp(score - row_max) * inverse
        if WINDOW == WINDOW_GAUSSIAN:
            weight = tl.where(seen, weight * bell(offs, center, rate), 0.0)
        tl.store(weights + place * S + offs, weight.to(weights.dtype.element_ty), mask=offs < S)
