"""The concat score v . tanh(q + m) by factored exponentials, without a (B, T, S, A) tensor.

With x = 1 + exp(2q) exp(2m) and r = 1 / x:  tanh(q + m) = 1 - 2r  and  1 - tanh^2 = 4 (r - r^2).
The exponentials are computed once for each of the T + S rows; the T S A inner loop is one
multiply-add, half of a reciprocal and two more operations. Two terms share one reciprocal,
v0 / x0 + v1 / x1 = (v0 x1 + v1 x0) / (x0 x1): otherwise the special-function unit, with 16 results
a clock against 128 multiply-adds, would be the limit.

The product of two x overflows when q + m exceeds 22, one exponential when |q| or |m| exceeds 43.
So `concat_exponentials` also stores the largest |q| or |m| of each block of rows, the block's peak.
A tile whose peaks exceed PAIR_LIMIT takes a loop with the exponential of the sum, which is correct
for all inputs.
"""

import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    MASK_PER_QUERY,
    MASK_SHARED,
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
EXP_COLUMNS = tl.constexpr(8)  # the number of prepared columns is a multiple of this
EXP_ROWS = tl.constexpr(16)  # rows that share a peak; prepared tiles have a multiple of them
OTHER_ROWS = tl.constexpr(4)  # rows of the other side in an iteration of the gradients' loop
PAIR_LIMIT = tl.constexpr(21.0)  # of max |q| + max |m|: both x then stay below 1e19


@triton.jit
def reciprocal(x, FAST_RCP: tl.constexpr):
    """1 / x. On NVIDIA one instruction: a division adds five for cases that cannot occur here."""
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

    They are laid out for reading by columns, (B, exp_width, rows), with ``exp_queries`` EXP_ROWS
    rows for the queries and ``exp_source`` EXP_ROWS for the memory. Rows that may not be read, and
    padding beyond T, S and A, become 0: x = 1 there. The peaks (B, exp_queries) and
    (B, exp_source) are the largest |q| and |m| of EXP_ROWS rows, inf if one is not finite.
    """
    query_b, query_t = elements(query_b, UNIT), elements(query_t, UNIT)
    proj_b, proj_s, A = elements(proj_b, UNIT), elements(proj_s, UNIT), A * UNIT
    of_queries = tl.cdiv(exp_queries * EXP_ROWS, BLOCK_R)
    programs = of_queries + tl.cdiv(exp_source * EXP_ROWS, BLOCK_R)
    b = tl.program_id(0) // programs
    block = tl.program_id(0) % programs
    b64 = b.to(tl.int64)
    if block < of_queries:
        offs_t = block * BLOCK_R + tl.arange(0, BLOCK_R)
        exp_query += b64 * exp_width * exp_queries * EXP_ROWS
        exponential_rows(
            query + b64 * query_b, offs_t < T, offs_t, exp_query, query_peak + b64 * exp_queries,
            query_t, A, exp_width, exp_queries * EXP_ROWS, BLOCK_R, BLOCK_A,
        )  # fmt: skip
    else:
        offs_s = (block - of_queries) * BLOCK_R + tl.arange(0, BLOCK_R)
        count = row_count(lengths, lengths_stride, b, S)
        rows = readable_rows(mask, mask_b, mask_s, b, offs_s, count, MASK)
        if MASK == MASK_PER_QUERY:  # a row that no query sees may hold anything: not in the peak
            looks = mask + b64 * mask_b + offs_s.to(tl.int64) * mask_s
            wanted = tl.zeros((BLOCK_R,), tl.int32)
            for _ in range(0, T):
                wanted |= tl.load(looks, mask=rows, other=0).to(tl.int32)
                looks += mask_t
            rows = rows & (wanted != 0)
        exp_memory += b64 * exp_width * exp_source * EXP_ROWS
        exponential_rows(
            memory_proj + b64 * proj_b, rows, offs_s, exp_memory, memory_peak + b64 * exp_source,
            proj_s, A, exp_width, exp_source * EXP_ROWS, BLOCK_R, BLOCK_A,
        )  # fmt: skip


@triton.jit
def concat_scores(
    exp_query, exp_memory, query_peak, memory_peak, query, memory_proj, v,
    b, t_block, s_block, offs_t, offs_s, queries, rows,
    query_t, proj_s, A, exp_width, exp_queries, exp_source,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, FAST_RCP: tl.constexpr,
):  # fmt: skip
    """The scores (BLOCK_T, BLOCK_S) of a tile, and with a per-query mask the rows with inf or NaN.

    ``query`` and ``memory_proj`` point to the rows of batch row b; exp_width is a multiple of
    EXP_COLUMNS, exp_queries and exp_source are in units of EXP_ROWS.
    """
    acc = in_squares(tl.zeros((BLOCK_T, BLOCK_S), tl.float32))
    spoiled = offs_s < 0
    weight_sum = 0.0
    each_t = tl.arange(0, BLOCK_T // EXP_ROWS)
    each_s = tl.arange(0, BLOCK_S // EXP_ROWS)
    high_query = tl.load(query_peak + b * exp_queries + t_block * (BLOCK_T // EXP_ROWS) + each_t)
    high_memory = tl.load(memory_peak + b * exp_source + s_block * (BLOCK_S // EXP_ROWS) + each_s)
    exp_queries, exp_source = exp_queries * EXP_ROWS, exp_source * EXP_ROWS
    if tl.max(high_query, axis=0) + tl.max(high_memory, axis=0) < PAIR_LIMIT:
        at_query = exp_query + b.to(tl.int64) * exp_width * exp_queries + offs_t
        at_memory = exp_memory + b.to(tl.int64) * exp_width * exp_source + offs_s
        for a in range(0, exp_width, EXP_COLUMNS):
            # Unrolled, so that the loads of all pairs are issued before the first is used.
            for pair in tl.static_range(EXP_COLUMNS // 2):
                v0 = tl.load(v + a + 2 * pair, mask=a + 2 * pair < A, other=0.0).to(tl.float32)
                v1 = tl.load(v + a + 2 * pair + 1, mask=a + 2 * pair + 1 < A, other=0.0)
                v1 = v1.to(tl.float32)
                q0 = tl.load(at_query + 2 * pair * exp_queries)
                q1 = tl.load(at_query + (2 * pair + 1) * exp_queries)
                m0 = tl.load(at_memory + 2 * pair * exp_source)
                m1 = tl.load(at_memory + (2 * pair + 1) * exp_source)
                x0 = 1.0 + q0[:, None] * m0[None, :]
                x1 = 1.0 + q1[:, None] * m1[None, :]
                acc += (v0 * x1 + v1 * x0) * reciprocal(x0 * x1, FAST_RCP)
                weight_sum += v0 + v1
            at_query += EXP_COLUMNS * exp_queries
            at_memory += EXP_COLUMNS * exp_source
    else:
        plain_query = query + offs_t.to(tl.int64) * query_t
        plain_memory = memory_proj + offs_s.to(tl.int64) * proj_s
        for a in range(0, A):
            weight = tl.load(v + a).to(tl.float32)
            q = tl.load(plain_query + a, mask=queries, other=0.0).to(tl.float32)
            m = tl.load(plain_memory + a, mask=rows, other=0.0).to(tl.float32)
            if MASK == MASK_PER_QUERY:
                spoiled = spoiled | (tl.abs(m) >= float("inf")) | (m != m)
            x = 1.0 + tl.exp2((q[:, None] + m[None, :]) * TWO_LOG2E)
            acc += weight / x
            weight_sum += weight
    return weight_sum - 2.0 * acc, spoiled


@entry
def concat_scores_only(
    query, memory_proj, exp_query, exp_memory, query_peak, memory_peak, v, lengths, mask, scores,
    query_b, query_t, proj_b, proj_s, lengths_stride, mask_b, mask_t, mask_s,
    T, S, A, exp_width, exp_queries, exp_source, splits,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, FAST_RCP: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """A tile of scores (B, T, S) in float32, -inf at masked positions."""
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
    result, spoiled = concat_scores(
        exp_query, exp_memory, query_peak, memory_peak, query + b.to(tl.int64) * query_b,
        memory_proj + b.to(tl.int64) * proj_b, v, b, t_block, split, offs_t, offs_s, queries, rows,
        query_t, proj_s, A, exp_width, exp_queries, exp_source, MASK, BLOCK_T, BLOCK_S, FAST_RCP,
    )  # fmt: skip
    inside = queries[:, None] & (offs_s < S)[None, :]
    at = pair_tile(scores, b, offs_t, offs_s, T, S)
    tl.store(at, hide(result, counts, spoiled, MASK), mask=inside)


@triton.jit
def other_row(at_other, other_mask, mask_step, other, end, columns, BLOCK_A: tl.constexpr):
    """Columns of row ``other`` of a projection, 0 past the end and where the mask hides the row."""
    # As a vector: in the interpreter a loop variable is a plain integer.
    place = tl.zeros((BLOCK_A,), tl.int32) + other
    inside = columns & (place < end)
    if other_mask is not None:
        at_mask = other_mask + place.to(tl.int64) * mask_step
        inside = inside & (tl.load(at_mask, mask=inside, other=0) != 0)
    return finite_or_zero(tl.load(at_other, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def gradient_rows(
    exps, plain, at_grad, at_other, rows, columns, other_mask, mask_step, grad_step, other_step,
    end, paired,
    BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr, WITH_V: tl.constexpr, FAST_RCP: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of the other side: of g (r - r^2), and with WITH_V of g r and of g.

    ``plain`` (BLOCK_R, BLOCK_A) are the rows of one projection that a program owns, ``exps`` are
    exp(2 plain). at_grad and at_other point to the first of the ``end`` rows of the other side;
    rows that its mask hides are not read. Nothing is summed across threads: each has its own
    elements.
    """
    grad = tl.zeros((BLOCK_R, BLOCK_A), tl.float32)
    grad_r = tl.zeros((BLOCK_R, BLOCK_A), tl.float32)
    grad_sum = tl.zeros((BLOCK_R,), tl.float32)
    none = tl.zeros((BLOCK_R,), tl.int32)
    if paired:
        for start in range(0, end, OTHER_ROWS):
            for pair in tl.static_range(OTHER_ROWS // 2):
                o = start + 2 * pair
                at_g = at_grad + 2 * pair * grad_step
                at_y = at_other + 2 * pair * other_step
                g0 = tl.load(at_g, mask=rows & (none + o < end), other=0.0)
                g1 = tl.load(at_g + grad_step, mask=rows & (none + (o + 1) < end), other=0.0)
                y0 = other_row(at_y, other_mask, mask_step, o, end, columns, BLOCK_A)
                at_y += other_step
                y1 = other_row(at_y, other_mask, mask_step, o + 1, end, columns, BLOCK_A)
                x0 = 1.0 + tl.exp2(y0 * TWO_LOG2E)[None, :] * exps
                x1 = 1.0 + tl.exp2(y1 * TWO_LOG2E)[None, :] * exps
                both = reciprocal(x0 * x1, FAST_RCP)
                r0 = x1 * both
                r1 = x0 * both
                # Written so that every product ends in an addition.
                grad += g0[:, None] * (r0 - r0 * r0)
                grad += g1[:, None] * (r1 - r1 * r1)
                if WITH_V:
                    grad_r += g0[:, None] * r0
                    grad_r += g1[:, None] * r1
                    grad_sum += g0 + g1
            at_grad += OTHER_ROWS * grad_step
            at_other += OTHER_ROWS * other_step
    else:
        for o in range(0, end):
            g = tl.load(at_grad, mask=rows, other=0.0)
            y = other_row(at_other, other_mask, mask_step, o, end, columns, BLOCK_A)
            r = 1.0 / (1.0 + tl.exp2((y[None, :] + plain) * TWO_LOG2E))
            gr = g[:, None] * r
            grad += gr - gr * r
            if WITH_V:
                grad_r += gr
                grad_sum += g
            at_grad += grad_step
            at_other += other_step
    return grad, grad_r, grad_sum


@triton.jit
def finite_or_zero(x):
    """x with infinities and NaN set to 0: where they count, scores and their gradients are NaN."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def peak_of_batch_row(query_peak, memory_peak, exp_queries, exp_source, BLOCKS: tl.constexpr):
    """The largest |q| of a batch row plus its largest |m|."""
    index = tl.arange(0, BLOCKS)
    peaks = tl.load(query_peak + index, mask=index < exp_queries, other=0.0)
    others = tl.load(memory_peak + index, mask=index < exp_source, other=0.0)
    return tl.max(peaks, axis=0) + tl.max(others, axis=0)


@entry
def concat_gradients(
    grad_scores, query_proj, memory_proj, v, query_peak, memory_peak, lengths, mask,
    grad_query_proj, grad_memory_proj, partial_v,
    query_b, query_t, proj_b, proj_s, lengths_stride, mask_b, mask_s,
    T, S, A, exp_queries, exp_source, score_t,
    MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCKS: tl.constexpr, FAST_RCP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Gradients of both projections and of v from those of the scores, grad_scores (B, T, score_t).

    A program owns BLOCK_T rows of the query's projection, or BLOCK_S of the memory's, and BLOCK_A
    columns, and processes all rows of the other side in pairs, so that two terms share a
    reciprocal. tanh(q + m) is symmetric: both sides run the same code. Each term is computed twice,
    which is cheaper than a sum across threads for every row and its traffic. The gradient of v is
    left in parts, partial_v (B blocks, A). An output that is not wanted is None.
    """
    query_b, query_t = elements(query_b, UNIT), elements(query_t, UNIT)
    proj_b, proj_s = elements(proj_b, UNIT), elements(proj_s, UNIT)
    A = A * UNIT
    a_blocks = tl.cdiv(A, BLOCK_A)
    t_blocks = tl.cdiv(T, BLOCK_T)
    s_blocks = tl.cdiv(S, BLOCK_S)
    if grad_query_proj is None:
        t_blocks = 0 * t_blocks
    batch_rows = tl.num_programs(0) // (a_blocks * (t_blocks + s_blocks))
    a_block = tl.program_id(0) % a_blocks
    block = tl.program_id(0) // a_blocks
    offs_a = a_block * BLOCK_A + tl.arange(0, BLOCK_A)
    columns = offs_a < A
    weight = 4.0 * tl.load(v + offs_a, mask=columns, other=0.0).to(tl.float32)
    # Programs of the query side first: each processes S rows, the others T.
    if block < batch_rows * t_blocks:
        b = (block // t_blocks).to(tl.int64)
        offs_t = (block % t_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
        queries = offs_t < T
        count = row_count(lengths, lengths_stride, b, S)
        q = load_tile(query_proj + b * query_b, query_t, offs_t, queries, offs_a, A).to(tl.float32)
        q = in_squares(finite_or_zero(q))
        peak = peak_of_batch_row(
            query_peak + b * exp_queries, memory_peak + b * exp_source, exp_queries, exp_source,
            BLOCKS,
        )  # fmt: skip
        hidden = None
        if MASK == MASK_SHARED:
            hidden = mask + b * mask_b
        grad_q, _, _ = gradient_rows(
            tl.exp2(q * TWO_LOG2E), q, grad_scores + (b * T + offs_t) * score_t,
            memory_proj + b * proj_b + offs_a, queries, columns, hidden, mask_s, 1, proj_s,
            count, peak < PAIR_LIMIT, BLOCK_T, BLOCK_A, WITH_V=False, FAST_RCP=FAST_RCP,
        )  # fmt: skip
        grad_q *= weight[None, :]
        at_q = grad_query_proj + (b * T + offs_t)[:, None] * A + offs_a[None, :]
        inside_q = queries[:, None] & columns[None, :]
        tl.store(at_q, grad_q.to(grad_query_proj.dtype.element_ty), mask=inside_q)
    else:
        block -= batch_rows * t_blocks
        b = (block // s_blocks).to(tl.int64)
        offs_s = (block % s_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
        count = row_count(lengths, lengths_stride, b, S)
        rows = readable_rows(mask, mask_b, mask_s, b, offs_s, count, MASK)
        m = load_tile(memory_proj + b * proj_b, proj_s, offs_s, rows, offs_a, A).to(tl.float32)
        m = in_squares(finite_or_zero(m))
        peak = peak_of_batch_row(
            query_peak + b * exp_queries, memory_peak + b * exp_source, exp_queries, exp_source,
            BLOCKS,
        )  # fmt: skip
        end = T
        if (block % s_blocks) * BLOCK_S >= count:
            end = 0 * T  # padding has zeros
        grad_m, grad_r, grad_sum = gradient_rows(
            tl.exp2(m * TWO_LOG2E), m, grad_scores + b * T * score_t + offs_s,
            query_proj + b * query_b + offs_a, rows, columns, None, 0, score_t, query_t,
            end, peak < PAIR_LIMIT, BLOCK_S, BLOCK_A, WITH_V=True, FAST_RCP=FAST_RCP,
        )  # fmt: skip
        grad_m = tl.where(rows[:, None], grad_m * weight[None, :], 0.0)
        at_m = grad_memory_proj + (b * S + offs_s)[:, None] * A + offs_a[None, :]
        inside_m = (offs_s < S)[:, None] & columns[None, :]
        tl.store(at_m, grad_m.to(grad_memory_proj.dtype.element_ty), mask=inside_m)
        part = tl.sum(grad_sum, axis=0) - 2.0 * tl.sum(grad_r, axis=0)
        slot = (b * s_blocks + block % s_blocks) * A + offs_a
        tl.store(partial_v + slot, part, mask=columns)
