"""Backward calls: the kernel that reads the memory, the memory's gradient, the sums of splits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_attn import reference
from fused_attn.backends.triton import window
from fused_attn.backends.triton.call import (
    NOTHING,
    PITCH,
    Call,
    Factors,
    Sums,
    enqueue,
    factors_of,
    pitch,
    unit,
)
from fused_attn.kernels import backward, gradients, launch, step
from fused_attn.kernels import concat as concat_kernels
from fused_attn.reference import Gradients, MaskingFields, Saved


class _Incoming:
    """The gradients that arrive, and what the forward pass saved."""

    def __init__(
        self,
        call: Call,
        grad_context: Tensor | None,
        grad_weights: Tensor | None,
        saved: Saved,
        with_deltas: bool,
    ) -> None:
        self.context, self.weights, self.logsumexp = saved
        self.grad_context = grad_context
        self.grad_weights = grad_weights
        self.weights_strides = (0, 0, 0) if grad_weights is None else grad_weights.stride()
        self.deltas: Tensor | None = None
        if grad_weights is None or not with_deltas:
            return
        batch, queries, source, _, _ = call.sizes
        self.deltas = call.floats(batch, queries)
        tensors = (self.grad_context, grad_weights, self.context, self.weights, self.deltas)
        numbers = (*call.strides(grad_context), *self.weights_strides)
        numbers = (*numbers, queries, source, call.widths[0])
        programs = (batch * queries,)
        enqueue(backward.weight_deltas, programs, tensors, numbers, BLOCK=512, **call.unit)


def _needs_deltas(plan: launch.Plan) -> bool:
    """Whether no program sees all positions of a query, so that none could sum over them."""
    return plan.regime == "online" or (plan.regime == "columns" and plan.splits > 1)


def _step(
    call: Call, plan: launch.Plan, incoming: _Incoming, scale: float, wanted: list[bool]
) -> Gradients:
    batch, _, source, memory_dim, _ = call.sizes
    query, memory, masks = call.query, call.memory, call.masks
    grad_memory = memory.new_empty((batch, source, memory_dim)) if wanted[1] else None
    grad_query = memory.new_empty((batch, 1, memory_dim)) if wanted[0] else None
    part = grad_query
    if grad_query is not None and plan.splits > 1:
        part = call.floats(batch, plan.splits, 1, memory_dim)
    enqueue(
        step.step_backward,
        (batch * plan.splits,),
        (
            *(incoming.grad_context, incoming.grad_weights, query, memory),
            *(incoming.context, incoming.weights, incoming.logsumexp),
            *(masks.lengths, masks.mask, masks.keep, grad_memory, part),
        ),
        (
            *(call.strides(incoming.grad_context)[0], *incoming.weights_strides[::2]),
            *(call.strides(query)[0], *call.strides(memory), masks.lengths_stride),
            *(masks.strides[0], masks.strides[2], source, call.widths[0]),
            *(float(scale), float(masks.keep_scale), plan.splits, plan.segment),
        ),
        BLOCK_ROW=512,
        **plan.options,
        **call.unit,
    )
    if grad_query is not None and part is not None and plan.splits > 1:
        # Splits of padding alone wrote zeros.
        call.merge(Sums(part, grad_query, plan.splits, plan.segment))
    return grad_query, grad_memory, None


def _read_memory(
    call: Call,
    plan: launch.Plan,
    incoming: _Incoming,
    scale: float,
    inputs: Any,
    wants_query: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Factors, Sums]:
    """One pass over the memory: P, dS, and for dot, if it is wanted, the query's gradient.

    Rows of P and dS have `pitch` units. The sums over splits are still to be computed, and so is
    the query's gradient in the regime "columns".
    """
    batch, queries, source, memory_dim, _ = call.sizes
    memory, masks, block_t = call.memory, call.masks, plan.tiles["BLOCK_T"]
    units = pitch(source)
    row = units * PITCH
    kept = memory.new_empty((batch, queries, row))
    is_concat = inputs is not None
    # For concat dS is not an operand of a matrix product: it is stored in float32.
    grad_scores = call.floats(batch, queries, row) if is_concat else torch.empty_like(kept)
    grad_query: Tensor | None = None
    part: Tensor | None = None
    if wants_query:
        grad_query = memory.new_empty((batch, queries, memory_dim))
        part = None if plan.regime == "columns" else grad_query
        if plan.regime == "online" and plan.splits > 1:
            part = call.floats(batch, plan.splits, queries, memory_dim)
    back = (incoming.grad_context, incoming.grad_weights, incoming.context, incoming.deltas)
    results = (kept, grad_scores, part)
    where = (*call.strides(incoming.grad_context), *incoming.weights_strides)
    where = (*where, masks.lengths_stride, *masks.strides)
    scales = (float(scale), float(masks.keep_scale), plan.splits)
    programs = (batch * -(-queries // block_t) * plan.splits,)
    masking = (masks.lengths, masks.mask, masks.keep)
    ends = call.strides(call.query, memory)
    factors = Factors()
    options = {"MASK": masks.mask_kind, **plan.options, **call.unit, **call.precision}
    if plan.regime == "online":
        numbers = (*ends, *where, queries, source, call.widths[0], *scales, plan.segment, units)
        tensors = (call.query, memory, *masking, *back, incoming.logsumexp, *results)
        enqueue(backward.online_backward, programs, tensors, numbers, **options)
    else:
        proj, v = inputs or (None, None)
        if proj is not None:
            factors = factors_of(call, proj, block_t, plan.tiles["BLOCK_S"])
        enqueue(
            backward.rows_backward,
            programs,
            (
                *(call.query, memory, *factors.tensors, proj, v),
                *(*masking, *back, incoming.logsumexp, *results),
            ),
            (
                *(*ends, *call.strides(proj), *where),
                *(queries, source, *call.widths, *factors.sizes, *scales, units),
            ),
            CONCAT=is_concat,
            SPLIT=plan.splits > 1,
            **options,
            **call.fast,
        )
    sums = NOTHING
    if grad_query is not None and part is not None and plan.splits > 1:
        sums = Sums(part, grad_query, plan.splits, plan.segment)
    return kept, grad_scores, grad_query, factors, sums


def _query_plan(call: Call) -> tuple[launch.Plan, int]:
    """How the gradient of the query is computed from dS, and by how many programs."""
    batch, queries, _, memory_dim, _ = call.sizes
    plan = launch.context_columns(call.chip, call.sizes[:4], call.kind, backward=True)
    blocks = -(-queries // plan.tiles["BLOCK_T"]) * -(-memory_dim // plan.tiles["BLOCK_E"])
    return plan, batch * blocks


def _grad_query(call: Call, incoming: _Incoming, grad_scores: Tensor, grad_query: Tensor) -> None:
    """Compute the query's gradient in its own launch, for a memory that needs no gradient."""
    _, queries, source, _, _ = call.sizes
    masks, memory = call.masks, call.memory
    plan, programs = _query_plan(call)
    masking = (masks.lengths, masks.mask, masks.keep)
    enqueue(
        gradients.query_gradients,
        (programs,),
        (grad_scores, memory, incoming.context, *masking, grad_query),
        (
            *(*call.strides(memory), masks.lengths_stride, masks.strides[0], masks.strides[2]),
            *(queries, source, call.widths[0], pitch(source)),
        ),
        MASK=masks.mask_kind,
        **plan.options,
        **call.unit,
        **call.precision,
    )


def _grad_memory(
    call: Call,
    incoming: _Incoming,
    kept: Tensor,
    grad_scores: Tensor | None,
    sums: Sums,
    grad_query: Tensor | None,
) -> Tensor:
    """The gradient of the memory, and in the same launch the sums or the gradient of the query."""
    batch, queries, source, memory_dim, _ = call.sizes
    masks, query = call.masks, None if grad_scores is None else call.query
    plan = launch.source_gradients(memory_dim, call.kind)
    grad_memory = call.memory.new_empty((batch, source, memory_dim))
    blocks = -(-source // plan.tiles["BLOCK_S"]) * -(-memory_dim // plan.tiles["BLOCK_E"])
    others, numbers, programs = sums.arguments(batch)
    more: tuple[Tensor | None, ...] = (None,) * 4
    tiles = dict.fromkeys(("QUERY_T", "QUERY_S", "QUERY_E"), 16)
    if grad_query is not None:
        more = (call.memory, incoming.context, masks.keep, grad_query)
        second, programs = _query_plan(call)
        tiles = {name.replace("BLOCK", "QUERY"): size for name, size in second.tiles.items()}
    enqueue(
        gradients.source_gradients,
        (batch * blocks + programs,),
        (
            *(kept, grad_scores, incoming.grad_context, query, masks.lengths, masks.mask),
            *(grad_memory, *others, *more),
        ),
        (
            *(*call.strides(incoming.grad_context), *call.strides(query), masks.lengths_stride),
            *(masks.strides[0], masks.strides[2], queries, source, call.widths[0]),
            *(pitch(source), batch * blocks, *numbers, *call.strides(more[0])),
        ),
        MASK=masks.mask_kind,
        **plan.options,
        **tiles,
        **call.unit,
        **call.precision,
    )
    return grad_memory


def dot(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: MaskingFields,
    saved: Saved,
    wanted: list[bool],
) -> Gradients:
    with torch.cuda.device_of(memory):
        grad_context = None if grad_context is None else unit(grad_context)
        call = Call(query, memory, masking, "dot", (grad_context,))
        if call.masks.window:
            given = (grad_context, grad_weights, saved[2])
            return window.backward(call, *given, scale, None, wanted)
        plan = launch.backward(call.chip, "dot", call.sizes, call.kind)
        incoming = _Incoming(call, grad_context, grad_weights, saved, _needs_deltas(plan))
        if plan.regime == "step":
            return _step(call, plan, incoming, scale, wanted)
        found = _read_memory(call, plan, incoming, scale, None, wants_query=wanted[0])
        kept, grad_scores, grad_query, _, sums = found
        left = grad_query if plan.regime == "columns" else None
        grad_memory = _finish(call, incoming, kept, grad_scores, sums, left, wanted[1])
        return grad_query, grad_memory, None


def _finish(
    call: Call,
    incoming: _Incoming,
    kept: Tensor,
    grad_scores: Tensor | None,
    sums: Sums,
    grad_query: Tensor | None,
    wants_memory: bool,
) -> Tensor | None:
    """The last launch: the gradient of the memory if wanted, and whatever is left to compute."""
    if wants_memory:
        return _grad_memory(call, incoming, kept, grad_scores, sums, grad_query)
    if grad_query is not None and grad_scores is not None:
        _grad_query(call, incoming, grad_scores, grad_query)
    if sums is not NOTHING:
        call.merge(sums)
    return None


def _concat_grads(
    call: Call,
    memory_proj: Tensor,
    v: Tensor,
    grad_scores: Tensor,
    factors: Factors,
    wanted: list[bool],
) -> tuple[Gradients, Sums]:
    """Gradients of both projections from those of the scores, and parts of the gradient of v.

    grad_scores (B, T, S or more), contiguous.
    """
    batch, queries, source, _, width = call.sizes
    masks, plan = call.masks, launch.concat_gradients(width, call.kind)
    t_blocks = -(-queries // plan.tiles["BLOCK_T"]) if wanted[0] else 0
    s_blocks = -(-source // plan.tiles["BLOCK_S"])
    grad_query = call.memory.new_empty((batch, queries, width)) if wanted[0] else None
    grad_proj = call.memory.new_empty((batch, source, width))
    partial_v, grad_v = call.floats(batch * s_blocks, width), torch.empty_like(v)
    peaks = factors.sizes[1:]
    enqueue(
        concat_kernels.concat_gradients,
        (batch * (t_blocks + s_blocks) * -(-width // plan.tiles["BLOCK_A"]),),
        (
            *(grad_scores, call.query, memory_proj, v, factors.query_peak, factors.memory_peak),
            *(masks.lengths, masks.mask, grad_query, grad_proj, partial_v),
        ),
        (
            *(*call.strides(call.query), *call.strides(memory_proj), masks.lengths_stride),
            *(masks.strides[0], masks.strides[2], queries, source, call.widths[1], *peaks),
            grad_scores.shape[2],
        ),
        MASK=masks.mask_kind,
        BLOCKS=launch.power_of_2(max(peaks), 64),
        **plan.options,
        **call.unit,
        **call.fast,
    )
    found = (grad_query, grad_proj if wanted[1] else None, grad_v if wanted[2] else None)
    return found, Sums(None, None, partial_v=partial_v, grad_v=grad_v)


def concat_scores(
    grad_scores: Tensor,
    query_proj: Tensor,
    memory_proj: Tensor,
    v: Tensor,
    masking: MaskingFields,
    wanted: list[bool],
) -> Gradients:
    with torch.cuda.device_of(memory_proj):
        memory_proj, v = unit(memory_proj), v.contiguous()
        call = Call(query_proj, memory_proj, masking, "concat", (memory_proj,))
        plan = launch.rows(call.chip, call.sizes[:4], call.kind, is_concat=True, backward=True)
        # A position that does not count has no gradient, whatever is stored there.
        hidden = ~reference.counted_positions(memory_proj, masking)
        grads = grad_scores.masked_fill(hidden, 0.0).contiguous()
        factors = factors_of(call, memory_proj, plan.tiles["BLOCK_T"], plan.tiles["BLOCK_S"])
        found, sums = _concat_grads(call, memory_proj, v, grads, factors, wanted)
        call.merge(sums)
        return found


def concat(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query_proj: Tensor,
    memory_proj: Tensor,
    v: Tensor,
    memory: Tensor,
    masking: MaskingFields,
    saved: Saved,
    wanted: list[bool],
) -> Gradients:
    with torch.cuda.device_of(memory):
        grad_context = None if grad_context is None else unit(grad_context)
        memory_proj, v = unit(memory_proj), v.contiguous()
        call = Call(query_proj, memory, masking, "concat", (grad_context, memory_proj))
        if call.masks.window:
            inputs = (memory_proj, v)
            given = (grad_context, grad_weights, saved[2])
            return window.backward(call, *given, 1.0, inputs, wanted)
        plan = launch.backward(call.chip, "concat", call.sizes, call.kind)
        incoming = _Incoming(call, grad_context, grad_weights, saved, _needs_deltas(plan))
        inputs = (memory_proj, v)
        found = _read_memory(call, plan, incoming, 1.0, inputs, wants_query=False)
        kept, grad_scores, _, factors, sums = found
        grads: Gradients = (None, None, None)
        if any(wanted[:3]):
            grads, sums = _concat_grads(call, memory_proj, v, grad_scores, factors, wanted)
        grad_memory = _finish(call, incoming, kept, None, sums, None, wanted[3])
        return *grads, grad_memory, None
