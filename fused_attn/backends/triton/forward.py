"""Forward calls: the plan of the launch table, and its kernel with or without a merge of splits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_attn.backends.triton.call import (
    PITCH,
    Call,
    Factors,
    enqueue,
    factors_of,
    pitch,
    unit,
)
from fused_attn.kernels import columns, forward, launch, step
from fused_attn.kernels import concat as concat_kernels
from fused_attn.reference import MaskingFields, Outputs


def _forward(
    call: Call,
    scale: float,
    concat_inputs: tuple[Tensor, Tensor | None, Tensor] | None,
    return_weights: bool,
    return_logsumexp: bool,
) -> Outputs:
    batch, queries, source, memory_dim, width = call.sizes
    if not call.masks.window:
        plan = launch.forward(call.chip, call.score, call.sizes, call.kind)
    else:
        plan = launch.window(source, memory_dim, width if concat_inputs else 1)
    memory = call.memory
    context = memory.new_empty((batch, queries, memory_dim))
    weights = memory.new_empty((batch, queries, source)) if return_weights else None
    logsumexp = call.floats(batch, queries) if return_logsumexp else None
    results = (context, weights, logsumexp)
    if plan.regime == "rows":
        _rows_forward(call, plan, scale, results)
        return results
    if plan.regime == "columns":
        _columns_forward(call, plan, scale, concat_inputs, results)
        return results
    # The sum of an online softmax is known only after the last tile, so the merge writes weights.
    run = _step_forward if plan.regime == "step" else _online_forward
    if plan.splits == 1 and not return_weights:
        run(call, plan, scale, concat_inputs, (context, None, logsumexp, None), is_split=False)
        return results
    partial = call.floats(batch, plan.splits, queries, memory_dim)
    stats = call.floats(batch, plan.splits, queries, 2)
    scores = call.floats(batch, queries, source) if return_weights else None
    run(call, plan, scale, concat_inputs, (partial, None, stats, scores), is_split=True)
    _merge(call, plan, (partial, stats, scores), results)
    return results


def _merge(call: Call, plan: Any, parts: tuple[Any, ...], results: tuple[Any, ...]) -> None:
    batch, queries, source, memory_dim, _ = call.sizes
    masks, width = call.masks, max(memory_dim, source if parts[2] is not None else 0)
    block = 512 if width <= 512 else 1024
    sizes = (masks.lengths_stride, queries, source, call.widths[0])
    splits = (masks.half_width, masks.rate, plan.splits, plan.segment)
    enqueue(
        forward.merge_forward,
        (batch * queries * -(-width // block),),
        (*parts, masks.lengths, masks.centers, *results),
        (*sizes, *splits),
        WINDOW=masks.window,
        BLOCK_SPLITS=launch.power_of_2(plan.splits, 16),
        BLOCK=block,
        **call.unit,
    )


def _step_forward(
    call: Call, plan: Any, scale: float, inputs: Any, results: tuple[Any, ...], is_split: bool
) -> None:
    batch, queries, source, _, width = call.sizes
    masks = call.masks
    proj, exps, v = inputs or (None, None, None)
    masking = (masks.lengths, masks.mask, masks.keep, masks.centers)
    steps = call.strides(call.query, call.memory, exps, proj)
    enqueue(
        step.step_forward,
        (batch * queries * plan.splits,),
        (call.query, call.memory, exps, proj, v, *masking, *results),
        (
            *(*steps, masks.lengths_stride, *masks.strides),
            *(queries, source, *call.widths, float(scale), float(masks.keep_scale)),
            *(masks.half_width, masks.rate, plan.splits, plan.segment),
        ),
        CONCAT=inputs is not None,
        MASK=masks.mask_kind,
        SPLIT=is_split,
        WINDOW=masks.window,
        BLOCK_A=launch.power_of_2(width, 16) if inputs else 16,
        **plan.options,
        **call.unit,
        **call.fast,
    )


def _rows_forward(call: Call, plan: Any, scale: float, results: tuple[Any, ...]) -> None:
    batch, queries, source, _, _ = call.sizes
    masks = call.masks
    enqueue(
        forward.rows_forward,
        (batch * -(-queries // plan.tiles["BLOCK_T"]),),
        (call.query, call.memory, masks.lengths, masks.mask, masks.keep, *results),
        (
            *(*call.strides(call.query, call.memory), masks.lengths_stride, *masks.strides),
            *(queries, source, call.widths[0], float(scale), float(masks.keep_scale)),
        ),
        MASK=masks.mask_kind,
        **plan.options,
        **call.unit,
        **call.precision,
    )


def _columns_forward(
    call: Call, plan: Any, scale: float, inputs: Any, results: tuple[Any, ...]
) -> None:
    batch, queries, source, memory_dim, _ = call.sizes
    masks, block_t = call.masks, plan.tiles["BLOCK_T"]
    scores = call.floats(batch, queries, pitch(source) * PITCH)
    stats = call.floats(batch, plan.splits, queries, 2)
    proj, _, v = inputs or (None, None, None)
    factors = Factors()
    if proj is not None:
        factors = factors_of(call, proj, block_t, plan.tiles["BLOCK_S"])
    masking = (masks.lengths, masks.mask)
    steps = (*call.strides(call.query, call.memory, proj), masks.lengths_stride)
    enqueue(
        columns.score_rows,
        (batch * -(-queries // block_t) * plan.splits,),
        (call.query, call.memory, *factors.tensors, proj, v, *masking, scores, stats),
        (
            *(*steps, *masks.strides),
            *(queries, source, *call.widths, *factors.sizes, float(scale), plan.splits),
            pitch(source),
        ),
        CONCAT=inputs is not None,
        MASK=masks.mask_kind,
        **plan.options,
        **call.unit,
        **call.precision,
        **call.fast,
    )
    second = launch.context_columns(call.chip, call.sizes[:4], call.kind)
    blocks = -(-queries // second.tiles["BLOCK_T"]) * -(-memory_dim // second.tiles["BLOCK_E"])
    enqueue(
        columns.context_columns,
        (batch * blocks,),
        (scores, stats, call.memory, *masking, masks.keep, *results),
        (
            *(*call.strides(call.memory), masks.lengths_stride, masks.strides[0], masks.strides[2]),
            *(queries, source, call.widths[0], float(masks.keep_scale), plan.splits, plan.segment),
            pitch(source),
        ),
        MASK=masks.mask_kind,
        BLOCKS=min(launch.power_of_2(plan.splits, 16), 32),
        **second.options,
        **call.unit,
        **call.precision,
    )


def _online_forward(
    call: Call, plan: Any, scale: float, inputs: Any, results: tuple[Any, ...], is_split: bool
) -> None:
    batch, queries, source, _, _ = call.sizes
    masks = call.masks
    steps = (*call.strides(call.query, call.memory), masks.lengths_stride, *masks.strides)
    sizes = (queries, source, call.widths[0], float(scale), float(masks.keep_scale))
    enqueue(
        forward.online_forward,
        (batch * -(-queries // plan.tiles["BLOCK_T"]) * plan.splits,),
        (call.query, call.memory, masks.lengths, masks.mask, masks.keep, *results),
        (*steps, *sizes, plan.splits, plan.segment),
        MASK=masks.mask_kind,
        SPLIT=is_split,
        **plan.options,
        **call.unit,
        **call.precision,
    )


def dot(
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: MaskingFields,
    return_weights: bool,
    return_logsumexp: bool,
) -> Outputs:
    with torch.cuda.device_of(memory):
        call = Call(query, memory, masking, "dot")
        return _forward(call, scale, None, return_weights, return_logsumexp)


def concat_scores(
    query_proj: Tensor, memory_proj: Tensor, v: Tensor, masking: MaskingFields
) -> Tensor:
    with torch.cuda.device_of(memory_proj):
        proj, v = unit(memory_proj), v.contiguous()
        call = Call(query_proj, proj, masking, "concat", (proj,))
        batch, queries, source, width, _ = call.sizes
        sizes = (batch, queries, source, width)
        plan = launch.rows(call.chip, sizes, call.kind, is_concat=True, backward=False)
        masks = call.masks
        block_t, block_s = plan.tiles["BLOCK_T"], plan.tiles["BLOCK_S"]
        factors = factors_of(call, proj, block_t, block_s)
        scores = call.floats(batch, queries, source)
        enqueue(
            concat_kernels.concat_scores_only,
            (batch * -(-queries // block_t) * plan.splits,),
            (call.query, proj, *factors.tensors, v, masks.lengths, masks.mask, scores),
            (
                *(*call.strides(call.query, proj), masks.lengths_stride, *masks.strides),
                *(queries, source, call.widths[1], *factors.sizes, plan.splits),
            ),
            MASK=masks.mask_kind,
            BLOCK_T=block_t,
            BLOCK_S=block_s,
            num_warps=plan.num_warps,
            **call.unit,
            **call.fast,
        )
        return scores


def concat(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: MaskingFields,
    return_weights: bool,
    return_logsumexp: bool,
) -> Outputs:
    with torch.cuda.device_of(memory):
        exps = None if memory_exp is None else unit(memory_exp)
        inputs = (unit(memory_proj), exps, v.contiguous())
        call = Call(query_proj, memory, masking, "concat", inputs[:2])
        return _forward(call, 1.0, inputs, return_weights, return_logsumexp)
