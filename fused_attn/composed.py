"""Attention composed of PyTorch operations, for features that are not worth a kernel.

Sparsemax, the location score, coverage and scores for inspection work on (B, T, S), which is small
compared to the memory. Concat scores come from their own operator even here, because eager code
would need (B, T, S, A).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn import reference
from fused_attn.reference import MaskingFields

NORMALIZERS = ("softmax", "sparsemax")


def sparsemax(scores: Tensor, counts: Tensor | None = None) -> Tensor:
    """Sparsemax: the Euclidean projection of ``scores`` (..., S) onto the probability simplex.

    Each row sums to 1 and can contain exact zeros (Martins & Astudillo 2016, "From Softmax to
    Sparsemax", eq. 2). ``counts`` is a bool tensor that broadcasts to scores, True where a position
    takes part; a row without such positions is 0. The result has the shape and dtype of scores. It
    can be differentiated twice: for a fixed support it is linear in the scores,
    ``z - (sum z - 1) / size``.
    """
    if scores.shape[-1] == 0:
        return scores.clone()  # nothing to sort
    with torch.no_grad():
        visible = scores if counts is None else scores.masked_fill(~counts, -torch.inf)
        order = visible.sort(dim=-1, descending=True).values
        ranked = order - order[..., :1].clamp(min=torch.finfo(scores.dtype).min)
        sizes = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
        size = (1 + sizes * ranked > ranked.cumsum(dim=-1)).sum(dim=-1, keepdim=True)
        # The support is the ``size`` largest scores: all that are not below the smallest of them.
        last = order.gather(-1, (size - 1).clamp(min=0))
        support = (visible >= last) & (size > 0)
        size = support.sum(dim=-1, keepdim=True).clamp(min=1)
        spoiled = visible.isnan().any(dim=-1, keepdim=True)
    chosen = scores.masked_fill(~support, 0.0)
    excess = (chosen.sum(dim=-1, keepdim=True) - 1.0) / size
    result = (chosen - excess).masked_fill(~support, 0.0)
    return result.masked_fill(spoiled if counts is None else spoiled & counts, torch.nan)


def attend_scores(
    scores: Tensor, memory: Tensor, masking: MaskingFields, normalizer: str, return_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Normalise ``scores`` (B, T, S) over the unmasked positions and sum memory (B, S, E).

    Returns the context (B, T, E) and the weights (B, T, S) or None, in the dtype of memory.
    """
    masks = reference.as_masking(masking)
    counts = reference.counted_positions(memory, masks).expand_as(scores)
    clean, present = reference.readable(memory, counts)
    scores = reference.hide_absent(scores, present, counts)
    if normalizer == "softmax":
        weights, _ = reference.masked_softmax(scores, counts)
    else:
        weights = sparsemax(scores, counts)
    weights = reference.windowed(weights, counts, masks)
    summed = weights
    if masks.keep_mask is not None:
        summed = weights * masks.keep_mask * masks.keep_scale
    context = summed.to(memory.dtype) @ clean
    return context, weights.to(memory.dtype) if return_weights else None


def log_sum_exp(scores: Tensor) -> Tensor:
    """Log-sum-exp of scores over the last dimension; -inf for rows that are empty or all -inf."""
    return reference.masked_softmax(scores, ~scores.isneginf())[1]


def coverage_loss(weights: Tensor, coverage: Tensor | None = None) -> Tensor:
    """Coverage loss ``sum_s min(a_ts, c_ts)``: penalises attending repeatedly to one position.

    See, Liu & Manning 2017, "Get To The Point", eq. 12. The coverage c_t is the sum of the weights
    of all steps before t (eq. 10).

    weights: (B, T, S), the weights of T steps. coverage: (B, S), the coverage before the first of
    these steps; None means 0. Returns (B, T), one loss per step, 0 where all weights are 0. Raises
    ValueError for a wrong shape.
    """
    if weights.dim() != 3:
        raise ValueError(f"weights must have shape (B, T, S), got {tuple(weights.shape)}")
    before = weights.cumsum(dim=1) - weights
    if coverage is not None:
        if coverage.shape != (weights.shape[0], weights.shape[2]):
            raise ValueError(
                f"coverage must have shape (B, S) = ({weights.shape[0]}, {weights.shape[2]}), "
                f"got {tuple(coverage.shape)}"
            )
        before = before + coverage[:, None]
    return torch.minimum(weights, before).sum(dim=-1)
