"""Scores before the softmax, with their log-sum-exp: for inspection, and for `composed`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fused_attn import autograd, checks, composed, reference
from fused_attn.reference import LocalWindow, MaskingFields, arithmetic_dtype, zero_uncounted_rows


def counted(scores: Tensor, memory: Tensor, masking: MaskingFields) -> Tensor:
    """Return the scores (B, T, S) in the dtype of the arithmetic, -inf at masked positions."""
    checks.check_bounds(masking[0], memory)
    counts = reference.counted_positions(memory, masking)
    return scores.to(arithmetic_dtype(memory.dtype)).masked_fill(~counts, -torch.inf)


def of_dot(query: Tensor, memory: Tensor, scale: float | Tensor, masking: MaskingFields) -> Tensor:
    """Scores ``scale * h_t . h_s`` (B, T, S) of checked arguments (B, T, E) and (B, S, E)."""
    checks.check_bounds(masking[0], memory)
    dtype = arithmetic_dtype(memory.dtype)
    counts = reference.counted_positions(memory, masking)
    clean, present = reference.readable(memory.to(dtype), counts)
    scores = (query.to(dtype) @ clean.mT) * (scale if isinstance(scale, Tensor) else float(scale))
    scores = reference.hide_absent(scores, present, counts)
    return scores.masked_fill(~counts, -torch.inf)


def of_concat(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    masking: MaskingFields,
    backend: str,
) -> Tensor:
    """Concat scores (B, T, S) of checked projections (B, T, A) and (B, S, A)."""
    lengths, mask, *_, window = masking
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(1)
    inputs = (query_proj, memory_proj, memory_exp, v)
    scores = autograd.concat_scores(*inputs, lengths, mask, backend)
    if window is None:
        return scores
    inside = reference.counted_positions(memory_proj, (None, None, None, 1.0, window))
    return scores.masked_fill(~inside, -torch.inf)


def dot_scores(
    query: Tensor,
    memory: Tensor,
    *,
    scale: float | Tensor = 1.0,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    window: LocalWindow | None = None,
) -> tuple[Tensor, Tensor]:
    """The scores of `dot_attention` before the softmax, and their log-sum-exp.

    Takes the arguments of `dot_attention` that affect the scores, and raises the same errors.
    Returns the scores (B, T, S), -inf at masked positions, and the log-sum-exp (B, T), -inf if all
    positions are masked; both in float32 (float64 for float64). For a 2-D query the results have no
    T dimension.

    ``exp(scores - logsumexp[..., None])`` are the attention weights. For a query whose positions
    are all masked this is NaN (-inf minus -inf), while its weights are 0:
    ``.masked_fill(logsumexp[..., None].isneginf(), 0)`` corrects that.
    """
    checks.check_scale(scale)
    memory, memory_lengths = checks.padded(memory, memory_lengths)
    query, memory = checks.autocast(query, memory)
    checks.check_memory(memory)
    checks.check_query(query, memory, "memory", memory.shape[2])
    masking = checks.check_masking(query, memory, memory_lengths, memory_mask, window, 0.0)
    return _both(of_dot(_three(query), memory, scale, masking), query)


def general_scores(
    query: Tensor,
    memory: Tensor,
    weight: Tensor,
    *,
    scale: float | Tensor = 1.0,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    window: LocalWindow | None = None,
) -> tuple[Tensor, Tensor]:
    """The scores of `general_attention` before the softmax, and their log-sum-exp.

    Arguments as in `general_attention`; results and errors as in `dot_scores`.
    """
    checks.check_scale(scale)
    memory, memory_lengths = checks.padded(memory, memory_lengths)
    query, memory, weight = checks.autocast(query, memory, weight)
    checks.check_memory(memory)
    checks.check_parameter("weight", weight, memory, (None, memory.shape[2]), "(D, E)")
    checks.check_query(query, memory, "weight", weight.shape[0])
    masking = checks.check_masking(query, memory, memory_lengths, memory_mask, window, 0.0)
    return _both(of_dot(_three(query) @ weight, memory, scale, masking), query)


def concat_scores(
    query: Tensor,
    memory: Tensor,
    query_weight: Tensor,
    memory_weight: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    window: LocalWindow | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The scores of `concat_attention` before the softmax, and their log-sum-exp.

    Arguments as in `concat_attention`; results and errors as in `dot_scores`. No tensor of shape
    (B, T, S, A) is materialised, except in the eager backend.
    """
    checks.check_backend(backend)
    memory, memory_lengths = checks.padded(memory, memory_lengths)
    operands = (query, memory, query_weight, memory_weight, v, bias)
    query, memory, query_weight, memory_weight, v, bias = checks.autocast(*operands)
    checks.check_concat(query, memory, query_weight, memory_weight, v, bias)
    masking = checks.check_masking(query, memory, memory_lengths, memory_mask, window, 0.0)
    query_proj = linear(_three(query), query_weight, bias)
    memory_proj = linear(zero_uncounted_rows(memory, masking), memory_weight)
    return _both(of_concat(query_proj, memory_proj, None, v, masking, backend), query)


def _three(query: Tensor) -> Tensor:
    return query if query.dim() == 3 else query.unsqueeze(1)


def _both(scores: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    log = composed.log_sum_exp(scores)
    return (scores, log) if query.dim() == 3 else (scores.squeeze(1), log.squeeze(1))
