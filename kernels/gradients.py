"""The last launch of a backward pass: the gradient of the memory, and sums left by other kernels.

`source_gradients` reads P and dS, which a kernel of backward.py wrote, and not the memory. Work
that is independent of it runs as further programs of the same launch: the sums of splits, and the
gradient of the query if it is a separate product. A launch costs more than any of these.
"""

import triton
import triton.language as tl

from .backward import without_excess
from .forward import store_rows
from .tiles import (
    MASK_PER_QUERY,
    PITCH,
    elements,
    entry,
    load_tile,
    padded,
    pair_tile,
    product,
    readable_rows,
    row_count,
    split_nonfinite,
)

MERGED = tl.constexpr(1024)  # elements that a program merges at once
MERGED_V = tl.constexpr(16)  # columns of v that a program sums


@triton.jit
def grad_query_tile(
    program, programs, grad_scores, memory, context, lengths, mask, keep, grad_query,
    memory_b, memory_s, lengths_stride, mask_b, mask_s, T, S, E, P,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dQ = dS memory of BLOCK_T queries and BLOCK_E columns: a plain product over the positions.

    From the end of the batch: the cache holds the memory that was read last.
    """
    e_blocks = tl.cdiv(E, BLOCK_E)
    t_blocks = tl.cdiv(T, BLOCK_T)
    e_block = program % e_blocks
    t_block = (program // e_blocks) % t_blocks
    b = (programs - 1 - program) // (e_blocks * t_blocks)
    offs_t = t_block * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = e_block * BLOCK_E + tl.arange(0, BLOCK_E)
    queries = offs_t < T
    count = row_count(lengths, lengths_stride, b, S)
    memory += b.to(tl.int64) * memory_b
    acc = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    excess = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, count, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        rows = readable_rows(mask, mask_b, mask_s, b, offs_s, count, MASK)
        tile = load_tile(memory, memory_s, offs_s, rows, offs_e, E)
        if MASK == MASK_PER_QUERY:
            tile, _ = split_nonfinite(tile)
        inside = queries[:, None] & (offs_s < padded(count))[None, :]
        at = pair_tile(grad_scores, b, offs_t, offs_s, T, P)
        grad = tl.load(at, mask=inside, other=0.0)
        if keep is None:
            excess += tl.sum(grad.to(tl.float32), axis=1)
        acc = product(grad, tile, acc, PRECISION, WIDEN)
    first = b.to(tl.int64) * T * E
    if keep is None:
        acc = without_excess(acc, excess, context + first, offs_t, queries, offs_e, E)
    store_rows(acc, grad_query + first, offs_t, T, offs_e, E)


@entry
def query_gradients(
    grad_scores, memory, context, lengths, mask, keep, grad_query,
    memory_b, memory_s, lengths_stride, mask_b, mask_s, T, S, E, P,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """`grad_query_tile` alone, for a memory that needs no gradient."""
    grad_query_tile(
        tl.program_id(0), tl.num_programs(0), grad_scores, memory, context, lengths, mask, keep,
        grad_query, elements(memory_b, UNIT), elements(memory_s, UNIT), lengths_stride,
        mask_b, mask_s, T, S, E * UNIT, P * PITCH, MASK, BLOCK_T, BLOCK_S, BLOCK_E,
        PRECISION, WIDEN,
    )  # fmt: skip


@triton.jit
def merge_splits(program, partial, lengths, total, lengths_stride, S, merged, splits, segment):
    """MERGED elements of a batch row, added in the order of the splits.

    Splits of padding alone were not written and are not read.
    """
    blocks = tl.cdiv(merged, MERGED)
    b = program // blocks
    offs = (program % blocks) * MERGED + tl.arange(0, MERGED)
    count = row_count(lengths, lengths_stride, b, S)
    at = partial + b.to(tl.int64) * splits * merged + offs
    acc = tl.zeros((MERGED,), tl.float32)
    for _ in range(0, tl.cdiv(count, segment)):
        acc += tl.load(at, mask=offs < merged, other=0.0)
        at += merged
    at = total + b.to(tl.int64) * merged + offs
    tl.store(at, acc.to(total.dtype.element_ty), mask=offs < merged)


@triton.jit
def sum_columns(program, partial_v, grad_v, v_rows, v_width):
    """MERGED_V columns of grad_v (v_width,), the sum over the rows of partial_v."""
    offs = program * MERGED_V + tl.arange(0, MERGED_V)
    acc = tl.zeros((MERGED // MERGED_V, MERGED_V), tl.float32)
    for start in range(0, v_rows, MERGED // MERGED_V):
        rows = start + tl.arange(0, MERGED // MERGED_V)
        inside = (rows < v_rows)[:, None] & (offs < v_width)[None, :]
        at = partial_v + rows.to(tl.int64)[:, None] * v_width + offs[None, :]
        acc += tl.load(at, mask=inside, other=0.0)
    sums = tl.sum(acc, axis=0)
    tl.store(grad_v + offs, sums.to(grad_v.dtype.element_ty), mask=offs < v_width)


@triton.jit
def merge_sums(
    program, partial, lengths, total, partial_v, grad_v,
    lengths_stride, S, merges, merged, splits, segment, v_rows, v_width,
):  # fmt: skip
    """``merges`` programs sum partial (B, splits, merged) to total (B, merged), the others v.

    grad_v (v_width,) is the sum of the rows of partial_v (v_rows, v_width). Either pair may be
    None.
    """
    if program < merges:
        if partial is not None:
            merge_splits(
                program, partial, lengths, total, lengths_stride, S, merged, splits, segment
            )
    else:
        if partial_v is not None:
            sum_columns(program - merges, partial_v, grad_v, v_rows, v_width)


@entry
def merge_alone(
    lengths, partial, total, partial_v, grad_v,
    lengths_stride, S, merges, merged, splits, segment, v_rows, v_width,
):  # fmt: skip
    """`merge_sums` alone, for a memory that needs no gradient."""
    merge_sums(
        tl.program_id(0), partial, lengths, total, partial_v, grad_v,
        lengths_stride, S, merges, merged, splits, segment, v_rows, v_width,
    )  # fmt: skip


@entry
def source_gradients(
    kept, grad_scores, grad_context, query, lengths, mask, grad_memory,
    partial, total, partial_v, grad_v, memory, context, keep, grad_query,
    grad_context_b, grad_context_t, query_b, query_t, lengths_stride, mask_b, mask_s, T, S, E, P,
    sources, merges, merged, splits, segment, v_rows, v_width, memory_b, memory_s,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    QUERY_T: tl.constexpr, QUERY_S: tl.constexpr, QUERY_E: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dMemory = P^T dO + dS^T Q of BLOCK_S rows and BLOCK_E columns, written once.

    grad_scores and query are None for concat, where the memory enters only the weighted sum;
    grad_context may be None. ``sources`` programs do that. Programs after them run `merge_sums`,
    where another kernel left sums to merge; programs before them run `grad_query_tile`, in tiles of
    QUERY_T, QUERY_S and QUERY_E, where the gradient of the query is still to be computed.
    """
    program = tl.program_id(0)
    if grad_query is not None:
        others = tl.num_programs(0) - sources
        if program < others:
            grad_query_tile(
                program, others, grad_scores, memory, context, lengths, mask, keep,
                grad_query, elements(memory_b, UNIT), elements(memory_s, UNIT),
                lengths_stride, mask_b, mask_s, T, S, E * UNIT, P * PITCH,
                MASK, QUERY_T, QUERY_S, QUERY_E, PRECISION, WIDEN,
            )  # fmt: skip
            return
        program -= others
    if partial is not None or partial_v is not None:
        if program >= sources:
            merge_sums(
                program - sources, partial, lengths, total, partial_v, grad_v,
                lengths_stride, S, merges, merged, splits, segment, v_rows, v_width,
            )  # fmt: skip
            return
    query_b, query_t = elements(query_b, UNIT), elements(query_t, UNIT)
    grad_context_b, grad_context_t = elements(grad_context_b, UNIT), elements(grad_context_t, UNIT)
    E = E * UNIT
    e_blocks = tl.cdiv(E, BLOCK_E)
    s_blocks = tl.cdiv(S, BLOCK_S)
    program = sources - 1 - program  # from the end of the batch, as above
    e_block = program % e_blocks
    s_block = (program // e_blocks) % s_blocks
    b = program // (e_blocks * s_blocks)
    b64 = b.to(tl.int64)
    offs_s = s_block * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_e = e_block * BLOCK_E + tl.arange(0, BLOCK_E)
    count = row_count(lengths, lengths_stride, b, S)
    rows = readable_rows(mask, mask_b, mask_s, b, offs_s, count, MASK)
    acc = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    if s_block * BLOCK_S < count:
        for t in range(0, T, BLOCK_T):
            offs_t = t + tl.arange(0, BLOCK_T)
            queries = offs_t < T
            inside = queries[:, None] & (offs_s < padded(count))[None, :]
            if grad_context is not None:
                at = pair_tile(kept, b, offs_t, offs_s, T, P * PITCH)
                part = tl.load(at, mask=inside, other=0.0)
                at = grad_context + b64 * grad_context_b
                grad_tile = load_tile(at, grad_context_t, offs_t, queries, offs_e, E)
                acc = product(tl.trans(part), grad_tile, acc, PRECISION, WIDEN)
            if query is not None:
                at = pair_tile(grad_scores, b, offs_t, offs_s, T, P * PITCH)
                part = tl.load(at, mask=inside, other=0.0)
                at = query + b64 * query_b
                query_tile = load_tile(at, query_t, offs_t, queries, offs_e, E)
                acc = product(tl.trans(part), query_tile, acc, PRECISION, WIDEN)
    acc = tl.where(rows[:, None], acc, 0.0)
    store_rows(acc, grad_memory + b64 * S * E, offs_s, S, offs_e, E)
