"""Attention over a ragged memory: sequences one after another, (N, E), with offsets.

This is the content of a nested tensor with jagged layout. Neither the memory nor its projection is
padded if the backend takes offsets (the cpu backend does). The operators pad it for other backends.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fused_attn import autograd
from fused_attn.routes import DIRECT, route

NestedTensor: Any
try:  # this class and the attributes used below are not public; without them memory is padded
    from torch.nested._internal.nested_tensor import NestedTensor
except ImportError:
    NestedTensor = ()
_PARTS = ("_values", "_offsets", "_lengths", "_ragged_idx", "_get_max_seqlen")


class Rows(NamedTuple):
    """The memory of B sequences. Sequence b is values[offsets[b] : offsets[b + 1]]."""

    values: Tensor  # (N, E)
    offsets: Tensor  # int64 (B + 1)
    longest: int  # S

    def stand_in(self) -> Tensor:
        """A view with shape (B, S, E), for checks of the other arguments against it."""
        return self.values[: self.longest].expand(self.offsets.shape[0] - 1, -1, -1)


def rows_of(memory: Any, *masks: object) -> Rows | None:
    """The rows of a jagged nested tensor (B, j, E), or None if the memory has to be padded.

    It has to be padded if the tensor has holes or is not on the CPU, if any of ``masks`` is given,
    or under a compiler, a mode or a transform.
    """
    if not isinstance(memory, NestedTensor) or any(mask is not None for mask in masks):
        return None
    if route() != DIRECT:
        return None
    if not all(hasattr(memory, part) for part in _PARTS):
        return None
    is_plain = memory.dim() == 3 and memory._ragged_idx == 1 and memory._lengths is None
    if not is_plain or memory._values.device.type != "cpu":
        return None
    # torch cannot compute the maximum length of a batch without sequences.
    longest = int(memory._get_max_seqlen()) if memory._offsets.shape[0] > 1 else 0
    return Rows(memory.values(), memory._offsets, longest)


def _options(backend: str, longest: int) -> tuple[Any, ...]:
    return (None, 1.0, backend, None, 0.0, False, longest)


def attend_dot(
    query: Tensor, rows: Rows, scale: float | Tensor, return_weights: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    """`functional.attend_dot` for a ragged memory; query (B, T, E) or (B, E)."""
    if isinstance(scale, Tensor):
        query, scale = query * scale.reshape(()).to(query.dtype), 1.0
    queries = query if query.dim() == 3 else query.unsqueeze(1)
    inputs = (queries, rows.values, rows.offsets)
    wanted = (None, return_weights, False, float(scale))
    result = autograd.call(autograd.DOT, inputs, *inputs, *wanted, *_options(backend, rows.longest))
    return _shaped(query, result)


def attend_concat(
    query_proj: Tensor,
    memory_proj: Tensor,
    v: Tensor,
    rows: Rows,
    return_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """`functional.attend_concat` for a ragged memory.

    query_proj is (B, T, A) or (B, A), memory_proj (N, A).
    """
    queries = query_proj if query_proj.dim() == 3 else query_proj.unsqueeze(1)
    inputs = (queries, memory_proj, None, v, rows.values, rows.offsets)
    wanted, options = (None, return_weights, False), _options(backend, rows.longest)
    result = autograd.call(autograd.CONCAT, inputs, *inputs, *wanted, *options)
    return _shaped(query_proj, result)


def _shaped(query: Tensor, result: Any) -> tuple[Tensor, Tensor | None]:
    context, weights, _ = result
    if query.dim() == 3:
        return context, weights
    return context.squeeze(1), None if weights is None else weights.squeeze(1)
