"""The reference as a backend: every device, every floating dtype, no native code."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn import reference
from fused_attn.problem import AttentionProblem
from fused_attn.reference import Attention, Masking


def unavailable_reasons() -> list[str]:
    return []


def not_supported_reasons(problem: AttentionProblem) -> list[str]:
    if not problem.dtype.is_floating_point:
        return [f"dtype {problem.dtype} is not a floating-point type"]
    return []


def _outputs(result: Attention, dtype: torch.dtype, return_weights: bool) -> Attention:
    weights = result.weights if return_weights else result.weights.new_empty(0)
    return Attention(
        result.context.to(dtype).contiguous(),
        weights.to(dtype).contiguous(),
        result.logsumexp.contiguous(),
        result.scores,
    )


def dot_forward(
    query: Tensor, memory: Tensor, scale: float, masking: Masking, return_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    result = reference.dot_attention(query, memory, scale, masking)
    return _outputs(result, memory.dtype, return_weights)[:3]


def dot_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: Masking,
    saved: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    query, memory = inputs = [x.detach().requires_grad_() for x in (query, memory)]
    with torch.enable_grad():
        result = reference.dot_attention(query, memory, scale, masking)
    grads = reference.gradients(result, inputs, grad_context, grad_weights)
    return tuple(grad.contiguous() for grad in grads)


def concat_forward(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: Masking,
    return_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    result = reference.concat_attention(query_proj, memory_proj, v, memory, masking)
    return _outputs(result, memory.dtype, return_weights)[:3]


def concat_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: Masking,
    saved: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in (query_proj, memory_proj, v, memory)]
    query_proj, memory_proj, v, memory = inputs
    with torch.enable_grad():
        result = reference.concat_attention(query_proj, memory_proj, v, memory, masking)
    grads = reference.gradients(result, inputs, grad_context, grad_weights)
    return tuple(grad.contiguous() for grad in grads)
