"""Checks that the operands of an operator fit together: shapes, dtypes and devices.

All backends written in Python use these checks. Native code has the same checks with the same
messages in csrc/call.h. The public functions have already checked their arguments; this is for
callers of the operators and for handmade `PreparedMemory` values. No values are read, sizes may be
symbolic, and a check costs 1 to 3 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_attn.reference import MaskingFields, Saved, arithmetic_dtype

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_EXP_DTYPES = (torch.float32, torch.bfloat16)  # of memory_exp, except for float64


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(
    name: str, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype is not dtype:
        if dtype is torch.bool:
            raise TypeError(f"{name} must be a bool Tensor, got {_name(tensor.dtype)}")
        raise TypeError(f"{name} must have the dtype {_name(dtype)}, got {_name(tensor.dtype)}")
    if tensor.device != device:
        raise TypeError(f"{name} must be on {device}, got a tensor on {tensor.device}")


class _Ends(NamedTuple):
    """The sizes, dtype and device of query and memory, which the other operands must match."""

    batch: int
    queries: int
    source: int
    width: int  # of the query
    dtype: torch.dtype
    device: torch.device


def _check_ends(name: str, query: Tensor, partner: str, memory: Tensor, is_dot: bool) -> _Ends:
    shape, rows = query.shape, memory.shape
    if len(shape) != 3 or len(rows) != 3:
        raise ValueError(
            f"{name} and {partner} must have shapes (B, T, K) and (B, S, E), got {tuple(shape)} "
            f"and {tuple(rows)}"
        )
    queries, width = shape[1], shape[2]
    if width < 1 or rows[2] < 1:
        raise ValueError(
            f"{name} and {partner} must have widths of at least 1, got shapes {tuple(shape)} and "
            f"{tuple(rows)}"
        )
    dtype, device = memory.dtype, memory.device
    _check(name, query, (rows[0], queries, rows[2] if is_dot else width), dtype, device)
    return _Ends(rows[0], queries, rows[1], width, dtype, device)


def _check_masking(masking: MaskingFields, ends: _Ends) -> None:
    lengths, mask, keep, _, window = masking
    batch, queries, source, _, dtype, device = ends
    if lengths is not None:
        kind = lengths.dtype
        if kind not in _INTEGERS:
            raise TypeError(f"memory_lengths must be an integer Tensor, got {_name(kind)}")
        _check("memory_lengths", lengths, (batch,), kind, device)
    if mask is not None:
        shape: tuple[int, ...] = (batch, source)
        if mask.dim() == 3:
            shape = (batch, 1 if mask.shape[1] == 1 else queries, source)
        _check("memory_mask", mask, shape, torch.bool, device)
    if keep is not None:
        _check("keep_mask", keep, (batch, queries, source), torch.bool, device)
    if window is not None:
        _check("window.centers", window[0], (batch, queries), arithmetic_dtype(dtype), device)


def check_dot(query: Tensor, memory: Tensor, masking: MaskingFields) -> None:
    """Check the operands of the dot score: ValueError for a shape, TypeError for anything else.

    query (B, T, E), memory (B, S, E), lengths int (B,), mask bool (B, S) or (B, 1 or T, S), keep
    bool (B, T, S), centers (B, T) in the dtype of the arithmetic; all on the device of memory.
    """
    _check_masking(masking, _check_ends("query", query, "memory", memory, is_dot=True))


def check_concat(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: MaskingFields,
) -> None:
    """Like `check_dot`, for query_proj (B, T, A), memory_proj and memory_exp (B, S, A), v (A,)."""
    ends = _check_ends("query_proj", query_proj, "memory", memory, is_dot=False)
    batch, _, source, width, dtype, device = ends
    _check("memory_proj", memory_proj, (batch, source, width), dtype, device)
    _check_score(ends, memory_exp, v, masking)


def check_scores(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    masking: MaskingFields,
) -> None:
    """Like `check_concat`, without a memory."""
    ends = _check_ends("query_proj", query_proj, "memory_proj", memory_proj, is_dot=True)
    _check_score(ends, memory_exp, v, masking)


def _check_score(ends: _Ends, memory_exp: Tensor | None, v: Tensor, masking: MaskingFields) -> None:
    batch, _, source, width, dtype, device = ends
    if memory_exp is not None:
        exp_dtype = memory_exp.dtype
        if dtype is torch.float64 or exp_dtype not in _EXP_DTYPES:
            exp_dtype = arithmetic_dtype(dtype)
        _check("memory_exp", memory_exp, (batch, source, width), exp_dtype, device)
    _check("v", v, (width,), dtype, device)
    _check_masking(masking, ends)


def check_grad_outputs(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    saved: Saved,
    query: Tensor,
    memory: Tensor,
    wanted: Sequence[bool],
    count: int,
) -> None:
    """Check the incoming gradients and the saved results of a forward call of these operands.

    grad_context and context (B, T, E), grad_weights and weights (B, T, S), logsumexp (B, T) in the
    dtype of the arithmetic. weights must be given if grad_weights is.
    """
    context, weights, logsumexp = saved
    dtype, device, (batch, source, width) = memory.dtype, memory.device, memory.shape
    queries = query.shape[1]
    _check("context", context, (batch, queries, width), dtype, device)
    if grad_context is not None:
        _check("grad_context", grad_context, (batch, queries, width), dtype, device)
    if grad_weights is not None:
        _check("grad_weights", grad_weights, (batch, queries, source), dtype, device)
    if grad_weights is not None or weights is not None:
        _check("weights", weights, (batch, queries, source), dtype, device)
    _check("logsumexp", logsumexp, (batch, queries), arithmetic_dtype(dtype), device)
    _check_wanted(wanted, count)


def check_grad_scores(
    grad_scores: Tensor, query_proj: Tensor, memory_proj: Tensor, wanted: Sequence[bool]
) -> None:
    """Check that a gradient of scores is (B, T, S) in the dtype of the arithmetic."""
    shape = (query_proj.shape[0], query_proj.shape[1], memory_proj.shape[1])
    dtype = arithmetic_dtype(memory_proj.dtype)
    _check("grad_scores", grad_scores, shape, dtype, memory_proj.device)
    _check_wanted(wanted, 3)


def check_grad_logsumexp(grad_logsumexp: Tensor | None, logsumexp: Tensor) -> None:
    """Check that the gradient of the log-sum-exp has its shape, dtype and device."""
    if grad_logsumexp is not None:
        kind = (logsumexp.dtype, logsumexp.device)
        _check("grad_logsumexp", grad_logsumexp, tuple(logsumexp.shape), *kind)


def _check_wanted(wanted: Sequence[bool], count: int) -> None:
    if len(wanted) != count:
        raise TypeError(f"wanted must be a list of {count} bools")


def check_rows(query: Tensor, offsets: Tensor, names: Sequence[str], *rows: Tensor | None) -> None:
    """Check ragged operands: ``rows``, each (N, width), with offsets (B + 1,).

    The last of ``rows`` is the memory, and the others must have its N. The values of offsets are
    not checked, because they may be on a GPU.
    """
    memory = rows[-1]
    assert memory is not None
    if query.dim() != 3 or memory.dim() != 2:
        raise ValueError(
            f"query and memory must have shapes (B, T, K) and (N, E), got {tuple(query.shape)} and "
            f"{tuple(memory.shape)}"
        )
    if offsets.dtype not in _INTEGERS:
        raise TypeError(f"offsets must be an integer Tensor, got {_name(offsets.dtype)}")
    _check("offsets", offsets, (query.shape[0] + 1,), offsets.dtype, memory.device)
    for name, tensor in zip(names, rows[:-1], strict=True):
        if tensor is not None:
            shape = (memory.shape[0], query.shape[2])
            _check(name, tensor, shape, tensor.dtype, memory.device)
