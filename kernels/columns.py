"""Many queries on long rows, as two products: scores by rows of memory, the context by columns.

A context of 64 queries and 1024 columns fills the registers of a whole multiprocessor: a program
that holds one besides tiles of all columns has no room for large products. Here no program holds
all columns. `score_rows` writes the scores (B, T, S) and the softmax state of each block;
`context_columns` turns them into weights and computes its columns of the context. The memory is
read twice, each time at the speed of a plain product; the scores, T / E of the memory's size, stay
in the cache. For concat, where every 64 rows would leave a partial context, that is also less
traffic.
"""

import triton
import triton.language as tl

from .concat import concat_scores
from .forward import store_rows
from .tiles import (
    MASK_PER_QUERY,
    PITCH,
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
    padded,
    pair_tile,
    product,
    readable_rows,
    row_count,
    split_nonfinite,
    store_softmax,
)


@entry
def score_rows(
    query, memory, exp_query, exp_memory, query_peak, memory_peak, memory_proj, v,
    lengths, mask, scores, stats,
    query_b, query_t, memory_b, memory_s, proj_b, proj_s, lengths_stride, mask_b, mask_t, mask_s,
    T, S, E, A, exp_width, exp_queries, exp_source, scale, splits, P,
    CONCAT: tl.constexpr, MASK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, FAST_RCP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Scores (B, T, P PITCH) of BLOCK_S rows, -inf at masked positions, and softmax state.

    ``stats`` (B, splits, T, 2) as `store_softmax` leaves them; ``splits`` blocks cover S. Blocks of
    padding alone write nothing. query (B, T, K), memory (B, S, E); for concat also the output of
    `concat_exponentials`, memory_proj (B, S, K) and v (K,).
    """
    query_b, query_t = elements(query_b, UNIT), elements(query_t, UNIT)
    memory_b, memory_s = elements(memory_b, UNIT), elements(memory_s, UNIT)
    proj_b, proj_s = elements(proj_b, UNIT), elements(proj_s, UNIT)
    E, A = E * UNIT, A * UNIT
    program = tl.program_id(0)
    t_blocks = tl.cdiv(T, BLOCK_T)
    t_block = program % t_blocks  # innermost: programs that share memory run at the same time
    split = (program // t_blocks) % splits
    b = program // (splits * t_blocks)
    offs_t = t_block * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_s = split * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_e = tl.arange(0, BLOCK_E)
    queries = offs_t < T
    count = row_count(lengths, lengths_stride, b, S)
    if split * BLOCK_S >= count:
        return
    rows = readable_rows(mask, mask_b, mask_s, b, offs_s, count, MASK)
    counts = counted_positions(mask, mask_b, mask_t, mask_s, b, offs_t, offs_s, rows, T, MASK)
    memory += b.to(tl.int64) * memory_b
    query += b.to(tl.int64) * query_b
    spoiled = offs_s < 0
    if CONCAT:
        memory_proj += b.to(tl.int64) * proj_b
        result, spoiled = concat_scores(
            exp_query, exp_memory, query_peak, memory_peak, query, memory_proj, v,
            b, t_block, split, offs_t, offs_s, queries, rows,
            query_t, proj_s, A, exp_width, exp_queries, exp_source,
            MASK, BLOCK_T, BLOCK_S, FAST_RCP,
        )  # fmt: skip
        if MASK == MASK_PER_QUERY:  # a row that is not finite spoils queries that attend to it
            for e in range(0, E, BLOCK_E):
                _, tile_spoiled = split_nonfinite(
                    load_tile(memory, memory_s, offs_s, rows, e + offs_e, E)
                )
                spoiled = spoiled | tile_spoiled
    else:
        result = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
        for e in range(0, E, BLOCK_E):
            tile = load_tile(memory, memory_s, offs_s, rows, e + offs_e, E)
            if MASK == MASK_PER_QUERY:
                tile, tile_spoiled = split_nonfinite(tile)
                spoiled = spoiled | tile_spoiled
            query_tile = load_tile(query, query_t, offs_t, queries, e + offs_e, E)
            result = product(query_tile, tl.trans(tile), result, PRECISION, WIDEN)
        result *= scale
    result = hide(result, counts, spoiled, MASK)
    split_max = finite_max(tl.max(result, axis=1))
    split_sum = tl.sum(exp(result - split_max[:, None]), axis=1)
    slot = b.to(tl.int64) * splits + split
    store_softmax(stats, slot * T + offs_t, split_max, split_sum, queries)
    inside = queries[:, None] & (offs_s < padded(count))[None, :]
    tl.store(pair_tile(scores, b, offs_t, offs_s, T, P * PITCH), result, mask=inside)


@triton.jit
def merged_softmax(stats, b, offs_t, queries, T, splits, live, BLOCKS: tl.constexpr):
    """Maximum and sum (BLOCK_T,) of each query over the first ``live`` of its splits.

    BLOCKS splits are read at a time: those of a long row would not fit into registers.
    """
    running_max = tl.full(offs_t.shape, float("-inf"), tl.float32)
    running_sum = tl.zeros(offs_t.shape, tl.float32)
    for first in range(0, live, BLOCKS):
        index = first + tl.arange(0, BLOCKS)
        inside = queries[:, None] & (index < live)[None, :]
        at = b.to(tl.int64) * splits + index
        at = stats + 2 * (at[None, :] * T + offs_t[:, None])
        split_sum = tl.load(at + 1, mask=inside, other=0.0)
        split_max = tl.load(at, mask=inside, other=float("-inf"))
        split_max = tl.where(split_sum == 0.0, float("-inf"), split_max)
        new_max = tl.maximum(running_max, tl.max(split_max, axis=1))
        base = finite_max(new_max)
        running_sum = running_sum * exp(running_max - base)
        running_sum += tl.sum(split_sum * exp(split_max - base[:, None]), axis=1)
        running_max = new_max
    return finite_max(running_max), running_sum


@entry
def context_columns(
    scores, stats, memory, lengths, mask, keep, context, weights, logsumexp,
    memory_b, memory_s, lengths_stride, mask_b, mask_s, T, S, E, keep_scale, splits, segment, P,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCKS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """BLOCK_E columns of the context (B, T, E), from the output of `score_rows`.

    The program of the first columns also writes weights (B, T, S) and logsumexp (B, T), unless they
    are None. Each of the ``splits`` in stats has ``segment`` rows; BLOCKS splits are merged at a
    time.
    """
    memory_b, memory_s = elements(memory_b, UNIT), elements(memory_s, UNIT)
    E = E * UNIT
    program = tl.program_id(0)
    e_blocks = tl.cdiv(E, BLOCK_E)
    t_blocks = tl.cdiv(T, BLOCK_T)
    e_block = program % e_blocks
    t_block = (program // e_blocks) % t_blocks
    # From the end: the cache holds the memory that `score_rows` read last.
    b = (tl.num_programs(0) - 1 - program) // (e_blocks * t_blocks)
    offs_t = t_block * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = e_block * BLOCK_E + tl.arange(0, BLOCK_E)
    queries = offs_t < T
    count = row_count(lengths, lengths_stride, b, S)
    row_max, row_sum = merged_softmax(
        stats, b, offs_t, queries, T, splits, tl.cdiv(count, segment), BLOCKS
    )
    inverse = inverse_or_zero(row_sum)
    memory += b.to(tl.int64) * memory_b
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, count, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        rows = readable_rows(mask, mask_b, mask_s, b, offs_s, count, MASK)
        tile = load_tile(memory, memory_s, offs_s, rows, offs_e, E)
        if MASK == MASK_PER_QUERY:
            tile, _ = split_nonfinite(tile)
        inside = queries[:, None] & (offs_s < count)[None, :]
        at = pair_tile(scores, b, offs_t, offs_s, T, P * PITCH)
        stored = queries[:, None] & (offs_s < padded(count))[None, :]
        exps = exp(tl.load(at, mask=stored, other=float("-inf")) - row_max[:, None])
        if weights is not None:
            first = inside & (offs_t * 0 + e_block == 0)[:, None]
            at = pair_tile(weights, b, offs_t, offs_s, T, S)
            tl.store(at, (exps * inverse[:, None]).to(weights.dtype.element_ty), mask=first)
        if keep is not None:
            exps *= kept_factor(keep, keep_scale, b, offs_t, offs_s, T, S)
        acc = product(exps.to(memory.dtype.element_ty), tile, acc, PRECISION, WIDEN)
    acc *= inverse[:, None]
    store_rows(acc, context + b.to(tl.int64) * T * E, offs_t, T, offs_e, E)
    if e_block == 0:
        if logsumexp is not None:
            at_log = logsumexp + b.to(tl.int64) * T + offs_t
            tl.store(at_log, log_sum_exp(row_max, row_sum), mask=queries)
        if weights is not None:
            zeros = tl.zeros((BLOCK_T, BLOCK_S), weights.dtype.element_ty)
            for start in range(count, S, BLOCK_S):  # padding
                offs_pad = start + tl.arange(0, BLOCK_S)
                at_pad = pair_tile(weights, b, offs_t, offs_pad, T, S)
                tl.store(at_pad, zeros, mask=queries[:, None] & (offs_pad < S)[None, :])
