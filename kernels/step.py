"""One query at a time: a decoding step, where matrix units would idle on 15 rows of 16.

A tile of memory rows is loaded into registers once and serves both the score and the weighted sum.
Every row of the tile keeps its own softmax (running_max, running_sum, accumulator), so that no step
of the loop waits for another row; the rows are merged after the loop.
"""

import triton
import triton.language as tl

from .concat import TWO_LOG2E, reciprocal
from .tiles import (
    MASK_PER_QUERY,
    WINDOW_GAUSSIAN,
    bell,
    elements,
    entry,
    exp,
    finite_max,
    inverse_or_zero,
    load_tile,
    log_sum_exp,
    row_count,
    split_nonfinite,
    window_bounds,
)

# exp(2x) is used for |x| up to this bound, so that it fits in float32. The bound in
# fused_attn/prepared.py and csrc/attention_params.h must be the same.
LARGEST_PROJECTION = tl.constexpr(43.0)


@triton.jit
def looked_at(mask, mask_b, mask_t, mask_s, b, t, offs_s, end):
    """Bool (BLOCK_S,): the positions that query ``t`` may attend to; no other row is read."""
    rows = offs_s < end
    if mask is not None:
        at = mask + b.to(tl.int64) * mask_b + t.to(tl.int64) * mask_t
        rows = rows & (tl.load(at + offs_s.to(tl.int64) * mask_s, mask=rows, other=0) != 0)
    return rows


@triton.jit
def concat_row_scores(
    memory_exp, memory_proj, proj_s, exp_s, offs_s, rows, offs_a, A, q, v, v_sum, exp_q, is_small,
    MASK: tl.constexpr, FAST_RCP: tl.constexpr,
):  # fmt: skip
    """Concat scores of a tile of rows for one query, from prepared exponentials where they exist.

    ``memory_exp`` holds exp(2m), or -1 where that would leave float32; it may be None. With a
    per-query mask the second result says which rows are not finite.
    """
    spoiled = offs_s < 0
    if memory_exp is not None:
        exps = load_tile(memory_exp, exp_s, offs_s, rows, offs_a, A).to(tl.float32)
        plain = is_small & (tl.min(tl.min(exps, axis=1), axis=0) >= 0.0)
        if MASK == MASK_PER_QUERY:
            plain = plain & (tl.max(tl.max(tl.where(exps >= 0.0, 0, 1), axis=1), axis=0) == 0)
    else:
        m = load_tile(memory_proj, proj_s, offs_s, rows, offs_a, A).to(tl.float32)
        within = tl.abs(m) <= LARGEST_PROJECTION
        plain = is_small & (tl.max(tl.max(tl.where(within, 0, 1), axis=1), axis=0) == 0)
        exps = tl.exp2(m * TWO_LOG2E)
    if plain:
        r = reciprocal(1.0 + exp_q[None, :] * exps, FAST_RCP)
    else:
        m = load_tile(memory_proj, proj_s, offs_s, rows, offs_a, A).to(tl.float32)
        if MASK == MASK_PER_QUERY:
            m, spoiled = split_nonfinite(m)
        r = 1.0 / (1.0 + tl.exp2((q[None, :] + m) * TWO_LOG2E))
    return v_sum - 2.0 * tl.sum(v[None, :] * r, axis=1), spoiled


@entry
def step_forward(
    query, memory, memory_exp, memory_proj, v, lengths, mask, keep, centers,
    context, weights, logsumexp, scores_out,
    query_b, query_t, memory_b, memory_s, exp_b, exp_s, proj_b, proj_s,
    lengths_stride, mask_b, mask_t, mask_s,
    T, S, E, A, scale, keep_scale, half_width, rate, splits, segment,
    CONCAT: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_A: tl.constexpr, FAST_RCP: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Attention of one query per program, over ``segment`` rows of memory.

    query (B, T, E), or for concat its projection (B, T, A); memory (B, S, E), memory_exp and
    memory_proj (B, S, A), v (A,); outputs as in `online_forward`. ``centers`` (B, T) is float32, or
    None; ``rate`` is the inverse standard deviation of a Gaussian window.
    """
    query_b, query_t = elements(query_b, UNIT), elements(query_t, UNIT)
    memory_b, memory_s = elements(memory_b, UNIT), elements(memory_s, UNIT)
    exp_b, exp_s = elements(exp_b, UNIT), elements(exp_s, UNIT)
    proj_b, proj_s = elements(proj_b, UNIT), elements(proj_s, UNIT)
    E, A = E * UNIT, A * UNIT
    program = tl.program_id(0)
    t = program % T  # innermost: the queries of a batch row share its memory in the cache
    split = (program // T) % splits
    b = program // (T * splits)
    count = row_count(lengths, lengths_stride, b, S)
    begin = split * segment
    end = tl.minimum(begin + segment, count)
    if WINDOW:
        center = tl.load(centers + b.to(tl.int64) * T + t)
        begin, end = window_bounds(center, half_width, S)
        end = tl.minimum(end, count)
    elif SPLIT:
        if begin >= count:
            return
    offs_e = tl.arange(0, BLOCK_E)
    offs_a = tl.arange(0, BLOCK_A)
    slots = tl.arange(0, BLOCK_S)
    memory += b.to(tl.int64) * memory_b
    query += b.to(tl.int64) * query_b + t.to(tl.int64) * query_t
    if CONCAT:
        q = tl.load(query + offs_a, mask=offs_a < A, other=0.0).to(tl.float32)
        factor = tl.load(v + offs_a, mask=offs_a < A, other=0.0).to(tl.float32)
        factor_sum = tl.sum(factor, axis=0)
        exp_q = tl.exp2(q * TWO_LOG2E)
        is_small = tl.max(tl.where(tl.abs(q) <= LARGEST_PROJECTION, 0, 1), axis=0) == 0
        memory_proj += b.to(tl.int64) * proj_b
        if memory_exp is not None:
            memory_exp += b.to(tl.int64) * exp_b
    else:
        q = tl.load(query + offs_e, mask=offs_e < E, other=0.0).to(tl.float32)
    at_pair = (b.to(tl.int64) * T + t) * S
    acc = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    running_max = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_S,), tl.float32)
    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        offs_s = start + slots
        rows = looked_at(mask, mask_b, mask_t, mask_s, b, t, offs_s, end)
        tile = load_tile(memory, memory_s, offs_s, rows, offs_e, E)
        spoiled = offs_s < 0
        if MASK == MASK_PER_QUERY:
            tile, spoiled = split_nonfinite(tile)
        tile = tile.to(tl.float32)
        if CONCAT:
            score, proj_spoiled = concat_row_scores(
                memory_exp, memory_proj, proj_s, exp_s, offs_s, rows, offs_a, A,
                q, factor, factor_sum, exp_q, is_small, MASK, FAST_RCP,
            )  # fmt: skip
            spoiled = spoiled | proj_spoiled
        else:
            score = tl.sum(tile * q[None, :], axis=1) * scale
        if MASK == MASK_PER_QUERY:
            score = tl.where(spoiled, float("nan"), score)
        score = tl.where(rows, score, float("-inf"))
        if scores_out is not None:
            tl.store(scores_out + at_pair + offs_s, score, mask=offs_s < end)
        new_max = tl.maximum(running_max, score)
        base = finite_max(new_max)
        exps = exp(score - base)
        rescale = exp(running_max - base)
        running_sum = running_sum * rescale + exps
        running_max = new_max
        if WINDOW == WINDOW_GAUSSIAN:
            exps *= bell(offs_s, center, rate)
        if keep is not None:
            kept = tl.load(keep + at_pair + offs_s, mask=offs_s < end, other=0) != 0
            exps = tl.where(kept, exps * keep_scale, 0.0)
        acc = acc * rescale[:, None] + exps[:, None] * tile
    split_max = finite_max(tl.max(running_max, axis=0))
    share = exp(running_max - split_max)
    split_sum = tl.sum(running_sum * share, axis=0)
    result = tl.sum(acc * share[:, None], axis=0) * inverse_or_zero(split_sum)
    slot = (b.to(tl.int64) * splits + split) * T + t
    if SPLIT:
        tl.store(logsumexp + 2 * slot, split_max)
        tl.store(logsumexp + 2 * slot + 1, split_sum)
    elif logsumexp is not None:
        tl.store(logsumexp + slot, log_sum_exp(split_max, split_sum))
    tl.store(context + slot * E + offs_e, result.to(context.dtype.element_ty), mask=offs_e < E)


@entry
def step_backward(
    grad_context, grad_weights, query, memory, context, weights, logsumexp, lengths, mask, keep,
    grad_memory, grad_query,
    grad_context_b, grad_weights_b, grad_weights_s, query_b, memory_b, memory_s,
    lengths_stride, mask_b, mask_s,
    S, E, scale, keep_scale, splits, segment,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_ROW: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Backward of the dot score for T = 1: memory is read once and its gradient written once.

    grad_context (B, 1, E) or None; grad_weights (B, 1, S), with ``weights`` (B, 1, S), or None.
    grad_query (B, splits, 1, E), float32 if there are splits; grad_memory (B, S, E). A gradient
    that is not wanted is None.
    """
    grad_context_b, query_b = elements(grad_context_b, UNIT), elements(query_b, UNIT)
    memory_b, memory_s = elements(memory_b, UNIT), elements(memory_s, UNIT)
    E = E * UNIT
    split = tl.program_id(0) % splits
    b = tl.program_id(0) // splits
    b64 = b.to(tl.int64)
    count = row_count(lengths, lengths_stride, b, S)
    begin = split * segment
    end = tl.minimum(begin + segment, count)
    last = tl.minimum(begin + segment, S)
    offs_e = tl.arange(0, BLOCK_E)
    columns = offs_e < E
    slots = tl.arange(0, BLOCK_S)
    q = tl.load(query + b64 * query_b + offs_e, mask=columns, other=0.0).to(tl.float32)
    grad_row = tl.zeros((BLOCK_E,), tl.float32)
    delta = 0.0
    if grad_context is not None:
        grad_row = tl.load(grad_context + b64 * grad_context_b + offs_e, mask=columns, other=0.0)
        grad_row = grad_row.to(tl.float32)
        result = tl.load(context + b64 * E + offs_e, mask=columns, other=0.0).to(tl.float32)
        delta += tl.sum(grad_row * result, axis=0)
    if grad_weights is not None:
        for start in range(0, count, BLOCK_ROW):
            at = start + tl.arange(0, BLOCK_ROW)
            at_grad = grad_weights + b64 * grad_weights_b + at * grad_weights_s
            grad = tl.load(at_grad, mask=at < count, other=0.0)
            weight = tl.load(weights + b64 * S + at, mask=at < count, other=0.0).to(tl.float32)
            delta += tl.sum(tl.where(weight == 0.0, 0.0, grad.to(tl.float32) * weight), axis=0)
    log = tl.load(logsumexp + b)
    log = tl.where(log == float("-inf"), 0.0, log)
    memory += b64 * memory_b
    if grad_memory is not None:
        grad_memory += b64 * S * E
    acc = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    excess = tl.zeros((BLOCK_S,), tl.float32)
    for start in tl.range(begin, end, BLOCK_S, num_stages=STAGES):
        offs_s = start + slots
        rows = looked_at(mask, mask_b, 0 * b, mask_s, b, 0 * b, offs_s, end)
        tile = load_tile(memory, memory_s, offs_s, rows, offs_e, E).to(tl.float32)
        score = tl.sum(tile * q[None, :], axis=1) * scale
        weight = tl.where(rows, exp(score - log), 0.0)
        grad = tl.sum(tile * grad_row[None, :], axis=1)
        kept = weight
        if keep is not None:
            is_kept = tl.load(keep + b64 * S + offs_s, mask=offs_s < end, other=0) != 0
            factor = tl.where(is_kept, keep_scale, 0.0)
            grad *= factor
            kept *= factor
        if grad_weights is not None:
            at = grad_weights + b64 * grad_weights_b + offs_s * grad_weights_s
            grad += tl.load(at, mask=offs_s < end, other=0.0).to(tl.float32)
        grad = tl.where(rows, weight * (grad - delta), 0.0) * scale
        acc += grad[:, None] * tile
        excess += grad
        if grad_memory is not None:
            written = tl.where(
                rows[:, None], kept[:, None] * grad_row[None, :] + grad[:, None] * q[None, :], 0.0
            )
            at = grad_memory + offs_s.to(tl.int64)[:, None] * E + offs_e[None, :]
            inside = (offs_s < end)[:, None] & columns[None, :]
            tl.store(at, written.to(grad_memory.dtype.element_ty), mask=inside)
    if grad_memory is not None:
        for start in range(tl.maximum(begin, end), last, BLOCK_S):  # padding
            offs_s = start + slots
            at = grad_memory + offs_s.to(tl.int64)[:, None] * E + offs_e[None, :]
            zeros = tl.zeros((BLOCK_S, BLOCK_E), grad_memory.dtype.element_ty)
            tl.store(at, zeros, mask=(offs_s < last)[:, None] & columns[None, :])
    if grad_query is not None:
        slot = b64 * splits + split
        grad_q = tl.sum(acc, axis=0)
        if keep is None:  # see `without_excess` in backward.py
            result = tl.load(context + b64 * E + offs_e, mask=columns, other=0.0).to(tl.float32)
            grad_q -= tl.sum(excess, axis=0) * result
        at = grad_query + slot * E + offs_e
        tl.store(at, grad_q.to(grad_query.dtype.element_ty), mask=columns)
