"""The definition of Luong attention: eager, any floating dtype, differentiable twice.

Every backend must return what this file returns, up to rounding. It is also the ``eager`` backend
and what a transform differentiates. It is written to be read, not to be fast: the concat score
here builds the (B, T, S, A) tensor that the kernels exist to avoid.

    score    dot: a . m        concat: v . tanh(q + m)          (Luong et al. 2015, section 3.1)
    weights  softmax of the scores over the positions that count                        (eq. 7)
    context  sum_s weights[s] * memory[s]
    local    weights only within a window around p_t, times a Gaussian of s - p_t      (section 3.2)

Shapes: B batch, T queries, S source positions, E memory width, A width of the concat score.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Attention(NamedTuple):
    """Every intermediate of one attention call, in the dtype of the arithmetic."""

    context: Tensor  # (B, T, E)
    weights: Tensor  # (B, T, S), before dropout; rows sum to 1 (less with a Gaussian), or are 0
    logsumexp: Tensor  # (B, T), -inf when nothing counts
    scores: Tensor  # (B, T, S), before masking; 0 or NaN for rows of memory that are not read


class LocalWindow(NamedTuple):
    """Where each query looks: the positions s with ``|s - p_t| <= half_width`` (section 3.2).

    With ``gaussian`` the weights, after their softmax over the window, are multiplied with
    ``exp(-(s - p_t)^2 / (2 sigma^2))``, sigma = half_width / 2 (eq. 10), and not normalised again;
    p_t then has a gradient. Positions count from 0.
    """

    centers: Tensor  # float (B, T), the p_t; (B,) for a query of one step
    half_width: float  # D of the paper
    gaussian: bool = False


class Masking(NamedTuple):
    """Which positions count, and which weights dropout keeps."""

    memory_lengths: Tensor | None = None  # int (B,), 0..S
    memory_mask: Tensor | None = None  # bool (B, S) or (B, 1 or T, S), True = attend
    keep_mask: Tensor | None = None  # bool (B, T, S), False = dropped from the weighted sum
    keep_scale: float = 1.0  # what the kept weights are multiplied with
    window: LocalWindow | None = None  # centers in the dtype of the arithmetic


# What a Masking is. Where every call passes, a plain tuple is made: a Masking takes 0.2 us longer.
MaskingFields = tuple[
    Tensor | None, Tensor | None, Tensor | None, float, tuple[Tensor, float, bool] | None
]
# What a forward pass returns (context, weights, log-sum-exp; None if not asked for), and what it
# leaves for the backward one: the log-sum-exp always, the weights if they were returned.
Outputs = tuple[Tensor, Tensor | None, Tensor | None]
Saved = tuple[Tensor, Tensor | None, Tensor]
# What a backward pass returns: a gradient for each input that always has one, then that of the
# centers of a Gaussian window, or None.
Gradients = tuple[Tensor | None, ...]

_EVERYTHING = Masking()


def as_masking(fields: MaskingFields) -> Masking:
    lengths, mask, keep, keep_scale, window = fields
    return Masking(
        lengths, mask, keep, keep_scale, None if window is None else LocalWindow(*window)
    )


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything narrower."""
    return dtype if dtype == torch.float64 else torch.float32


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


def window_bounds(centers: Tensor, half_width: float, source: int) -> Tensor:
    """First position of each window and the one after its last: int64 (B, T, 2), within 0..S.

    Native code repeats exactly this arithmetic: a rounding of its own would move the edges. A
    center that is NaN gives the whole row, so that the NaN shows.
    """
    first = torch.ceil(centers.detach() - half_width)
    last = torch.floor(centers.detach() + half_width)
    bounds = torch.stack((first.nan_to_num(nan=0.0), last.nan_to_num(nan=torch.inf) + 1), -1)
    return bounds.clamp(0, source).to(torch.int64)


def gaussian_factor(centers: Tensor, half_width: float, source: int) -> Tensor:
    """``exp(-(s - p_t)^2 / (2 sigma^2))`` with sigma = half_width / 2: (B, T, S)."""
    positions = torch.arange(source, device=centers.device)
    distance = (positions.to(centers.dtype) - centers[..., None]) * (2.0 / half_width)
    return torch.exp(-0.5 * distance * distance)


def counted_positions(memory: Tensor, masking: MaskingFields) -> Tensor:
    """Return the bool (B, 1 or T, S) that is True where a query may look at a position.

    A position counts when it lies below its row's length, the mask (True = attend) allows it and
    it is inside the query's window.
    """
    batch, source = memory.shape[0], memory.shape[1]
    counts = torch.ones(batch, 1, source, dtype=torch.bool, device=memory.device)
    lengths, mask, _, _, window = masking
    if lengths is not None:
        positions = torch.arange(source, device=memory.device)
        counts = counts & (positions < lengths[:, None])[:, None]
    if mask is not None:
        counts = counts & (mask.unsqueeze(1) if mask.dim() == 2 else mask)
    if window is not None:
        bounds = window_bounds(window[0], window[1], source)
        positions = torch.arange(source, device=memory.device)
        counts = counts & (positions >= bounds[..., :1]) & (positions < bounds[..., 1:])
    return counts


def zero_uncounted_rows(memory: Tensor, masking: MaskingFields) -> Tensor:
    """Return the memory with 0 in the rows that no query may read.

    A projection of it then neither carries NaN out of the padding nor, in its backward, multiplies
    a zero gradient with it.
    """
    if masking[0] is None and masking[1] is None and masking[4] is None:
        return memory
    counts = counted_positions(memory, masking).any(dim=1)
    return memory.masked_fill(~counts[..., None], 0)


def pad_rows(rows: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Rows (N, width) of sequences one after another, as (B, S, width). Differentiable twice.

    Sequence b has the rows offsets[b] to offsets[b + 1] - 1. What is behind them is filled with
    rows of others: lengths go with the result.
    """
    if rows.shape[0] == 0:
        return rows.new_zeros(offsets.shape[0] - 1, longest, rows.shape[1])
    positions = torch.arange(longest, device=rows.device)
    return rows[(offsets[:-1, None] + positions).clamp(max=rows.shape[0] - 1)]


def unpad_rows(padded: Tensor, offsets: Tensor) -> Tensor:
    """The way back from `pad_rows`."""
    positions = torch.arange(padded.shape[1], device=padded.device)
    return padded[positions < offsets.diff()[:, None]]


def readable(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Replace rows that must not be read by 0, so that 0 x NaN arises in no product or gradient.

    Returns the cleaned (B, S, X) and the bool (B, S) of rows that are present after all. A row
    that counts for some queries only, and is not finite, is cleaned too: it may spoil only the
    queries that look at it, which `hide_absent` sees to.
    """
    present = counts.any(dim=1)
    if counts.shape[1] > 1:
        present = present & rows.isfinite().all(dim=-1)
    return rows.masked_fill(~present[..., None], 0), present


def hide_absent(scores: Tensor, present: Tensor, counts: Tensor) -> Tensor:
    """NaN for a row that `readable` cleaned: it spoils those who look at it, and no other."""
    if counts.shape[1] > 1:
        return scores.masked_fill(~present[:, None], torch.nan)
    return scores


def dot_scores(query: Tensor, memory: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * h_t . h_s`` for a query (B, T, E) and a memory (B, S, E): (B, T, S)."""
    return scale * (query @ memory.mT)


def concat_scores(query_proj: Tensor, memory_proj: Tensor, v: Tensor) -> Tensor:
    """``v . tanh(q_t + m_s)`` for projections (B, T, A), (B, S, A) and v (A,): (B, T, S)."""
    return torch.tanh(query_proj[:, :, None] + memory_proj[:, None]) @ v


def masked_softmax(scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the positions that count, and its log-sum-exp (B, T); empty rows 0 and -inf."""
    counts = counts.expand_as(scores)
    empty = ~counts.any(dim=-1, keepdim=True)
    # An empty row becomes a row of zeros, whose softmax has a gradient; its weights are then cut.
    logits = scores.masked_fill(~counts, -torch.inf).masked_fill(empty, 0.0)
    logsumexp = torch.logsumexp(logits, dim=-1).masked_fill(empty[..., 0], -torch.inf)
    return torch.softmax(logits, dim=-1).masked_fill(~counts, 0.0), logsumexp


def windowed(weights: Tensor, counts: Tensor, masking: Masking) -> Tensor:
    """The weights (B, T, S) times the Gaussian of their window, if there is one."""
    if masking.window is None or not masking.window.gaussian:
        return weights
    centers, half_width, _ = masking.window
    factor = gaussian_factor(centers.to(weights.dtype), half_width, weights.shape[2])
    return weights * factor.masked_fill(~counts, 0.0)


def attend(scores: Tensor, memory: Tensor, counts: Tensor, masking: Masking) -> Attention:
    """Softmax ``scores`` (B, T, S) over the positions that count, and sum ``memory`` (B, S, E).

    The keep mask is dropout on the weights of the sum; the returned weights are the alignment
    before it.
    """
    weights, logsumexp = masked_softmax(scores, counts)
    weights = windowed(weights, counts, masking)
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
    scores = hide_absent(dot_scores(query.to(dtype), clean, scale), present, counts)
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
    scores = hide_absent(scores, memory_present & proj_present, counts)
    return attend(scores, clean, counts, masking)


def counted_concat_scores(
    query_proj: Tensor, memory_proj: Tensor, v: Tensor, masking: Masking
) -> tuple[Tensor, Tensor]:
    """Scores (B, T, S) in the dtype of the arithmetic, -inf where bool (B, T, S) does not count."""
    dtype = arithmetic_dtype(memory_proj.dtype)
    counts = counted_positions(memory_proj, masking)
    projection, present = readable(memory_proj.to(dtype), counts)
    scores = concat_scores(query_proj.to(dtype), projection, v.to(dtype))
    counts = counts.expand_as(scores)
    return hide_absent(scores, present, counts).masked_fill(~counts, -torch.inf), counts
