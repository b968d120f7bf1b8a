"""For graphs that hold our operators and go where these are not known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_attn import ops, reference
from fused_attn.reference import Masking

assert ops  # it defines the operators


def _outputs(
    result: reference.Attention, dtype: torch.dtype, return_weights: bool, return_logsumexp: bool
) -> reference.Outputs:
    return (
        result.context.to(dtype),
        result.weights.to(dtype) if return_weights else None,
        result.logsumexp if return_logsumexp else None,
    )


def _dot(
    query: Tensor,
    memory: Tensor,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
    scale: float = 1.0,
    keep_mask: Tensor | None = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
    centers: Tensor | None = None,
    half_width: float = 0.0,
    gaussian: bool = False,
) -> reference.Outputs:
    window = None if centers is None else (centers, half_width, gaussian)
    masking = reference.as_masking((memory_lengths, memory_mask, keep_mask, keep_scale, window))
    result = reference.dot_attention(query, memory, scale, masking)
    return _outputs(result, memory.dtype, return_weights, return_logsumexp)


def _concat(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
    keep_mask: Tensor | None = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
    centers: Tensor | None = None,
    half_width: float = 0.0,
    gaussian: bool = False,
) -> reference.Outputs:
    window = None if centers is None else (centers, half_width, gaussian)
    masking = reference.as_masking((memory_lengths, memory_mask, keep_mask, keep_scale, window))
    result = reference.concat_attention(query_proj, memory_proj, v, memory, masking)
    return _outputs(result, memory.dtype, return_weights, return_logsumexp)


def _scores(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    masking = Masking(memory_lengths, memory_mask)
    return reference.counted_concat_scores(query_proj, memory_proj, v, masking)[0]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Our forward operators in terms of ATen's, as `ExportedProgram.run_decompositions` takes them.

    `torch.onnx.export` of a module needs none of this: it meets ATen operators only.
    """
    return {
        torch.ops.fused_attn.dot_attention.default: _dot,
        torch.ops.fused_attn.concat_attention.default: _concat,
        torch.ops.fused_attn.concat_scores.default: _scores,
    }
