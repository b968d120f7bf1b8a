"""Backward kernels: weights and score gradients, then the gradient of the memory.

Memory rows have 512 to 1024 columns and queries are few, so a (B, T, S) tensor is small compared to
the memory, the opposite of self-attention. The first kernel therefore reads the memory once for the
scores and the gradients of the weights and the query, and writes two such tensors: the weights
P after dropout, and the gradient dS of the scores. From them the second, `source_gradients`,
computes dMemory = P^T dO + dS^T Q without reading the memory again. Each program owns rows of
memory and processes all queries: no atomics, and the same bits every time. The two tensors live
for one call only. dO is grad_context.
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
    padded,
    pair_tile,
    product,
    readable_rows,
    row_count,
    split_nonfinite,
)


@entry
def weight_deltas(
    grad_context, grad_weights, context, weights, deltas,
    grad_context_b, grad_context_t, grad_weights_b, grad_weights_t, grad_weights_s, T, S, E,
    BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """deltas (B, T), float32: sum_s P dP of each query, dO . O plus the part of grad_weights."""
    grad_context_b, grad_context_t = elements(grad_context_b, UNIT), elements(grad_context_t, UNIT)
    E = E * UNIT
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    b = row64 // T
    t = row64 % T
    acc = tl.zeros((BLOCK,), tl.float32)
    if grad_context is not None:
        for e in range(0, E, BLOCK):
            at = e + tl.arange(0, BLOCK)
            at_grad = grad_context + b * grad_context_b + t * grad_context_t + at
            grad = tl.load(at_grad, mask=at < E, other=0.0)
            result = tl.load(context + row64 * E + at, mask=at < E, other=0.0)
            acc += grad.to(tl.float32) * result.to(tl.float32)
    for s in range(0, S, BLOCK):
        at = s + tl.arange(0, BLOCK)
        weight = tl.load(weights + row64 * S + at, mask=at < S, other=0.0).to(tl.float32)
        at_row = grad_weights + b * grad_weights_b + t * grad_weights_t
        at_grad = at_row + at.to(tl.int64) * grad_weights_s
        grad = tl.load(at_grad, mask=(at < S) & (weight != 0.0), other=0.0).to(tl.float32)
        acc += weight * grad
    tl.store(deltas + row64, tl.sum(acc, axis=0))


@triton.jit
def score_gradients(
    scores, grads, delta, counts, queries, b, offs_t, offs_s,
    grad_weights, logsumexp, keep, kept, grad_scores,
    grad_weights_b, grad_weights_t, grad_weights_s, T, S, P, end, scale, keep_scale,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """dS = P (dP - delta), stored and returned times scale, and its sum over the tile's positions.

    scores and grads = dO . memory are (BLOCK_T, BLOCK_S). WHOLE: the tile has all positions, so the
    softmax and delta = sum_s P dP are computed here, without the rounding of the log-sum-exp and of
    dO . O.
    """
    counts = counts & queries[:, None]
    if WHOLE:
        row_max = finite_max(tl.max(scores, axis=1))
        weight = exp(scores - row_max[:, None])
        weight *= inverse_or_zero(tl.sum(weight, axis=1))[:, None]
    else:
        log = tl.load(logsumexp + b.to(tl.int64) * T + offs_t, mask=queries, other=0.0)
        weight = exp(scores - tl.where(log == float("-inf"), 0.0, log)[:, None])
    weight = tl.where(counts, weight, 0.0)
    summed = weight
    if keep is not None:
        factor = kept_factor(keep, keep_scale, b, offs_t, offs_s, T, S)
        grads *= factor
        summed *= factor
    if grad_weights is not None:
        at = grad_weights + b.to(tl.int64) * grad_weights_b
        at += offs_t.to(tl.int64)[:, None] * grad_weights_t
        at += offs_s.to(tl.int64)[None, :] * grad_weights_s
        grads += tl.load(at, mask=counts, other=0.0).to(tl.float32)
    if WHOLE:
        delta = tl.sum(tl.where(counts, weight * grads, 0.0), axis=1)
    grad = tl.where(counts, weight * (grads - delta[:, None]), 0.0) * scale
    inside = queries[:, None] & (offs_s < padded(end))[None, :]  # zeros after the end
    at = pair_tile(kept, b, offs_t, offs_s, T, P)
    tl.store(at, summed.to(kept.dtype.element_ty), mask=inside)
    at = pair_tile(grad_scores, b, offs_t, offs_s, T, P)
    tl.store(at, grad.to(grad_scores.dtype.element_ty), mask=inside)
    return grad, tl.sum(grad, axis=1)


@triton.jit
def without_excess(grad_query, excess, context, offs_t, queries, offs_e, E):
    """dQ without the contribution of delta's error.

    The score gradients of a softmax sum to 0. Whatever remains in their sum is the error of delta,
    which comes from a rounded context, and dQ contains that error times sum_s P memory, the
    context. In bfloat16 subtracting it more than halves the error of dQ. Each split subtracts its
    own part.
    """
    rows = load_tile(context, E, offs_t, queries, offs_e, E).to(tl.float32)
    return grad_query - excess[:, None] * rows


@entry
def rows_backward(
    query, memory, exp_query, exp_memory, query_peak, memory_peak, memory_proj, v,
    lengths, mask, keep,
    grad_context, grad_weights, context, deltas, logsumexp,
    kept, grad_scores, grad_query,
    query_b, query_t, memory_b, memory_s, proj_b, proj_s, grad_context_b, grad_context_t,
    grad_weights_b, grad_weights_t, grad_weights_s, lengths_stride, mask_b, mask_t, mask_s,
    T, S, E, A, exp_width, exp_queries, exp_source, scale, keep_scale, splits, P,
    CONCAT: tl.constexpr, MASK: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, FAST_RCP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Two sweeps over the columns of BLOCK_S memory rows, as in `rows_forward`.

    kept and grad_scores (B, T, P PITCH): P and dS. Without SPLIT one program has all of S, and
    writes grad_query (B, T, E) unless it is None; with SPLIT `query_gradients` writes it, and for
    concat `concat_gradients`. With SPLIT and without grad_weights ``deltas`` (B, T) is None:
    delta = dO . O is computed here.
    """
    query_b, query_t = elements(query_b, UNIT), elements(query_t, UNIT)
    memory_b, memory_s = elements(memory_b, UNIT), elements(memory_s, UNIT)
    proj_b, proj_s = elements(proj_b, UNIT), elements(proj_s, UNIT)
    grad_context_b, grad_context_t = elements(grad_context_b, UNIT), elements(grad_context_t, UNIT)
    E, A = E * UNIT, A * UNIT
    program = tl.program_id(0)
    t_blocks = tl.cdiv(T, BLOCK_T)
    t_block = program % t_blocks  # innermost: programs that share memory run at the same time
    split = (program // t_blocks) % splits
    b = program // (splits * t_blocks)
    b64 = b.to(tl.int64)
    offs_t = t_block * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_s = split * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_e = tl.arange(0, BLOCK_E)
    queries = offs_t < T
    count = row_count(lengths, lengths_stride, b, S)
    if SPLIT:
        if split * BLOCK_S >= count:
            return  # padding only, which no kernel reads
    rows = readable_rows(mask, mask_b, mask_s, b, offs_s, count, MASK)
    counts = counted_positions(mask, mask_b, mask_t, mask_s, b, offs_t, offs_s, rows, T, MASK)
    memory += b64 * memory_b
    query += b64 * query_b
    spoiled = offs_s < 0
    grads = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    delta = tl.zeros((BLOCK_T,), tl.float32)
    if deltas is not None:
        delta = tl.load(deltas + b64 * T + offs_t, mask=queries, other=0.0)

    if CONCAT:
        memory_proj += b64 * proj_b
        scores, spoiled = concat_scores(
            exp_query, exp_memory, query_peak, memory_peak, query, memory_proj, v,
            b, t_block, split, offs_t, offs_s, queries, rows,
            query_t, proj_s, A, exp_width, exp_queries, exp_source,
            MASK, BLOCK_T, BLOCK_S, FAST_RCP,
        )  # fmt: skip
    else:
        scores = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for e in range(0, E, BLOCK_E):
        tile = load_tile(memory, memory_s, offs_s, rows, e + offs_e, E)
        if MASK == MASK_PER_QUERY:
            tile, tile_spoiled = split_nonfinite(tile)
            spoiled = spoiled | tile_spoiled
        if not CONCAT:
            query_tile = load_tile(query, query_t, offs_t, queries, e + offs_e, E)
            scores = product(query_tile, tl.trans(tile), scores, PRECISION, WIDEN)
        if grad_context is not None:
            at = grad_context + b64 * grad_context_b
            grad_tile = load_tile(at, grad_context_t, offs_t, queries, e + offs_e, E)
            grads = product(grad_tile, tl.trans(tile), grads, PRECISION, WIDEN)
            if SPLIT and deltas is None:
                at = context + b64 * T * E
                result = load_tile(at, E, offs_t, queries, e + offs_e, E)
                delta += tl.sum(grad_tile.to(tl.float32) * result.to(tl.float32), axis=1)
    if not CONCAT:
        scores *= scale

    scores = hide(scores, counts, spoiled, MASK)
    grad, _excess = score_gradients(
        scores, grads, delta, counts, queries, b, offs_t, offs_s,
        grad_weights, logsumexp, keep, kept, grad_scores,
        grad_weights_b, grad_weights_t, grad_weights_s, T, S, P * PITCH, count, scale, keep_scale,
        WHOLE=not SPLIT,
    )  # fmt: skip
    if grad_query is not None:
        grad = grad.to(memory.dtype.element_ty)
        grad_query += b64 * T * E
        for e in range(0, E, BLOCK_E):
            tile = load_tile(memory, memory_s, offs_s, rows, e + offs_e, E)
            if MASK == MASK_PER_QUERY:
                tile, _ = split_nonfinite(tile)
            zero = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
            part = product(grad, tile, zero, PRECISION, WIDEN)
            store_rows(part, grad_query, offs_t, T, e + offs_e, E)


@entry
def online_backward(
    query, memory, lengths, mask, keep,
    grad_context, grad_weights, context, deltas, logsumexp,
    kept, grad_scores, grad_query,
    query_b, query_t, memory_b, memory_s, grad_context_b, grad_context_t,
    grad_weights_b, grad_weights_t, grad_weights_s, lengths_stride, mask_b, mask_t, mask_s,
    T, S, E, scale, keep_scale, splits, segment, P,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Long rows: each tile of memory, all columns of it, is loaded once and serves three products.

    A program walks ``segment`` rows. Arguments as in `rows_backward`.
    """
    query_b, query_t = elements(query_b, UNIT), elements(query_t, UNIT)
    memory_b, memory_s = elements(memory_b, UNIT), elements(memory_s, UNIT)
    grad_context_b, grad_context_t = elements(grad_context_b, UNIT), elements(grad_context_t, UNIT)
    E = E * UNIT
    program = tl.program_id(0)
    t_blocks = tl.cdiv(T, BLOCK_T)
    t_block = program % t_blocks  # innermost: programs that share memory run at the same time
    split = (program // t_blocks) % splits
    b = program // (splits * t_blocks)
    b64 = b.to(tl.int64)
    offs_t = t_block * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    queries = offs_t < T
    count = row_count(lengths, lengths_stride, b, S)
    begin = split * segment
    end = tl.minimum(begin + segment, count)
    if split > 0:
        if begin >= count:
            return
    memory += b64 * memory_b
    context += b64 * T * E
    query_tile = load_tile(query + b64 * query_b, query_t, offs_t, queries, offs_e, E)
    excess = tl.zeros((BLOCK_T,), tl.float32)
    delta = tl.zeros((BLOCK_T,), tl.float32)
    if grad_context is not None:
        grad_context += b64 * grad_context_b
        if deltas is None:  # in chunks of 64 columns: whole rows would fill the registers
            for e in range(0, E, 64):
                offs = e + tl.arange(0, 64)
                part = load_tile(grad_context, grad_context_t, offs_t, queries, offs, E)
                part = part.to(tl.float32)
                result = load_tile(context, E, offs_t, queries, offs, E).to(tl.float32)
                delta += tl.sum(part * result, axis=1)
        grad_tile = load_tile(grad_context, grad_context_t, offs_t, queries, offs_e, E)
    if deltas is not None:
        delta = tl.load(deltas + b64 * T + offs_t, mask=queries, other=0.0)
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
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
        grads = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
        if grad_context is not None:
            grads = product(grad_tile, tl.trans(tile), grads, PRECISION, WIDEN)
        grad, part_excess = score_gradients(
            scores, grads, delta, counts, queries, b, offs_t, offs_s,
            grad_weights, logsumexp, keep, kept, grad_scores,
            grad_weights_b, grad_weights_t, grad_weights_s, T, S, P * PITCH, end, scale, keep_scale,
            WHOLE=False,
        )  # fmt: skip
        if grad_query is not None:
            excess += part_excess
            acc = product(grad.to(memory.dtype.element_ty), tile, acc, PRECISION, WIDEN)
    if grad_query is not None:
        if keep is None:
            acc = without_excess(acc, excess, context, offs_t, queries, offs_e, E)
        store_rows(acc, grad_query + (b64 * splits + split) * T * E, offs_t, T, offs_e, E)
