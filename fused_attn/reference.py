"""The definition of Luong attention: eager, any floating dtype, differentiable twice.

Every backend must return what this file returns, up to rounding. It is also the ``eager`` backend
and the source of second derivatives. It is written to be read, not to be fast: the concat score
here builds the (B, T, S, A) tensor that the kernels exist to avoid.

    score    dot: a . m        concat: v . tanh(q + m)          (Luong et al. 2015, section 3.1)
    weights  softmax of the scores over the positions that count                        (eq. 7)
    context  sum_s weights[s] * memory[s]

Shapes: B batch, T queries, S source positions, E memory width, A width of the concat score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Attention(NamedTuple):
    """Every intermediate of one attention call, in the dtype of the arithmetic."""

    context: Tensor  # (B, T, E)
    weights: Tensor  # (B, T, S), before dropout; rows sum to 1, or are 0 when nothing counts
    logsumexp: Tensor  # (B, T), -inf when nothing counts
    scores: Tensor  # (B, T, S), before masking; 0 or NaN for rows of memory that are not read


class Masking(NamedTuple):
    """Which positions count, and which weights dropout keeps."""

    memory_lengths: Tensor | None = None  # int (B,), 0..S
    memory_mask: Tensor | None = None  # bool (B, S) or (B, 1 or T, S), True = attend
    keep_mask: Tensor | None = None  # bool (B, T, S), False = dropped from the weighted sum
    keep_scale: float = 1.0  # what the kept weights are multiplied with


# What a Masking is. Where every call passes, a plain tuple is made: a Masking takes 0.2 us longer.
MaskingFields = tuple[Tensor | None, Tensor | None, Tensor | None, float]
# What a forward pass returns (context, weights, log-sum-exp; None if not asked for), and what it
# leaves for the backward one: the log-sum-exp always, the weights if they were returned.
Outputs = tuple[Tensor, Tensor | None, Tensor | None]
Saved = tuple[Tensor, Tensor | None, Tensor]

_EVERYTHING = Masking()


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


def check_lengths(memory_lengths: Tensor | None, memory: Tensor) -> None:
    """Refuse a length outside 0..S. Lengths on a GPU are not read back to check them."""
    if memory_lengths is None or memory_lengths.device.type != "cpu" or not len(memory_lengths):
        return
    source = memory.shape[1]
    low, high = (int(bound) for bound in memory_lengths.aminmax())
    if low < 0 or high > source:
        bad = low if low < 0 else high
        raise ValueError(
            f"memory_lengths must lie in 0..{source} (the source length of memory), got {bad}"
        )


def counted_positions(memory: Tensor, masking: MaskingFields) -> Tensor:
    """Return the bool (B, 1 or T, S) that is True where a query may look at a position.

    A position counts when it lies below its row's length and the mask (True = attend) allows it.
    """
    batch, source = memory.shape[0], memory.shape[1]
    counts = torch.ones(batch, 1, source, dtype=torch.bool, device=memory.device)
    lengths, mask, *_ = masking
    if lengths is not None:
        positions = torch.arange(source, device=memory.device)
        counts = counts & (positions < lengths[:, None])[:, None]
    if mask is not None:
        counts = counts & (mask.unsqueeze(1) if mask.dim() == 2 else mask)
    return counts


def zero_uncounted_rows(memory: Tensor, masking: MaskingFields) -> Tensor:
    """Return the memory with 0 in the rows that no query may read.

    A projection of it then neither carries NaN out of the padding nor, in its backward, multiplies
    a zero gradient with it.
    """
    if masking[0] is None and masking[1] is None:
        return memory
    counts = counted_positions(memory, masking).any(dim=1)
    return memory.masked_fill(~counts[..., None], 0)


def readable(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Replace rows that must not be read by 0, so that 0 x NaN arises in no product or gradient.

    Returns the cleaned (B, S, X) and the bool (B, S) of rows that are present after all. A row
    that counts for some queries only, and is not finite, is cleaned too: it may spoil only the
    queries that look at it, which `_hide_absent` sees to.
    """
    present = counts.any(dim=1)
    if counts.shape[1] > 1:
        present = present & rows.isfinite().all(dim=-1)
    return rows.masked_fill(~present[..., None], 0), present


def _hide_absent(scores: Tensor, present: Tensor, counts: Tensor) -> Tensor:
    if counts.shape[1] > 1:
        return scores.masked_fill(~present[:, None], torch.nan)
    return scores


def dot_scores(query: Tensor, memory: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * h_t . h_s`` for a query (B, T, E) and a memory (B, S, E): (B, T, S)."""
    return scale * (query @ memory.mT)


def concat_scores(query_proj: Tensor, memory_proj: Tensor, v: Tensor) -> Tensor:
    """``v . tanh(q_t + m_s)`` for projections (B, T, A), (B, S, A) and v (A,): (B, T, S)."""
    return torch.tanh(query_proj[:, :, None] + memory_proj[:, None]) @ v


def attend(
    scores: Tensor,
    memory: Tensor,
    counts: Tensor,
    masking: Masking,
) -> Attention:
    """Softmax ``scores`` (B, T, S) over the positions that count, and sum ``memory`` (B, S, E).

    The keep mask is dropout on the weights of the sum; the returned weights are the alignment
    before it.
    """
    counts = counts.expand_as(scores)
    empty = ~counts.any(dim=-1, keepdim=True)
    # An empty row becomes a row of zeros, whose softmax has a gradient; its weights are then cut.
    logits = scores.masked_fill(~counts, -torch.inf).masked_fill(empty, 0.0)
    logsumexp = torch.logsumexp(logits, dim=-1).masked_fill(empty[..., 0], -torch.inf)
    weights = torch.softmax(logits, dim=-1).masked_fill(~counts, 0.0)
    summed = weights
    if masking.keep_mask is not None:
        summed = weights * masking.keep_mask * masking.keep_scale
    return Attention(summed @ memory, weights, logsumexp, scores)


def dot_attention(
    query: Tensor, memory: Tensor, scale: float = 1.0, masking: Masking = _EVERYTHING
) -> Attention:
    """Attention with the dot score; the general score is this with a projected query.

    query (B, T, E), memory (B, S, E).
    """
    dtype = arithmetic_dtype(memory.dtype)
    counts = counted_positions(memory, masking)
    clean, present = readable(memory.to(dtype), counts)
    scores = _hide_absent(dot_scores(query.to(dtype), clean, scale), present, counts)
    return attend(scores, clean, counts, masking)


def concat_attention(
    query_proj: Tensor,
    memory_proj: Tensor,
    v: Tensor,
    memory: Tensor,
    masking: Masking = _EVERYTHING,
) -> Attention:
    """Attention with the concat (additive) score over finished projections.

    query_proj (B, T, A) holds ``W_q h_t + b``, memory_proj (B, S, A) holds ``W_m h_s``, v is (A,).
    """
    dtype = arithmetic_dtype(memory.dtype)
    counts = counted_positions(memory, masking)
    clean, memory_present = readable(memory.to(dtype), counts)
    projection, proj_present = readable(memory_proj.to(dtype), counts)
    scores = concat_scores(query_proj.to(dtype), projection, v.to(dtype))
    scores = _hide_absent(scores, memory_present & proj_present, counts)
    return attend(scores, clean, counts, masking)


def gradients(
    result: Attention,
    inputs: Sequence[Tensor],
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    create_graph: bool = False,
) -> list[Tensor]:
    """Gradients of ``inputs`` (zeros where there are none) for those of context and weights."""
    roots, seeds = [], []
    for root, seed in ((result.context, grad_context), (result.weights, grad_weights)):
        if seed is not None:
            roots.append(root)
            seeds.append(seed.to(root.dtype))
    if not roots:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return list(
        torch.autograd.grad(roots, inputs, seeds, create_graph=create_graph, materialize_grads=True)
    )
