"""Backward of local attention: a program for each query walks its window, twice.

Windows overlap, so the gradient of the memory is a sum over queries. The first kernel writes each
query's weights after dropout and its score gradients to tensors (B, T, W), W being the width of a
window. In the second a program owns rows of the memory (or of its projection), and sums over the
windows that cover them: no atomics, the same bits every time. The forward pass is `step_forward`.
"""

import triton
import triton.language as tl

from .concat import TWO_LOG2E
from .step import looked_at
from .tiles import (
    MASK_PER_QUERY,
    WINDOW_GAUSSIAN,
    bell,
    elements,
    entry,
    exp,
    inverse_or_zero,
    load_tile,
    readable_rows,
    row_count,
    split_nonfinite,
    window_bounds,
)


@triton.jit
def window_pass(
    q, factor, grad_row, memory, memory_proj, mask, keep, grad_weights, center,
    b, t, offs_s, end, offs_e, offs_a, at_pair, at_weights, log, rate, scale, keep_scale,
    memory_s, proj_s, mask_b, mask_t, mask_s, grad_weights_s, E, A,
    CONCAT: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Weights P, their factor g, the gradient dW, the memory tile and r of a tile of positions."""
    rows = looked_at(mask, mask_b, mask_t, mask_s, b, t, offs_s, end)
    tile = load_tile(memory, memory_s, offs_s, rows, offs_e, E)
    spoiled = offs_s < 0
    if MASK == MASK_PER_QUERY:
        tile, spoiled = split_nonfinite(tile)
    tile = tile.to(tl.float32)
    r = tile
    if CONCAT:
        m = load_tile(memory_proj, proj_s, offs_s, rows, offs_a, A)
        if MASK == MASK_PER_QUERY:
            m, proj_spoiled = split_nonfinite(m)
            spoiled = spoiled | proj_spoiled
        r = 1.0 / (1.0 + tl.exp2((q[None, :] + m.to(tl.float32)) * TWO_LOG2E))
        score = tl.sum(factor, axis=0) - 2.0 * tl.sum(factor[None, :] * r, axis=1)
    else:
        score = tl.sum(tile * q[None, :], axis=1) * scale
    if MASK == MASK_PER_QUERY:
        score = tl.where(spoiled, float("nan"), score)
    weight = tl.where(rows, exp(score - log), 0.0)
    share = tl.where(rows, 1.0, 0.0)
    if WINDOW == WINDOW_GAUSSIAN:
        share *= bell(offs_s, center, rate)
    kept = weight * share
    grad = tl.sum(tile * grad_row[None, :], axis=1)
    if keep is not None:
        is_kept = tl.load(keep + at_pair + offs_s, mask=offs_s < end, other=0) != 0
        drop = tl.where(is_kept, keep_scale, 0.0)
        grad *= drop
        kept *= drop
    if grad_weights is not None:
        at = grad_weights + at_weights + offs_s.to(tl.int64) * grad_weights_s
        grad += tl.load(at, mask=rows, other=0.0).to(tl.float32)
    return rows, weight, share, kept, grad, tile, r


@entry
def window_backward(
    query, memory, memory_proj, v, lengths, mask, keep, centers,
    grad_context, grad_weights, logsumexp,
    kept_out, grads_out, grad_query, grad_centers, partial_v,
    query_b, query_t, memory_b, memory_s, proj_b, proj_s,
    grad_context_b, grad_context_t, grad_weights_b, grad_weights_t, grad_weights_s,
    lengths_stride, mask_b, mask_t, mask_s, T, S, E, A, scale, keep_scale, half_width, rate, width,
    CONCAT: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_A: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One query's weights and score gradients, and the gradients of the query and its center.

    centers (B, T) as in `step_forward`. kept_out and grads_out (B, T, W), float32: weights and
    score gradients (times scale) of the positions from the first of the window on. partial_v
    (B T, A) for concat. The first walk sums delta = sum_s W dW, which the second needs.

    The weights come from the stored log-sum-exp, and sum to 1 up to its rounding. delta is divided
    by their sum: it is then the mean that makes the gradients of the scores sum to 0, as they must.
    """
    query_b, query_t = elements(query_b, UNIT), elements(query_t, UNIT)
    memory_b, memory_s = elements(memory_b, UNIT), elements(memory_s, UNIT)
    proj_b, proj_s = elements(proj_b, UNIT), elements(proj_s, UNIT)
    grad_context_b, grad_context_t = elements(grad_context_b, UNIT), elements(grad_context_t, UNIT)
    E, A = E * UNIT, A * UNIT
    row = tl.program_id(0)
    t = row % T
    b = row // T
    b64 = b.to(tl.int64)
    at_row = row.to(tl.int64)
    count = row_count(lengths, lengths_stride, b, S)
    center = tl.load(centers + at_row)
    begin, end = window_bounds(center, half_width, S)
    end = tl.minimum(tl.minimum(end, count), begin + width)  # a center that is NaN has no window
    offs_e = tl.arange(0, BLOCK_E)
    offs_a = tl.arange(0, BLOCK_A)
    slots = tl.arange(0, BLOCK_S)
    memory += b64 * memory_b
    query += b64 * query_b + t.to(tl.int64) * query_t
    grad_row = tl.zeros((BLOCK_E,), tl.float32)
    if grad_context is not None:
        at_grad = grad_context + b64 * grad_context_b + t.to(tl.int64) * grad_context_t + offs_e
        grad_row = tl.load(at_grad, mask=offs_e < E, other=0.0).to(tl.float32)
    if CONCAT:
        memory_proj += b64 * proj_b
        q = tl.load(query + offs_a, mask=offs_a < A, other=0.0).to(tl.float32)
        factor = tl.load(v + offs_a, mask=offs_a < A, other=0.0).to(tl.float32)
    else:
        q = tl.load(query + offs_e, mask=offs_e < E, other=0.0).to(tl.float32)
        factor = q
    log = tl.load(logsumexp + at_row)
    log = tl.where(log == float("-inf"), 0.0, log)
    at_pair = at_row * S
    at_weights = b64 * grad_weights_b + t.to(tl.int64) * grad_weights_t
    sums = tl.zeros((BLOCK_S,), tl.float32)
    weight_sums = tl.zeros((BLOCK_S,), tl.float32)
    for start in range(begin, end, BLOCK_S):
        offs_s = start + slots
        rows, weight, share, kept, grad, tile, r = window_pass(
            q, factor, grad_row, memory, memory_proj, mask, keep, grad_weights, center,
            b, t, offs_s, end, offs_e, offs_a, at_pair, at_weights, log, rate, scale, keep_scale,
            memory_s, proj_s, mask_b, mask_t, mask_s, grad_weights_s, E, A, CONCAT, MASK, WINDOW,
        )  # fmt: skip
        sums += tl.where(rows, weight * share * grad, 0.0)
        weight_sums += weight
    delta = tl.sum(sums, axis=0) * inverse_or_zero(tl.sum(weight_sums, axis=0))
    if CONCAT:
        acc = tl.zeros((BLOCK_A,), tl.float32)
    else:
        acc = tl.zeros((BLOCK_E,), tl.float32)
    part_v = tl.zeros((BLOCK_A,), tl.float32)
    moment = tl.zeros((BLOCK_S,), tl.float32)
    for start in range(begin, end, BLOCK_S):
        offs_s = start + slots
        rows, weight, share, kept, grad, tile, r = window_pass(
            q, factor, grad_row, memory, memory_proj, mask, keep, grad_weights, center,
            b, t, offs_s, end, offs_e, offs_a, at_pair, at_weights, log, rate, scale, keep_scale,
            memory_s, proj_s, mask_b, mask_t, mask_s, grad_weights_s, E, A, CONCAT, MASK, WINDOW,
        )  # fmt: skip
        grad *= share
        if WINDOW == WINDOW_GAUSSIAN:
            moment += tl.where(rows, weight * grad * (offs_s.to(tl.float32) - center), 0.0)
        grad = tl.where(rows, weight * (grad - delta), 0.0) * scale
        if CONCAT:
            acc += tl.sum(grad[:, None] * (r - r * r), axis=0)
            part_v += tl.sum(grad[:, None] * (1.0 - 2.0 * r), axis=0)
        else:
            acc += tl.sum(grad[:, None] * tile, axis=0)
        inside = offs_s < end
        slot = at_row * width + (offs_s - begin)
        tl.store(kept_out + slot, tl.where(rows, kept, 0.0), mask=inside)
        tl.store(grads_out + slot, grad, mask=inside)
    if grad_centers is not None:
        tl.store(grad_centers + at_row, tl.sum(moment, axis=0) * rate * rate)
    if CONCAT:
        acc *= 4.0 * factor
        at_a = grad_query + at_row * A + offs_a
        tl.store(at_a, acc.to(grad_query.dtype.element_ty), mask=offs_a < A)
        tl.store(partial_v + at_row * A + offs_a, part_v, mask=offs_a < A)
    else:
        at_e = grad_query + at_row * E + offs_e
        tl.store(at_e, acc.to(grad_query.dtype.element_ty), mask=offs_e < E)


@entry
def window_source(
    kept, grads, query, grad_context, memory_proj, v, lengths, mask, centers, out,
    query_b, query_t, grad_context_b, grad_context_t, proj_b, proj_s,
    lengths_stride, mask_b, mask_s, T, S, E, half_width, width,
    PROJ: tl.constexpr, MASK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Gradient of the memory, or with PROJ of its projection: BLOCK_S rows and BLOCK_E columns.

    The memory gets P^T dO, and for dot dS^T Q (query is None for concat). The projection gets
    4 v sum_t dS (r - r^2). ``E`` is the width of ``out`` (B, S, E).
    """
    query_b, query_t = elements(query_b, UNIT), elements(query_t, UNIT)
    grad_context_b, grad_context_t = elements(grad_context_b, UNIT), elements(grad_context_t, UNIT)
    proj_b, proj_s = elements(proj_b, UNIT), elements(proj_s, UNIT)
    E = E * UNIT
    e_blocks = tl.cdiv(E, BLOCK_E)
    s_blocks = tl.cdiv(S, BLOCK_S)
    program = tl.program_id(0)
    e_block = program % e_blocks
    s_block = (program // e_blocks) % s_blocks
    b = program // (e_blocks * s_blocks)
    b64 = b.to(tl.int64)
    offs_s = s_block * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_e = e_block * BLOCK_E + tl.arange(0, BLOCK_E)
    columns = offs_e < E
    count = row_count(lengths, lengths_stride, b, S)
    rows = readable_rows(mask, mask_b, mask_s, b, offs_s, count, MASK)
    acc = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    m = acc
    if PROJ:
        m = load_tile(memory_proj + b64 * proj_b, proj_s, offs_s, rows, offs_e, E).to(tl.float32)
    at_center = centers + b64 * T
    at_query = b64 * query_b + offs_e
    at_grad = b64 * grad_context_b + offs_e
    at_part = b64 * T * width
    for _ in range(0, T):
        begin, end = window_bounds(tl.load(at_center), half_width, S)
        end = tl.minimum(tl.minimum(end, count), begin + width)
        if (begin < (s_block + 1) * BLOCK_S) & (end > s_block * BLOCK_S):
            inside = (offs_s >= begin) & (offs_s < end)
            at = at_part + (offs_s - begin)
            if PROJ:
                grad = tl.load(grads + at, mask=inside, other=0.0)
                q = tl.load(query + at_query, mask=columns, other=0.0).to(tl.float32)
                r = 1.0 / (1.0 + tl.exp2((q[None, :] + m) * TWO_LOG2E))
                # A row that is not finite contributes nothing where it is masked.
                acc += tl.where(grad[:, None] == 0.0, 0.0, grad[:, None] * (r - r * r))
            else:
                if grad_context is not None:
                    part = tl.load(kept + at, mask=inside, other=0.0)
                    row = tl.load(grad_context + at_grad, mask=columns, other=0.0).to(tl.float32)
                    acc += part[:, None] * row[None, :]
                if query is not None:
                    grad = tl.load(grads + at, mask=inside, other=0.0)
                    q = tl.load(query + at_query, mask=columns, other=0.0).to(tl.float32)
                    acc += grad[:, None] * q[None, :]
        at_center += 1
        at_query += query_t
        at_grad += grad_context_t
        at_part += width
    if PROJ:
        acc *= 4.0 * tl.load(v + offs_e, mask=columns, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(rows[:, None], acc, 0.0)
    at = out + b64 * S * E + offs_s.to(tl.int64)[:, None] * E + offs_e[None, :]
    stored = (offs_s < S)[:, None] & columns[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=stored)
