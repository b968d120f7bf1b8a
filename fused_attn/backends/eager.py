"""The reference as a backend: every device, every floating dtype, no native code.

The backward is written out. It cannot be left to autograd, because an operator may run where the
dispatcher has switched autograd off (below a `TorchDispatchMode`, for one).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn import reference
from fused_attn.problem import AttentionProblem
from fused_attn.reference import Attention, Gradients, Masking, MaskingFields, Outputs, Saved


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradient of the scores, the weights after dropout, and grad_context, widened;
    and that of the centers of a Gaussian window, or None.

    With P the weights and dP their gradient: dS = P (dP - sum_s P dP), 0 where nothing counts. A
    Gaussian g multiplies P afterwards: W = P g takes dW, so dP = g dW, and p_t gets
    sum_s W dW (s - p_t) / sigma^2.
    """
    grad = result.context.new_zeros(()) if grad_context is None else grad_context
    grad = grad.to(clean.dtype).expand_as(result.context)
    kept, grad_kept = result.weights, grad @ clean.mT
    if masking.keep_mask is not None:
        kept = kept * masking.keep_mask * masking.keep_scale
        grad_kept = grad_kept * masking.keep_mask * masking.keep_scale
    grad_weight = grad_kept if grad_weights is None else grad_kept + grad_weights
    weighted = (result.weights * grad_weight).masked_fill(~counts, 0.0)
    delta = weighted.sum(dim=-1, keepdim=True)
    if masking.window is None or not masking.window[2]:
        grad_scores = result.weights * (grad_weight - delta)
        return grad_scores.masked_fill(~counts, 0.0), kept, grad, None
    centers, half_width, _ = masking.window
    positions = torch.arange(clean.shape[1], device=clean.device, dtype=centers.dtype)
    moment = (weighted * (positions - centers[..., None])).sum(dim=-1) * (2.0 / half_width) ** 2
    softmax, _ = reference.masked_softmax(result.scores, counts)
    grad_scores = weighted - softmax * delta
    return grad_scores.masked_fill(~counts, 0.0), kept, grad, moment.to(centers.dtype)


def _narrowed(grads: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [g.to(x.dtype).contiguous() for g, x in zip(grads, inputs, strict=True)]


def dot_forward(
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: MaskingFields,
    return_weights: bool,
    return_logsumexp: bool,
) -> Outputs:
    reference.check_lengths(masking[0], memory)
    result = reference.dot_attention(query, memory, scale, reference.as_masking(masking))
    return _outputs(result, memory.dtype, return_weights, return_logsumexp)


def dot_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: MaskingFields,
    saved: Saved,
) -> Gradients:
    masks = reference.as_masking(masking)
    result = reference.dot_attention(query, memory, scale, masks)
    counts = reference.counted_positions(memory, masks)
    clean, _ = reference.readable(memory.to(result.scores.dtype), counts)
    grad_scores, kept, grad, grad_centers = _score_gradients(
        grad_context, grad_weights, result, clean, counts, masks
    )
    grad_scores = scale * grad_scores
    grad_query = grad_scores @ clean
    grad_memory = kept.mT @ grad + grad_scores.mT @ query.to(clean.dtype)
    grads = (grad_query, grad_memory)
    return *_narrowed(grads, (query, memory)), grad_centers


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
    result = reference.concat_attention(
        query_proj, memory_proj, v, memory, reference.as_masking(masking)
    )
    return _outputs(result, memory.dtype, return_weights, return_logsumexp)


def concat_scores(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    masking: MaskingFields,
) -> Tensor:
    reference.check_lengths(masking[0], memory_proj)
    inputs = (query_proj, memory_proj, v)
    return reference.counted_concat_scores(*inputs, reference.as_masking(masking))[0].contiguous()


def concat_scores_backward(
    grad_scores: Tensor,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    masking: MaskingFields,
) -> tuple[Tensor, ...]:
    counts = reference.counted_positions(memory_proj, masking)
    projection, _ = reference.readable(memory_proj.to(grad_scores.dtype), counts)
    grads = _projection_gradients(grad_scores.masked_fill(~counts, 0.0), query_proj, projection, v)
    return tuple(_narrowed(grads, (query_proj, memory_proj, v)))


def _projection_gradients(
    grad_scores: Tensor, query_proj: Tensor, memory_proj: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both projections and of v from those of the scores v . tanh(q + m)."""
    dtype = grad_scores.dtype
    tanh = torch.tanh(query_proj.to(dtype)[:, :, None] + memory_proj[:, None])
    grad_v = (grad_scores[..., None] * tanh).sum(dim=(0, 1, 2))
    grad_sum = grad_scores[..., None] * v.to(dtype) * (1.0 - tanh * tanh)  # of q + m
    return grad_sum.sum(dim=2), grad_sum.sum(dim=1), grad_v


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
) -> Gradients:
    masks = reference.as_masking(masking)
    result = reference.concat_attention(query_proj, memory_proj, v, memory, masks)
    counts = reference.counted_positions(memory, masks)
    dtype = result.scores.dtype
    clean, _ = reference.readable(memory.to(dtype), counts)
    projection, _ = reference.readable(memory_proj.to(dtype), counts)
    grad_scores, kept, grad, grad_centers = _score_gradients(
        grad_context, grad_weights, result, clean, counts, masks
    )
    grads = (*_projection_gradients(grad_scores, query_proj, projection, v), kept.mT @ grad)
    inputs = (query_proj, memory_proj, v, memory)
    return *_narrowed(grads, inputs), grad_centers
