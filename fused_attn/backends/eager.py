"""The reference as a backend: every device, every floating dtype, no native code.

The backward is written out. It cannot be left to autograd, because an operator may run where the
dispatcher has switched autograd off (below a `TorchDispatchMode`, for one).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn import reference
from fused_attn.problem import AttentionProblem
from fused_attn.reference import Attention, Masking, MaskingFields, Outputs, Saved


def unavailable_reasons() -> list[str]:
    return []


def not_supported_reasons(problem: AttentionProblem) -> list[str]:
    if not problem.dtype.is_floating_point:
        return [f"dtype {problem.dtype} is not a floating-point type"]
    return []


def _outputs(
    result: Attention, dtype: torch.dtype, return_weights: bool, return_logsumexp: bool
) -> Outputs:
    return (
        result.context.to(dtype).contiguous(),
        result.weights.to(dtype).contiguous() if return_weights else None,
        result.logsumexp.contiguous() if return_logsumexp else None,
    )


def _score_gradients(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    result: Attention,
    clean: Tensor,
    counts: Tensor,
    masking: Masking,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the scores, the weights after dropout, and grad_context, widened.

    With P the weights and dP their gradient: dS = P (dP - sum_s P dP), 0 where nothing counts.
    """
    grad = result.context.new_zeros(()) if grad_context is None else grad_context
    grad = grad.to(clean.dtype).expand_as(result.context)
    kept, grad_kept = result.weights, grad @ clean.mT
    if masking.keep_mask is not None:
        kept = kept * masking.keep_mask * masking.keep_scale
        grad_kept = grad_kept * masking.keep_mask * masking.keep_scale
    grad_weight = grad_kept if grad_weights is None else grad_kept + grad_weights
    weighted = (result.weights * grad_weight).masked_fill(~counts, 0.0)
    grad_scores = result.weights * (grad_weight - weighted.sum(dim=-1, keepdim=True))
    return grad_scores.masked_fill(~counts, 0.0), kept, grad


def dot_forward(
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: MaskingFields,
    return_weights: bool,
    return_logsumexp: bool,
) -> Outputs:
    reference.check_lengths(masking[0], memory)
    result = reference.dot_attention(query, memory, scale, Masking(*masking))
    return _outputs(result, memory.dtype, return_weights, return_logsumexp)


def dot_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: MaskingFields,
    saved: Saved,
) -> tuple[Tensor, ...]:
    masks = Masking(*masking)
    result = reference.dot_attention(query, memory, scale, masks)
    counts = reference.counted_positions(memory, masks)
    clean, _ = reference.readable(memory.to(result.scores.dtype), counts)
    grad_scores, kept, grad = _score_gradients(
        grad_context, grad_weights, result, clean, counts, masks
    )
    grad_scores = scale * grad_scores
    grad_query = grad_scores @ clean
    grad_memory = kept.mT @ grad + grad_scores.mT @ query.to(clean.dtype)
    return grad_query.to(query.dtype).contiguous(), grad_memory.to(memory.dtype).contiguous()


def concat_forward(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: MaskingFields,
    return_weights: bool,
    return_logsumexp: bool,
) -> Outputs:
    reference.check_lengths(masking[0], memory)
    result = reference.concat_attention(query_proj, memory_proj, v, memory, Masking(*masking))
    return _outputs(result, memory.dtype, return_weights, return_logsumexp)


def concat_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: MaskingFields,
    saved: Saved,
) -> tuple[Tensor, ...]:
    masks = Masking(*masking)
    result = reference.concat_attention(query_proj, memory_proj, v, memory, masks)
    counts = reference.counted_positions(memory, masks)
    dtype = result.scores.dtype
    clean, _ = reference.readable(memory.to(dtype), counts)
    projection, _ = reference.readable(memory_proj.to(dtype), counts)
    grad_scores, kept, grad = _score_gradients(
        grad_context, grad_weights, result, clean, counts, masks
    )
    tanh = torch.tanh(query_proj.to(dtype)[:, :, None] + projection[:, None])
    grad_v = (grad_scores[..., None] * tanh).sum(dim=(0, 1, 2))
    grad_sum = grad_scores[..., None] * v.to(dtype) * (1.0 - tanh * tanh)  # of q + m
    grads = (grad_sum.sum(dim=2), grad_sum.sum(dim=1), grad_v, kept.mT @ grad)
    inputs = (query_proj, memory_proj, v, memory)
    return tuple(g.to(x.dtype).contiguous() for g, x in zip(grads, inputs, strict=True))
