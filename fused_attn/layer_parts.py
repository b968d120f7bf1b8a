"""Optional parts of `LuongAttention`: predicted positions, normed projections, histories."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn import modules
from fused_attn.reference import (
    LocalWindow,
    Masking,
    MaskingFields,
    arithmetic_dtype,
    counted_positions,
)


class PredictedPosition(nn.Module):
    """The window center of local-p: ``p_t = S sigmoid(v_p^T tanh(W_p h_t))`` (Luong 2015, eq. 9).

    ``proj.weight`` (D, D) is W_p, ``v`` (D,) is v_p. Positions are counted from 0.
    """

    def __init__(
        self,
        query_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(query_dim, query_dim, bias=False, device=device, dtype=dtype)
        self.v = nn.Parameter(torch.empty(query_dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        self.proj.reset_parameters()
        bound = 1.0 / math.sqrt(self.v.shape[0])
        nn.init.uniform_(self.v, -bound, bound)

    def forward(self, query: Tensor, lengths: Tensor | None, source: int) -> Tensor:
        """Return centers (B, T), or (B,) for a query (B, D), in the dtype of the arithmetic.

        lengths: int (B,), the source length of each row; if None, ``source`` for all rows.
        """
        hidden = torch.tanh(modules.project(self.proj, query, "query"))
        dtype = arithmetic_dtype(query.dtype)
        place = torch.sigmoid(hidden.to(dtype) @ self.v.to(dtype))
        if lengths is None:
            return source * place
        return lengths.to(dtype).reshape(-1, *[1] * (place.dim() - 1)) * place


def monotonic_centers(query: Tensor, positions: Any) -> Tensor:
    """The window centers of local-m: p_t = t for each query, (B, T), or (B,) for a query (B, D).

    positions: an int, a Tensor that broadcasts to the result, or None for 0..T-1.
    """
    if positions is None:
        if query.dim() == 2:
            raise ValueError(
                "positions must be the decoder step for a query (B, D) with local='monotonic', "
                "got None"
            )
        positions = torch.arange(query.shape[1], device=query.device)
    shape = query.shape[:-1]
    is_number = isinstance(positions, Integral)
    if is_number:
        centers = query.new_full(shape, positions, dtype=arithmetic_dtype(query.dtype))
    elif isinstance(positions, Tensor):
        try:
            centers = positions.to(arithmetic_dtype(query.dtype)).expand(shape)
        except RuntimeError:
            raise ValueError(
                f"positions must broadcast to {tuple(shape)}, got {tuple(positions.shape)}"
            ) from None
    else:
        raise TypeError(f"positions must be an int or a Tensor, got {positions!r}")
    return centers


class NormedLinear(nn.Linear):
    """A linear projection followed by the layer normalisation ``norm``."""

    def __init__(self, wide: int, narrow: int, bias: bool, norm_bias: bool, **where: Any) -> None:
        super().__init__(wide, narrow, bias, **where)
        self.norm = nn.LayerNorm(narrow, bias=norm_bias, **where)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "norm" in self._modules:  # nn.Linear.__init__ calls this before norm exists
            self.norm.reset_parameters()

    def forward(self, states: Tensor) -> Tensor:
        projected = super().forward(states)
        return self.norm(projected).to(projected.dtype)  # under autocast a norm returns float32


class AlignmentHistory(nn.Module):
    """Alignment history, as terms inside the tanh of the concat score.

    Coverage (See, Liu & Manning 2017, eq. 11): ``w_c c_s``, where the coverage c is the sum of the
    weights of all previous steps. ``coverage_proj.weight`` (A, 1) is w_c. Location (Chorowski et
    al. 2015, eq. 8 and 9): ``U f_s``, where f is the previous step's weights convolved with F.
    ``conv.weight`` (channels, 1, width) is F, ``conv_proj.weight`` (A, channels) is U.
    """

    def __init__(
        self,
        attn_dim: int,
        coverage: bool,
        channels: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.coverage = coverage
        self.channels = channels
        if coverage:
            self.coverage_proj = nn.Linear(1, attn_dim, bias=False, device=device, dtype=dtype)
        if channels:
            self.conv = nn.Conv1d(
                1, channels, width, padding=width // 2, bias=False, device=device, dtype=dtype
            )
            self.conv_proj = nn.Linear(channels, attn_dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        for part in self.children():
            if isinstance(part, nn.Linear | nn.Conv1d):
                part.reset_parameters()

    def forward(
        self, coverage: Tensor | None, previous_weights: Tensor | None, counts: Tensor | None
    ) -> Tensor | None:
        """Return the sum of the terms (N, S, A) for histories (N, S); None if both are None.

        ``counts``, bool (N, S), is True at positions that may be read.
        """
        parts = []
        if coverage is not None:
            parts.append(self.coverage_proj(_readable(coverage, counts)[..., None]))
        if previous_weights is not None:
            seen = convolve(self.conv, _readable(previous_weights, counts))
            parts.append(self.conv_proj(seen.mT))
        return sum(parts[1:], parts[0]) if parts else None


def convolve(conv: nn.Module, rows: Tensor) -> Tensor:
    """Apply the length-preserving ``conv`` to rows (N, S). Returns (N, channels, S).

    torch does not convolve rows with S = 0. They are padded to one position, which is cut off
    afterwards: the layer is called, and its weight gets a gradient of 0.
    """
    rows = rows[:, None]
    return conv(rows) if rows.shape[2] else conv(nn.functional.pad(rows, (0, 1)))[..., :0]


def _readable(history: Tensor, counts: Tensor | None) -> Tensor:
    return history if counts is None else history.masked_fill(~counts, 0.0)


def fold_history(
    history: AlignmentHistory,
    operands: tuple[Any, ...],
    coverage: Tensor | None,
    previous_weights: Tensor | None,
) -> tuple[tuple[Any, ...], int | None]:
    """Add the history term to the memory projection, and fold T queries into the batch.

    ``operands`` are query_proj (B, T, A) or (B, A), memory_proj, memory_exp, v, memory and masking.
    With one query the term is as large as the projection. With T queries it is T times as large,
    because each query has its own history. Returns the operands, and T if they were folded, or
    None.
    """
    scored, memory_proj, _, v, memory, masking = operands
    for name, tensor, is_wanted in (
        ("coverage", coverage, history.coverage),
        ("previous_weights", previous_weights, history.channels > 0),
    ):
        _check_history(name, tensor, is_wanted, scored, memory)
    batch, source, _ = memory.shape
    queries = scored.shape[1] if scored.dim() == 3 else 1
    lengths, mask, *_ = masking
    counts = None
    if lengths is not None or mask is not None:
        counts = counted_positions(memory, Masking(lengths, mask)).any(dim=1)
        counts = counts.repeat_interleave(queries, dim=0)
    flat = [
        None if x is None else x.reshape(batch * queries, source).to(memory.dtype)
        for x in (coverage, previous_weights)
    ]
    term = history(*flat, counts)
    if queries == 1:
        return (scored, memory_proj + term, None, v, memory, masking), None
    memory_proj = memory_proj.repeat_interleave(queries, dim=0) + term
    memory = memory.repeat_interleave(queries, dim=0)
    scored = scored.reshape(batch * queries, 1, scored.shape[-1])
    return (scored, memory_proj, None, v, memory, _folded(masking, batch, queries, source)), queries


def _folded(masking: MaskingFields, batch: int, queries: int, source: int) -> Masking:
    lengths, mask, keep, keep_scale, window = masking
    if lengths is not None:
        lengths = lengths.repeat_interleave(queries, dim=0)
    if mask is not None:
        cube = mask if mask.dim() == 3 else mask.unsqueeze(1)
        mask = cube.expand(batch, queries, source).reshape(batch * queries, 1, source)
    if keep is not None:
        keep = keep.reshape(batch * queries, 1, source)
    if window is not None:
        centers, half_width, gaussian = window
        window = LocalWindow(centers.reshape(batch * queries, 1), half_width, gaussian)
    return Masking(lengths, mask, keep, keep_scale, window)


def _check_history(
    name: str, tensor: Tensor | None, is_wanted: bool, scored: Tensor, memory: Tensor
) -> None:
    if tensor is None:
        return
    if not is_wanted:
        option = "coverage=True" if name == "coverage" else "conv_channels"
        raise ValueError(f"{name} must be None unless the layer was created with {option}")
    expected = (*scored.shape[:-1], memory.shape[1])
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point Tensor, got {type(tensor).__name__}")
    if tensor.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
