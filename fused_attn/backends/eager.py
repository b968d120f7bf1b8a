"""The reference as a backend: every device, every floating dtype, no native code.

The backward is written out. It cannot be left to autograd, because an operator may run where the
dispatcher has switched autograd off, for example below a `TorchDispatchMode`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn import operands, reference
from fused_attn.problem import AttentionProblem
from fused_attn.reference import Attention, Gradients, Masking, MaskingFields, Outputs, Saved


def unavailable_reasons() -> list[str]:
    return []


def not_supported_reasons(problem: AttentionProblem) -> list[str]:
    if not problem.dtype.is_floating_point:
        return [f"dtype {problem.dtype} is not a floating-point type"]
    return []


def is_slower(problem: AttentionProblem) -> bool:
    return False


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
    grad_logsumexp: Tensor | None,
    result: Attention,
    clean: Tensor,
    counts: Tensor,
    masking: Masking,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradient of the scores, the weights after dropout, grad_context in the dtype of
    the arithmetic, and the gradient of the centers of a Gaussian window or None.

    With P the weights and dP their gradient: dS = P (dP - sum_s P dP), 0 where nothing counts. A
    Gaussian g multiplies P afterwards: W = P g takes dW, so dP = g dW, and p_t gets
    sum_s W dW (s - p_t) / sigma^2. A gradient of the log-sum-exp adds P times itself.
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
    if grad_logsumexp is not None:
        delta = delta - grad_logsumexp[..., None]
    if masking.window is None or not masking.window[2]:
        grad_scores = result.weights * (grad_weight - delta)
        return grad_scores.masked_fill(~counts, 0.0), kept, grad, None
    centers, half_width, _ = masking.window
    positions = torch.arange(clean.shape[1], device=clean.device, dtype=centers.dtype)
    moment = (weighted * (positions - centers[..., None])).sum(dim=-1) * (2.0 / half_width) ** 2
    softmax, _ = reference.masked_softmax(result.scores, counts)
    grad_scores = weighted - softmax * delta
    return grad_scores.masked_fill(~counts, 0.0), kept, grad, moment.to(centers.dtype)


def _narrowed(grads: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]) -> Gradients:
    return tuple(
        None if grad is None else grad.to(tensor.dtype).contiguous()
        for grad, tensor in zip(grads, inputs, strict=True)
    )


def dot_forward(
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: MaskingFields,
    return_weights: bool,
    return_logsumexp: bool,
) -> Outputs:
    operands.check_dot(query, memory, masking)
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
    wanted: list[bool],
) -> Gradients:
    grad_outputs = (grad_context, grad_weights, None)
    return dot_gradients(*grad_outputs, query, memory, scale, masking, saved, wanted)


def dot_gradients(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: MaskingFields,
    saved: Saved,
    wanted: list[bool],
) -> Gradients:
    """`dot_backward`, with a gradient of the log-sum-exp too. Differentiable itself."""
    operands.check_dot(query, memory, masking)
    operands.check_grad_outputs(grad_context, grad_weights, saved, query, memory, wanted, 3)
    operands.check_grad_logsumexp(grad_logsumexp, saved[2])
    masks = reference.as_masking(masking)
    result = reference.dot_attention(query, memory, scale, masks)
    counts = reference.counted_positions(memory, masks)
    clean, _ = reference.readable(memory.to(result.scores.dtype), counts)
    grad_outputs = (grad_context, grad_weights, grad_logsumexp)
    found = _score_gradients(*grad_outputs, result, clean, counts, masks)
    grad_scores, kept, grad, grad_centers = found
    grad_scores = scale * grad_scores
    of_query, of_memory, of_centers = wanted
    grad_query = grad_scores @ clean if of_query else None
    grad_memory = None
    if of_memory:
        grad_memory = kept.mT @ grad + grad_scores.mT @ query.to(clean.dtype)
    grads = _narrowed((grad_query, grad_memory), (query, memory))
    return *grads, grad_centers if of_centers else None


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
    operands.check_concat(query_proj, memory_proj, memory_exp, v, memory, masking)
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
    operands.check_scores(query_proj, memory_proj, memory_exp, v, masking)
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
    wanted: list[bool],
) -> Gradients:
    operands.check_scores(query_proj, memory_proj, memory_exp, v, masking)
    operands.check_grad_scores(grad_scores, query_proj, memory_proj, wanted)
    counts = reference.counted_positions(memory_proj, masking)
    projection, _ = reference.readable(memory_proj.to(grad_scores.dtype), counts)
    readable = grad_scores.masked_fill(~counts, 0.0)
    grads = _projection_gradients(readable, query_proj, projection, v, wanted)
    return _narrowed(grads, (query_proj, memory_proj, v))


def _projection_gradients(
    grad_scores: Tensor, query_proj: Tensor, memory_proj: Tensor, v: Tensor, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of both projections and of v from those of the scores v . tanh(q + m)."""
    of_query, of_memory, of_v = wanted[:3]
    if not (of_query or of_memory or of_v):
        return None, None, None
    dtype = grad_scores.dtype
    tanh = torch.tanh(query_proj.to(dtype)[:, :, None] + memory_proj[:, None])
    grad_v = (grad_scores[..., None] * tanh).sum(dim=(0, 1, 2)) if of_v else None
    if not (of_query or of_memory):
        return None, None, grad_v
    grad_sum = grad_scores[..., None] * v.to(dtype) * (1.0 - tanh * tanh)  # of q + m
    grad_query = grad_sum.sum(dim=2) if of_query else None
    return grad_query, grad_sum.sum(dim=1) if of_memory else None, grad_v


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
    wanted: list[bool],
) -> Gradients:
    grad_outputs = (grad_context, grad_weights, None)
    projections = (query_proj, memory_proj, memory_exp)
    return concat_gradients(*grad_outputs, *projections, v, memory, masking, saved, wanted)


def concat_gradients(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    grad_logsumexp: Tensor | None,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: MaskingFields,
    saved: Saved,
    wanted: list[bool],
) -> Gradients:
    """`concat_backward`, with a gradient of the log-sum-exp too. Differentiable itself."""
    operands.check_concat(query_proj, memory_proj, memory_exp, v, memory, masking)
    operands.check_grad_outputs(grad_context, grad_weights, saved, query_proj, memory, wanted, 5)
    operands.check_grad_logsumexp(grad_logsumexp, saved[2])
    masks = reference.as_masking(masking)
    result = reference.concat_attention(query_proj, memory_proj, v, memory, masks)
    counts = reference.counted_positions(memory, masks)
    dtype = result.scores.dtype
    clean, _ = reference.readable(memory.to(dtype), counts)
    projection, _ = reference.readable(memory_proj.to(dtype), counts)
    grad_outputs = (grad_context, grad_weights, grad_logsumexp)
    found = _score_gradients(*grad_outputs, result, clean, counts, masks)
    grad_scores, kept, grad, grad_centers = found
    grads = (
        *_projection_gradients(grad_scores, query_proj, projection, v, wanted),
        kept.mT @ grad if wanted[3] else None,
    )
    inputs = (query_proj, memory_proj, v, memory)
    return *_narrowed(grads, inputs), grad_centers if wanted[4] else None
