"""SIMD C++ on the CPU (csrc/cpu): allocation, strides and addresses for `fused_attn._C`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch  # before _C: both then share the OpenMP runtime that torch loads
from torch import Tensor

from fused_attn.problem import AttentionProblem
from fused_attn.reference import Masking, arithmetic_dtype

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NO_ROWS = (0, 0, 0)

native: Any
try:
    from fused_attn import _C as native
except ImportError as error:
    native, _import_error = None, str(error)


@cache
def unavailable_reasons() -> list[str]:
    if native is None:
        note = Path(__file__).parent.parent / "_native_build_error.txt"
        why = note.read_text(encoding="utf-8").strip() if note.exists() else _import_error
        return [f"the native module fused_attn._C is not there: {why}"]
    native.cpu_isa()  # raises, naming FUSED_ATTN_CPU_ISA, if that asks for the impossible
    return []


def not_supported_reasons(problem: AttentionProblem) -> list[str]:
    reasons = list(unavailable_reasons())
    if problem.device_type != "cpu":
        reasons.append(f"it runs on the cpu, not on {problem.device_type}")
    if problem.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        reasons.append(f"dtype {problem.dtype} is none of {names}")
    return reasons


def _unit_rows(tensor: Tensor) -> Tensor:
    """The kernels want a unit stride in the last dimension; other strides may be anything."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(tensor: Tensor) -> tuple[int, int, int]:
    stride = tensor.stride()
    return tensor.data_ptr(), stride[0], stride[1]


def _masking(masking: Masking) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The addresses of what masks, and the tensors to keep alive behind them."""
    lengths, mask, keep, keep_scale = masking
    if lengths is None and mask is None and keep is None:
        return (0, 0, 0, 0, 0, 0, 1.0), ()
    lengths = None if lengths is None else lengths.contiguous()
    keep = None if keep is None else keep.contiguous()
    mask_at = (0, 0, 0, 0)
    if mask is not None:
        step = 0 if mask.shape[1] == 1 else mask.stride(1)
        mask_at = (mask.data_ptr(), mask.stride(0), step, mask.stride(2))
    lengths_at = 0 if lengths is None else lengths.data_ptr()
    keep_at = 0 if keep is None else keep.data_ptr()
    return (lengths_at, *mask_at, keep_at, keep_scale), (lengths, mask, keep)


def _outputs(
    query: Tensor, memory: Tensor, return_weights: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
    batch, queries, _ = query.shape
    _, source, width = memory.shape
    context = memory.new_empty((batch, queries, width))
    weights = memory.new_empty((batch, queries, source) if return_weights else (0,))
    logsumexp = memory.new_empty((batch, queries), dtype=arithmetic_dtype(memory.dtype))
    saved = (context, weights, logsumexp)
    return saved, _saved(saved, return_weights)


def _saved(saved: tuple[Tensor, ...], with_weights: bool) -> tuple[int, int, int]:
    context, weights, logsumexp = saved
    return context.data_ptr(), weights.data_ptr() if with_weights else 0, logsumexp.data_ptr()


def _sizes(query: Tensor, memory: Tensor) -> tuple[int, int, int, int, int]:
    batch, queries, score_width = query.shape
    _, source, width = memory.shape
    return batch, queries, source, width, score_width


def _like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _seeds(
    grad_context: Tensor | None, grad_weights: Tensor | None, context: Tensor
) -> tuple[Tensor, Tensor | None, tuple[Any, Any]]:
    seed = torch.zeros_like(context) if grad_context is None else _unit_rows(grad_context)
    extra = None if grad_weights is None else _unit_rows(grad_weights)
    return seed, extra, (_rows(seed), _NO_ROWS if extra is None else _rows(extra))


def dot_forward(
    query: Tensor, memory: Tensor, scale: float, masking: Masking, return_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    query, memory = _unit_rows(query), _unit_rows(memory)
    masks, _alive = _masking(masking)
    results, addresses = _outputs(query, memory, return_weights)
    native.dot_forward(
        _DTYPES[memory.dtype],
        _sizes(query, memory),
        torch.get_num_threads(),
        _rows(query),
        _rows(memory),
        masks,
        addresses,
        scale,
    )
    return results


def dot_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    memory: Tensor,
    scale: float,
    masking: Masking,
    saved: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    query, memory = _unit_rows(query), _unit_rows(memory)
    masks, _alive = _masking(masking)
    _seed, extra, seeds = _seeds(grad_context, grad_weights, saved[0])
    grads = (_like(query), _like(memory))
    native.dot_backward(
        _DTYPES[memory.dtype],
        _sizes(query, memory),
        torch.get_num_threads(),
        _rows(query),
        _rows(memory),
        masks,
        _saved(saved, extra is not None),
        scale,
        (*seeds, grads[0].data_ptr(), grads[1].data_ptr(), 0, 0),
    )
    return grads


def _concat(
    memory_proj: Tensor, memory_exp: Tensor | None, v: Tensor
) -> tuple[tuple[int, int, int], tuple[int, int, int], int, int]:
    exp_rows = _NO_ROWS if memory_exp is None else _rows(memory_exp)
    exp_dtype = 0 if memory_exp is None else _DTYPES[memory_exp.dtype]
    return _rows(memory_proj), exp_rows, exp_dtype, v.data_ptr()


def _concat_operands(
    query_proj: Tensor, memory_proj: Tensor, memory_exp: Tensor | None, v: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    exp = None if memory_exp is None else _unit_rows(memory_exp)
    return _unit_rows(query_proj), _unit_rows(memory_proj), exp, v.contiguous(), _unit_rows(memory)


def concat_forward(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: Masking,
    return_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    operands = _concat_operands(query_proj, memory_proj, memory_exp, v, memory)
    query_proj, memory_proj, memory_exp, v, memory = operands
    masks, _alive = _masking(masking)
    results, addresses = _outputs(query_proj, memory, return_weights)
    native.concat_forward(
        _DTYPES[memory.dtype],
        _sizes(query_proj, memory),
        torch.get_num_threads(),
        _rows(query_proj),
        _rows(memory),
        masks,
        addresses,
        _concat(memory_proj, memory_exp, v),
    )
    return results


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
    operands = _concat_operands(query_proj, memory_proj, memory_exp, v, memory)
    query_proj, memory_proj, memory_exp, v, memory = operands
    masks, _alive = _masking(masking)
    _seed, extra, seeds = _seeds(grad_context, grad_weights, saved[0])
    grads = (_like(query_proj), _like(memory_proj), _like(v), _like(memory))
    query_at, proj_at, v_at, memory_at = (grad.data_ptr() for grad in grads)
    native.concat_backward(
        _DTYPES[memory.dtype],
        _sizes(query_proj, memory),
        torch.get_num_threads(),
        _rows(query_proj),
        _rows(memory),
        masks,
        _saved(saved, extra is not None),
        _concat(memory_proj, memory_exp, v),
        (*seeds, query_at, memory_at, proj_at, v_at),
    )
    return grads
