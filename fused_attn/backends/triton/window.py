"""Backward calls of local attention; the forward pass is the step kernel, a query at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn.backends.triton.call import WINDOW_GAUSSIAN, Call, Sums, enqueue
from fused_attn.kernels import launch
from fused_attn.kernels import window as kernels
from fused_attn.reference import Gradients


def backward(
    call: Call,
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    logsumexp: Tensor,
    scale: float,
    inputs: tuple[Tensor, Tensor] | None,
    wanted: list[bool],
) -> Gradients:
    """Gradients as `backward.dot` and `backward.concat` return them."""
    batch, queries, source, memory_dim, width = call.sizes
    masks, memory = call.masks, call.memory
    proj, v = inputs or (None, None)
    plan = launch.window(source, memory_dim, width if inputs else 1, backward=True)
    kept = call.floats(batch, queries, masks.width)
    grads = call.floats(batch, queries, masks.width)
    grad_query = memory.new_empty((batch, queries, width))
    grad_centers = call.floats(batch, queries) if masks.window == WINDOW_GAUSSIAN else None
    partial_v = None if v is None else call.floats(batch * queries, width)
    weights_strides = (0, 0, 0) if grad_weights is None else grad_weights.stride()
    results = (kept, grads, grad_query, grad_centers, partial_v)
    enqueue(
        kernels.window_backward,
        (batch * queries,),
        (
            *(call.query, memory, proj, v, masks.lengths, masks.mask, masks.keep),
            *(masks.centers, grad_context, grad_weights, logsumexp, *results),
        ),
        (
            *(*call.strides(call.query, memory, proj, grad_context), *weights_strides),
            *(masks.lengths_stride, *masks.strides, queries, source, *call.widths),
            *(float(scale), float(masks.keep_scale), masks.half_width, masks.rate, masks.width),
        ),
        CONCAT=inputs is not None,
        MASK=masks.mask_kind,
        WINDOW=masks.window,
        BLOCK_A=launch.power_of_2(width, 16) if inputs else 16,
        **plan.options,
        **call.unit,
    )
    sums = (call, kept, grads, grad_context)
    of_query = grad_query if wanted[0] else None
    of_centers = grad_centers if wanted[-1] else None
    if proj is None or v is None or partial_v is None:
        of_memory = _source(*sums, call.query, None, None) if wanted[1] else None
        return of_query, of_memory, of_centers
    of_proj = _source(*sums, call.query, proj, v) if wanted[1] else None
    of_v = torch.empty_like(v) if wanted[2] else None
    if of_v is not None:
        call.merge(Sums(None, None, partial_v=partial_v, grad_v=of_v))
    of_memory = _source(*sums, None, None, None) if wanted[3] else None
    return of_query, of_proj, of_v, of_memory, of_centers


def _source(
    call: Call,
    kept: Tensor,
    grads: Tensor,
    grad_context: Tensor | None,
    query: Tensor | None,
    proj: Tensor | None,
    v: Tensor | None,
) -> Tensor:
    """The gradient of the memory, or of its projection if that is given."""
    batch, queries, source, memory_dim, score_dim = call.sizes
    is_proj, masks = proj is not None, call.masks
    width = score_dim if is_proj else memory_dim
    plan = launch.window_source(width)
    out = call.memory.new_empty((batch, source, width))
    blocks = -(-source // plan.tiles["BLOCK_S"]) * -(-width // plan.tiles["BLOCK_E"])
    enqueue(
        kernels.window_source,
        (batch * blocks,),
        (
            *(kept, grads, query, grad_context, proj, v),
            *(masks.lengths, masks.mask, masks.centers, out),
        ),
        (
            *(*call.strides(query, grad_context, proj), masks.lengths_stride),
            *(masks.strides[0], masks.strides[2], queries, source),
            *(call.widths[1 if is_proj else 0], masks.half_width, masks.width),
        ),
        PROJ=is_proj,
        MASK=masks.mask_kind,
        **plan.options,
        **call.unit,
    )
    return out
