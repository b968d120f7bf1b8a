"""Memory of sequences one after another, (N, E) and offsets, attended to where it lies.

What a nested tensor of jagged layout holds. Nothing is padded, neither the memory nor its
projection, where the backend takes offsets (the CPU's does); operators pad it for the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_attn import autograd, reference
from fused_attn.reference import Masking

NestedTensor: Any
try:  # not public, and asked for attributes that are not: elsewhere such a memory is padded
    from torch.nested._internal.nested_tensor import NestedTensor
except ImportError:
    NestedTensor = ()
_PARTS = ("_values", "_offsets", "_lengths", "_ragged_idx", "_get_max_seqlen")


class Rows(NamedTuple):
    """The memory of B sequences: b has the rows offsets[b] to offsets[b + 1] - 1."""

    values: Tensor  # (N, E)
    offsets: Tensor  # int64 (B + 1)
    longest: int  # S

    def stand_in(self) -> Tensor:
        """A view of the shape (B, S, E), for checks of the arguments that go with it."""
        return self.values[: self.longest].expand(self.offsets.shape[0] - 1, -1, -1)


def rows_of(memory: Any, *masks: object) -> Rows | None:
    """The rows of a jagged nested tensor (B, j, E), or None for a memory to be padded.

    That is a tensor with holes, a call with masks beside the lengths (``masks`` are all None where
    there are none), and one that a compiler or a transform looks into.
    """
    if not isinstance(memory, NestedTensor) or any(mask is not None for mask in masks):
        return None
    if torch.compiler.is_compiling() or autograd.composes():
        return None
    if not all(hasattr(memory, part) for part in _PARTS):
        return None
    is_plain = memory.dim() == 3 and memory._ragged_idx == 1 and memory._lengths is None
    if not is_plain or memory._values.device.type != "cpu":
        return None
    # Of no sequences torch finds no longest one.
    longest = int(memory._get_max_seqlen()) if memory._offsets.shape[0] > 1 else 0
    return Rows(memory.values(), memory._offsets, longest)


class _DotAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        memory: Tensor,
        offsets: Tensor,
        longest: int,
        scale: float,
        return_weights: bool,
        backend: str,
    ) -> Any:
        ctx.scalars = (scale, longest, backend)
        outputs = autograd.DOT(
            *(query, memory, offsets, None, return_weights, True, scale),
            *_options(backend, longest),
        )
        return autograd.keep_for_backward(ctx, (query, memory, offsets), outputs)

    @staticmethod
    def backward(ctx: Any, grad_context: Any, grad_weights: Any = None) -> Any:
        query, memory, offsets, *saved = ctx.saved_tensors
        scale, longest, backend = ctx.scalars
        grads: Any
        if torch.is_grad_enabled():  # create_graph=True
            query, memory = reference.apart(query, memory)
            padded = reference.pad_rows(memory, offsets, longest)
            masking = Masking(offsets.diff())
            result = reference.dot_attention(query, padded, scale, masking)
            grads = autograd.graph_gradients(result, (query, memory), grad_context, grad_weights)
        else:
            grads = autograd.DOT_BACKWARD(
                *(grad_context, grad_weights, query, memory, *saved, offsets, None, scale),
                *_options(backend, longest),
            )
        return *grads[:2], None, None, None, None, None


class _ConcatAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_proj: Tensor,
        memory_proj: Tensor,
        v: Tensor,
        memory: Tensor,
        offsets: Tensor,
        longest: int,
        return_weights: bool,
        backend: str,
    ) -> Any:
        ctx.scalars = (longest, backend)
        outputs = autograd.CONCAT(
            *(query_proj, memory_proj, None, v, memory, offsets, None, return_weights, True),
            *_options(backend, longest),
        )
        return autograd.keep_for_backward(
            ctx, (query_proj, memory_proj, v, memory, offsets), outputs
        )

    @staticmethod
    def backward(ctx: Any, grad_context: Any, grad_weights: Any = None) -> Any:
        query_proj, memory_proj, v, memory, offsets, *saved = ctx.saved_tensors
        longest, backend = ctx.scalars
        grads: Any
        if torch.is_grad_enabled():
            inputs = reference.apart(query_proj, memory_proj, v, memory)
            query_proj, memory_proj, v, memory = inputs
            rows = (reference.pad_rows(t, offsets, longest) for t in (memory_proj, memory))
            proj, padded = rows
            masking = Masking(offsets.diff())
            result = reference.concat_attention(query_proj, proj, v, padded, masking)
            grads = autograd.graph_gradients(result, inputs, grad_context, grad_weights)
        else:
            grads = autograd.CONCAT_BACKWARD(
                *(grad_context, grad_weights, query_proj, memory_proj, None, v, memory, *saved),
                *(offsets, None, *_options(backend, longest)),
            )
        return *grads[:4], None, None, None, None


def _options(backend: str, longest: int) -> tuple[Any, ...]:
    return (None, 1.0, backend, None, 0.0, False, longest)


def attend_dot(
    query: Tensor, rows: Rows, scale: float | Tensor, return_weights: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    """`functional.attend_dot` of such a memory; query (B, T, E) or (B, E)."""
    if isinstance(scale, Tensor):
        query, scale = query * scale.reshape(()).to(query.dtype), 1.0
    queries = query if query.dim() == 3 else query.unsqueeze(1)
    result = _DotAttention.apply(queries, *rows, float(scale), return_weights, backend)
    return _shaped(query, result, return_weights)


def attend_concat(
    query_proj: Tensor,
    memory_proj: Tensor,
    v: Tensor,
    rows: Rows,
    return_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """`functional.attend_concat`; query_proj (B, T, A) or (B, A), memory_proj (N, A)."""
    queries = query_proj if query_proj.dim() == 3 else query_proj.unsqueeze(1)
    result = _ConcatAttention.apply(queries, memory_proj, v, *rows, return_weights, backend)
    return _shaped(query_proj, result, return_weights)


def _shaped(query: Tensor, result: Any, return_weights: bool) -> tuple[Tensor, Tensor | None]:
    context, weights = result if return_weights else (result, None)
    if query.dim() == 3:
        return context, weights
    return context.squeeze(1), None if weights is None else weights.squeeze(1)
