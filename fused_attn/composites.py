"""The forward operators composed of ATen operators, with the same arguments and results.

For torch.func transforms, forward-mode AD, and graphs for runtimes without our operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn import reference
from fused_attn.reference import Masking, Outputs


def _outputs(
    result: reference.Attention, dtype: torch.dtype, return_weights: bool, return_logsumexp: bool
) -> Outputs:
    return (
        result.context.to(dtype),
        result.weights.to(dtype) if return_weights else None,
        result.logsumexp if return_logsumexp else None,
    )


def _masking(
    lengths: Tensor | None,
    mask: Tensor | None,
    keep: tuple[Tensor | None, float],
    centers: Tensor | None,
    shape: tuple[float, bool],
    is_ragged: bool,
) -> Masking:
    window = None if centers is None else (centers, *shape)
    if is_ragged and lengths is not None:
        lengths = lengths.diff()  # a ragged memory has offsets here
    return reference.as_masking((lengths, mask, *keep, window))


def dot_attention(
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
    max_source: int | None = None,
) -> Outputs:
    keep, shape = (keep_mask, keep_scale), (half_width, gaussian)
    if max_source is not None and memory_lengths is not None:
        memory = reference.pad_rows(memory, memory_lengths, max_source)
    is_ragged = max_source is not None
    masking = _masking(memory_lengths, memory_mask, keep, centers, shape, is_ragged)
    result = reference.dot_attention(query, memory, scale, masking)
    return _outputs(result, memory.dtype, return_weights, return_logsumexp)


def concat_attention(
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
    max_source: int | None = None,
) -> Outputs:
    keep, shape = (keep_mask, keep_scale), (half_width, gaussian)
    if max_source is not None and memory_lengths is not None:
        memory_proj = reference.pad_rows(memory_proj, memory_lengths, max_source)
        memory = reference.pad_rows(memory, memory_lengths, max_source)
    is_ragged = max_source is not None
    masking = _masking(memory_lengths, memory_mask, keep, centers, shape, is_ragged)
    result = reference.concat_attention(query_proj, memory_proj, v, memory, masking)
    return _outputs(result, memory.dtype, return_weights, return_logsumexp)


def concat_scores(
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
