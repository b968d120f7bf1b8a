"""The definition of Luong attention: eager, any floating-point dtype, differentiable twice.

Every backend must return what this file returns, up to rounding. The ``eager`` backend and calls
under torch.func transforms use it too. It is written for clarity, not for speed: the concat score
here builds the (B, T, S, A) tensor that the kernels avoid. A position "counts" for a query if it is
not masked by lengths, mask or window.

    score    dot: a . m        concat: v . tanh(q + m)          (Luong et al. 2015, section 3.1)
    weights  softmax of the scores over the positions that count                        (eq. 7)
    context  sum_s weights[s] * memory[s]
    local    weights only within a window around p_t, optionally times a Gaussian      (section 3.2)

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
    logsumexp: Tensor  # (B, T), -inf if no position counts
    scores: Tensor  # (B, T, S), before masking; 0 or NaN for rows of memory that are not read


class LocalWindow(NamedTuple):
    """Local attention: each query attends to positions s with ``|s - p_t| <= half_width``.

    Luong et al. 2015, section 3.2. With ``gaussian`` the weights, after the softmax over the
    window, are multiplied by ``exp(-(s - p_t)^2 / (2 sigma^2))``, sigma = half_width / 2 (eq. 10),
    and not normalised again; p_t then gets a gradient. Positions are counted from 0.
    """

    centers: Tensor  # floating-point (B, T), the p_t; (B,) for a 2-D query
    half_width: float  # in positions, the paper's D
    gaussian: bool = False


class Masking(NamedTuple):
    """The masks of a call: which positions count, and which weights dropout keeps."""

    memory_lengths: Tensor | None = None  # int (B,), 0..S
    memory_mask: Tensor | None = None  # bool (B, S) or (B, 1 or T, S), True = attend
    keep_mask: Tensor | None = None  # bool (B, T, S), False = dropped from the weighted sum
    keep_scale: float = 1.0  # factor of the kept weights
    window: LocalWindow | None = None  # centers in the dtype of the arithmetic


# The type of a Masking as a plain tuple. Hot paths create plain tuples: a Masking takes 0.2 us
# longer.
MaskingFields = tuple[
    Tensor | None, Tensor | None, Tensor | None, float, tuple[Tensor, float, bool] | None
]
# What a forward pass returns (context, weights, log-sum-exp; None if not requested), and what is
# saved for the backward pass: always the log-sum-exp, and the weights if they were returned.
Outputs = tuple[Tensor, Tensor | None, Tensor | None]
Saved = tuple[Tensor, Tensor | None, Tensor]
# What a backward pass returns: the gradients of the inputs in order, then the gradient of the
# centers of a Gaussian window; None for a gradient that is not wanted.
Gradients = tuple[Tensor | None, ...]

_EVERYTHING = Masking()


def as_masking(fields: MaskingFields) -> Masking:
    lengths, mask, keep, keep_scale, window = fields
    return Masking(
        lengths, mask, keep, keep_scale, None if window is None else LocalWindow(*window)
    )


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64 inputs, float32 for all narrower ones."""
    return dtype if dtype == torch.float64 else torch.float32


def check_lengths(memory_lengths: Tensor | None, memory: Tensor) -> None:
    """Raise ValueError for a length outside 0..S. Lengths on a GPU are not read or checked."""
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
    """Bounds [first, end) of each window: int64 (B, T, 2), within 0..S.

    Native code uses exactly this arithmetic, because different rounding would move the edges. A NaN
    center gives the whole row, so that the NaN reaches the result.
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
    """Return bool (B, 1 or T, S), True where a position counts for a query.

    A position counts if it is below its row's length, allowed by the mask (True = attend) and
    inside the query's window.
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
    """Return the memory with zeros in the rows that count for no query.

    Then NaN in the padding can reach neither a projection of the memory nor the gradient of its
    weight, where it would be multiplied by a zero gradient.
    """
    if masking[0] is None and masking[1] is None and masking[4] is None:
        return memory
    counts = counted_positions(memory, masking).any(dim=1)
    return memory.masked_fill(~counts[..., None], 0)


def pad_rows(rows: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Pad ragged rows (N, width) to (B, S, width). Differentiable twice.

    Sequence b is rows[offsets[b] : offsets[b + 1]], and S is ``longest``. The padding holds rows of
    other sequences, so the result must be used with lengths.
    """
    if rows.shape[0] == 0:
        return rows.new_zeros(offsets.shape[0] - 1, longest, rows.shape[1])
    positions = torch.arange(longest, device=rows.device)
    return rows[(offsets[:-1, None] + positions).clamp(max=rows.shape[0] - 1)]


def unpad_rows(padded: Tensor, offsets: Tensor) -> Tensor:
    """The inverse of `pad_rows`: from (B, S, width) to (N, width)."""
    positions = torch.arange(padded.shape[1], device=padded.device)
    return padded[positions < offsets.diff()[:, None]]


def readable(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Replace rows that must not be read by 0, so that no product or gradient contains 0 * NaN.

    Returns the cleaned (B, S, X) and bool (B, S), True for rows that were kept. A row that is not
    finite and counts only for some queries is replaced too: it may affect only those queries, and
    `hide_absent` makes their scores NaN.
    """
    present = counts.any(dim=1)
    if counts.shape[1] > 1:
        present = present & rows.isfinite().all(dim=-1)
    return rows.masked_fill(~present[..., None], 0), present


def hide_absent(scores: Tensor, present: Tensor, counts: Tensor) -> Tensor:
    """Set the scores of the rows that `readable` replaced to NaN; masking hides uncounted ones."""
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
    """Softmax over the positions that count, and log-sum-exp (B, T). Empty rows: 0 and -inf."""
    counts = counts.expand_as(scores)
    empty = ~counts.any(dim=-1, keepdim=True)
    # The logits of an empty row are set to 0, so that softmax has a finite gradient there. The
    # weights of the row are set to 0 afterwards.
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

    The keep mask is dropout on the weights of the sum. The returned weights are those before
    dropout.
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
    """Attention with the dot score. The general score is this with a projected query.

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
    """Attention with the concat (additive) score, given its projections.

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
    """Concat scores in the dtype of the arithmetic, and where positions count, both (B, T, S).

    Scores are -inf where a position does not count; the second result is bool.
    """
    dtype = arithmetic_dtype(memory_proj.dtype)
    counts = counted_positions(memory_proj, masking)
    projection, present = readable(memory_proj.to(dtype), counts)
    scores = concat_scores(query_proj.to(dtype), projection, v.to(dtype))
    counts = counts.expand_as(scores)
    return hide_absent(scores, present, counts).masked_fill(~counts, -torch.inf), counts
