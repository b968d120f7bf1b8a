"""The concat score v . tanh(q + m) by factored exponentials, without a (B, T, S, A) tensor.

With x = 1 + exp(2q) exp(2m) and r = 1 / x:  tanh(q + m) = 1 - 2r  and  1 - tanh^2 = 4 (r - r^2).
The exponentials are made once for each of the T + S rows; the T S A inner loop is one multiply-add,
a share of a reciprocal and two more operations. Two terms share one reciprocal,
v0 / x0 + v1 / x1 = (v0 x1 + v1 x0) / (x0 x1): the special-function unit, which gives 16 a clock
where multiply-adds come at 128, is then no longer the limit.

The product of two x overflows when q + m exceeds 22, one exponential when |q| or |m| exceeds 43.
So `concat_exponentials` leaves the largest |x| of each block, and a tile beyond PAIR_LIMIT takes a
loop with the exponential of the sum, which is right for any number.
"""

import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    counted_positions,
    elements,
    entry,
    hide,
    in_squares,
    load_tile,
    pair_tile,
    readable_rows,
    row_count,
)

TWO_LOG2E = tl.constexpr(2.0 * LOG2E.value)
EXP_ROWS = tl.constexpr(16)  # rows that share a peak, and of which prepared tiles are multiples
PAIR_LIMIT = tl.constexpr(21.0)  # of max |q| + max |m|: both x then stay below 1e19


@triton.jit
def reciprocal(x, FAST_RCP: tl.constexpr):
    """1 / x. On NVIDIA the bare instruction: a plain division adds five for what cannot occur."""
    if FAST_RCP:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def exponential_rows(
    proj, rows, offs_r, exps, peaks, proj_r, A, exp_width, exp_rows,
    BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """exp(2 x) of some rows of a projection, by columns, and the peak of each EXP_ROWS of them."""
    stored = offs_r < exp_rows
    highest = tl.zeros((BLOCK_R,), tl.float32)
    for a in range(0, exp_width, BLOCK_A):
        offs_a = a + tl.arange(0, BLOCK_A)
        x = load_tile(proj, proj_r, offs_r, rows, offs_a, A).to(tl.float32)
        size = tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf"))
        highest = tl.maximum(highest, tl.max(size, axis=1))
        inside = rows[:, None] & (offs_a < A)[None, :]
        values = tl.where(inside, tl.exp2(x * TWO_LOG2E), 0.0)
        at = exps + offs_a.to(tl.int64)[:, None] * exp_rows + offs_r[None, :]
        tl.store(at, tl.trans(values), mask=(offs_a < exp_width)[:, None] & stored[None, :])
    highest = tl.max(tl.reshape(highest, (BLOCK_R // EXP_ROWS, EXP_ROWS)), axis=1)
    first = tl.min(tl.reshape(offs_r, (BLOCK_R // EXP_ROWS, EXP_ROWS)), axis=1)
    tl.store(peaks + first // EXP_ROWS, highest, mask=first < exp_rows)


@entry
def concat_exponentials(
    query, memory_proj, lengths, mask, exp_query, exp_memory, query_peak, memory_peak,
    query_b, query_t, proj_b, proj_s, lengths_stride, mask_b, mask_t, mask_s,
    T, S, A, exp_width, exp_queries, exp_source,
    MASK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """exp(2 x) of both projections, query (B, T, A) and memory_proj (B, S, A), for `concat_scores`.

    They are laid out for reading by columns, (B, exp_width, rows): ``exp_queries`` and
    ``exp_source`` times EXP_ROWS of them. Rows that may not be read, and what lies beyond T, S and
    A, become 0: x = 1 there. The peaks (B, exp_queries) and (B, exp_source) receive the largest |x|
    of EXP_ROWS rows, inf if they hold what is not finite.
    """
    query_b, query_t = elements(query_b, UNIT), elements(query_t, UNIT)
    proj_b, proj_s, A = elements(proj_b, UNIT), elements(proj_s, UNIT), A * UNIT
    of_queries = tl.cdiv(exp_queries * EXP_ROWS, BLOCK_R)
    programs = of_queries + tl.cdiv(exp_source * EXP_ROWS, BLOCK_R)
    b = tl.program_id(0) // programs
    block = tl.program_id(0) % programs
    wide = b.to(tl.int64)
    if block < of_queries:
        offs_t = block * BLOCK_R + tl.arange(0, BLOCK_R)
        exp_query += wide * exp_width * exp_queries * EXP_ROWS
        exponential_rows(
            query + wide * query_b, offs_t < T, offs_t, exp_query, query_peak + wide * exp_queries,
            query_t, A, exp_width, exp_queries * EXP_ROWS, BLOCK_R, BLOCK_A,
        )  # fmt: skip
    else:
        offs_s = (block - of_queries) * BLOCK_R + tl.arange(0, BLOCK_R)
        count = row_count(lengths, lengths_stride, b, S)
        rows = readable_rows(mask, mask_b, mask_s, b, offs_s, count, MASK)
        if MASK == 2:  # a row that no query looks at may hold anything, and must not move the peak
            looks = mask + wide * mask_b + offs_s.to(tl.int64) * mask_s
            wanted = tl.zeros((BLOCK_R,), tl.int32)
            for _ in range(0, T):
                wanted |= tl.load(looks, mask=rows, other=0).to(tl.int32)
                looks += mask_t
            rows = rows & (wanted != 0)
        exp_memory += wide * exp_width * exp_source * EXP_ROWS
        exponential_rows(
            memory_proj + wide * proj_b, rows, offs_s, exp_memory, memory_peak + wide * exp_source,
            proj_s, A, exp_width, exp_source * EXP_ROWS, BLOCK_R, BLOCK_A,
        )  # fmt: skip


@triton.jit
def concat_scores(
    exp_query, exp_memory, query_peak, memory_peak, query, memory_proj, v,
    b, t_block, s_block, offs_t, offs_s, queries, rows,
    query_t, proj_s, A, exp_width, exp_queries, exp_source,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, FAST_RCP: tl.constexpr,
):  # fmt: skip
    """The scores (BLOCK_T, BLOCK_S) of a tile, and with MASK == 2 the rows that are not finite.

    ``query`` and ``memory_proj`` point to the rows of batch row b; exp_width is even, exp_queries
    and exp_source are in units of EXP_ROWS.
    """
    total = in_squares(tl.zeros((BLOCK_T, BLOCK_S), tl.float32))
    bad = offs_s < 0
    weight_sum = 0.0
    each_t = tl.arange(0, BLOCK_T // EXP_ROWS)
    each_s = tl.arange(0, BLOCK_S // EXP_ROWS)
    high_query = tl.load(query_peak + b * exp_queries + t_block * (BLOCK_T // EXP_ROWS) + each_t)
    high_memory = tl.load(memory_peak + b * exp_source + s_block * (BLOCK_S // EXP_ROWS) + each_s)
    exp_queries, exp_source = exp_queries * EXP_ROWS, exp_source * EXP_ROWS
    if tl.max(high_query, axis=0) + tl.max(high_memory, axis=0) < PAIR_LIMIT:
        at_query = exp_query + b.to(tl.int64) * exp_width * exp_queries + offs_t
        at_memory = exp_memory + b.to(tl.int64) * exp_width * exp_source + offs_s
        for a in range(0, exp_width, 2):
            v0 = tl.load(v + a).to(tl.float32)
            v1 = tl.load(v + a + 1, mask=a + 1 < A, other=0.0).to(tl.float32)
            q0 = tl.load(at_query)
            q1 = tl.load(at_query + exp_queries)
            m0 = tl.load(at_memory)
            m1 = tl.load(at_memory + exp_source)
            x0 = 1.0 + q0[:, None] * m0[None, :]
            x1 = 1.0 + q1[:, None] * m1[None, :]
            total += (v0 * x1 + v1 * x0) * reciprocal(x0 * x1, FAST_RCP)
            weight_sum += v0 + v1
            at_query += 2 * exp_queries
            at_memory += 2 * exp_source
    else:
        plain_query = query + offs_t.to(tl.int64) * query_t
        plain_memory = memory_proj + offs_s.to(tl.int64) * proj_s
        for a in range(0, A):
            weight = tl.load(v + a).to(tl.float32)
            q = tl.load(plain_query + a, mask=queries, other=0.0).to(tl.float32)
            m = tl.load(plain_memory + a, mask=rows, other=0.0).to(tl.float32)
            if MASK == 2:
                bad = bad | (tl.abs(m) >= float("inf")) | (m != m)
            x = 1.0 + tl.exp2((q[:, None] + m[None, :]) * TWO_LOG2E)
            total += weight / x
            weight_sum += weight
    return weight_sum - 2.0 * total, bad


@entry
def concat_scores_only(
    query, memory_proj, exp_query, exp_memory, query_peak, memory_peak, v, lengths, mask, scores,
    query_b, query_t, proj_b, proj_s, lengths_stride, mask_b, mask_t, mask_s,
    T, S, A, exp_width, exp_queries, exp_source, splits,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, FAST_RCP: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """A tile of scores (B, T, S) in float32, -inf where nothing counts."""
    query_b, query_t = elements(query_b, UNIT), elements(query_t, UNIT)
    proj_b, proj_s, A = elements(proj_b, UNIT), elements(proj_s, UNIT), A * UNIT
    program = tl.program_id(0)
    split = program % splits
    t_blocks = tl.cdiv(T, BLOCK_T)
    t_block = (program // splits) % t_blocks
    b = program // (splits * t_blocks)
    offs_t = t_block * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_s = split * BLOCK_S + tl.arange(0, BLOCK_S)
    queries = offs_t < T
    count = row_count(lengths, lengths_stride, b, S)
    rows = readable_rows(mask, mask_b, mask_s, b, offs_s, count, MASK)
    counts = counted_positions(mask, mask_b, mask_t, mask_s, b, offs_t, offs_s, rows, T, MASK)
    result, bad = concat_scores(
        exp_query, exp_memory, query_peak, memory_peak, query + b.to(tl.int64) * query_b,
        memory_proj + b.to(tl.int64) * proj_b, v, b, t_block, split, offs_t, offs_s, queries, rows,
        query_t, proj_s, A, exp_width, exp_queries, exp_source, MASK, BLOCK_T, BLOCK_S, FAST_RCP,
    )  # fmt: skip
    inside = queries[:, None] & (offs_s < S)[None, :]
    at = pair_tile(scores, b, offs_t, offs_s, T, S)
    tl.store(at, hide(result, counts, bad, MASK), mask=inside)


@entry
def concat_gradients(
    grad_scores, query_proj, memory_proj, v, query_peak, memory_peak, lengths, mask,
    grad_memory_proj, partial_query, partial_v,
    query_b, query_t, proj_b, proj_s, lengths_stride, mask_b, mask_s,
    T, S, A, exp_queries, exp_source, score_t,
    MASK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCKS: tl.constexpr, FAST_RCP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Gradients of both projections and of v from those of the scores, grad_scores (B, T, score_t).

    A program owns BLOCK_S rows and BLOCK_A columns of memory_proj and meets all queries two by two,
    so that two terms share a reciprocal: grad_memory_proj is written once. It leaves its part of
    the query's gradient, partial_query (B, blocks, T, A), and of v's, partial_v (B blocks, A).
    """
    query_b, query_t = elements(query_b, UNIT), elements(query_t, UNIT)
    proj_b, proj_s = elements(proj_b, UNIT), elements(proj_s, UNIT)
    A = A * UNIT
    a_blocks = tl.cdiv(A, BLOCK_A)
    s_blocks = tl.cdiv(S, BLOCK_S)
    program = tl.program_id(0)
    a_block = program % a_blocks
    s_block = (program // a_blocks) % s_blocks
    b = program // (a_blocks * s_blocks)
    offs_s = s_block * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_a = a_block * BLOCK_A + tl.arange(0, BLOCK_A)
    columns = offs_a < A
    count = row_count(lengths, lengths_stride, b, S)
    rows = readable_rows(mask, mask_b, mask_s, b, offs_s, count, MASK)
    at_s = b.to(tl.int64) * S + offs_s
    at_grad = grad_memory_proj + at_s[:, None] * A + offs_a[None, :]
    inside = (offs_s < S)[:, None] & columns[None, :]
    slot = b.to(tl.int64) * s_blocks + s_block
    if s_block * BLOCK_S >= count:
        zeros = tl.zeros((BLOCK_S, BLOCK_A), grad_memory_proj.dtype.element_ty)
        tl.store(at_grad, zeros, mask=inside)
        tl.store(partial_v + slot * A + offs_a, tl.zeros((BLOCK_A,), tl.float32), mask=columns)
        return
    m = load_tile(memory_proj + b.to(tl.int64) * proj_b, proj_s, offs_s, rows, offs_a, A)
    m = m.to(tl.float32)
    if MASK == 2:
        m = tl.where(tl.abs(m) < float("inf"), m, 0.0)  # its scores are NaN where they count
    weight = 4.0 * tl.load(v + offs_a, mask=columns, other=0.0).to(tl.float32)
    index = tl.arange(0, BLOCKS)
    peaks = tl.load(query_peak + b * exp_queries + index, mask=index < exp_queries, other=0.0)
    others = tl.load(memory_peak + b * exp_source + index, mask=index < exp_source, other=0.0)
    paired = tl.max(peaks, axis=0) + tl.max(others, axis=0) < PAIR_LIMIT

    m = in_squares(m)
    exps = tl.exp2(m * TWO_LOG2E)
    grad_m = tl.zeros((BLOCK_S, BLOCK_A), tl.float32)
    grad_r = tl.zeros((BLOCK_S, BLOCK_A), tl.float32)
    grad_sum = tl.zeros((BLOCK_S,), tl.float32)
    at_score = grad_scores + b.to(tl.int64) * T * score_t + offs_s
    at_query = query_proj + b.to(tl.int64) * query_b + offs_a
    at_part = partial_query + slot * T * A + offs_a
    if paired:
        for t in range(0, T, 2):
            # As tensors: in the interpreter a loop counts in plain integers.
            second_rows = rows & (offs_s * 0 + (t + 1) < T)
            second = columns & (offs_a * 0 + (t + 1) < T)
            g0 = tl.load(at_score, mask=rows, other=0.0)
            g1 = tl.load(at_score + score_t, mask=second_rows, other=0.0)
            q0 = tl.load(at_query, mask=columns, other=0.0).to(tl.float32)
            q1 = tl.load(at_query + query_t, mask=second, other=0.0).to(tl.float32)
            x0 = 1.0 + tl.exp2(q0 * TWO_LOG2E)[None, :] * exps
            x1 = 1.0 + tl.exp2(q1 * TWO_LOG2E)[None, :] * exps
            both = reciprocal(x0 * x1, FAST_RCP)
            r0 = x1 * both
            r1 = x0 * both
            u0 = r0 - r0 * r0
            u1 = r1 - r1 * r1
            # Written so that every product ends in an addition: eleven multiply-adds for two terms.
            grad_m += g0[:, None] * u0
            grad_m += g1[:, None] * u1
            grad_r += g0[:, None] * r0
            grad_r += g1[:, None] * r1
            grad_sum += g0 + g1
            tl.store(at_part, weight * tl.sum(g0[:, None] * u0, axis=0), mask=columns)
            tl.store(at_part + A, weight * tl.sum(g1[:, None] * u1, axis=0), mask=second)
            at_score += 2 * score_t
            at_query += 2 * query_t
            at_part += 2 * A
    else:
        for _ in range(0, T):
            g = tl.load(at_score, mask=rows, other=0.0)
            q = tl.load(at_query, mask=columns, other=0.0).to(tl.float32)
            r = 1.0 / (1.0 + tl.exp2((q[None, :] + m) * TWO_LOG2E))
            gr = g[:, None] * r
            u = gr - gr * r
            grad_m += u
            grad_r += gr
            grad_sum += g
            tl.store(at_part, weight * tl.sum(u, axis=0), mask=columns)
            at_score += score_t
            at_query += query_t
            at_part += A
    grad = tl.where(rows[:, None], grad_m * weight[None, :], 0.0)
    tl.store(at_grad, grad.to(grad_memory_proj.dtype.element_ty), mask=inside)
    part = tl.sum(grad_sum, axis=0) - 2.0 * tl.sum(grad_r, axis=0)
    tl.store(partial_v + slot * A + offs_a, part, mask=columns)
