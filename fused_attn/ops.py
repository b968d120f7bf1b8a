"""The operators: schema, fake, implementation and autograd, and nothing else.

`torch.library` define/impl/register_fake with one plain `autograd.Function` per operator: the
cheapest registration that torch.compile, torch.export and FakeTensor understand. A backend is
chosen inside the implementation, so a compiler never traces that choice.

Saved for backward are the inputs, the context and the log-sum-exp; scores are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_attn import backends, reference
from fused_attn.reference import Masking

_MASKING = "Tensor? memory_lengths, Tensor? memory_mask, Tensor? keep_mask, float keep_scale"
_SAVED = "Tensor context, Tensor weights, Tensor logsumexp"

_library = torch.library.Library("fused_attn", "DEF")
_library.define(
    f"dot_attention(Tensor query, Tensor memory, float scale, {_MASKING}, "
    "bool return_weights, str backend) -> (Tensor context, Tensor weights, Tensor logsumexp)"
)
_library.define(
    "dot_attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, "
    f"Tensor memory, float scale, {_MASKING}, str backend, {_SAVED}) -> (Tensor, Tensor)"
)
_library.define(
    "concat_attention(Tensor query_proj, Tensor memory_proj, Tensor? memory_exp, Tensor v, "
    f"Tensor memory, {_MASKING}, bool return_weights, str backend) "
    "-> (Tensor context, Tensor weights, Tensor logsumexp)"
)
_library.define(
    "concat_attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query_proj, "
    f"Tensor memory_proj, Tensor? memory_exp, Tensor v, Tensor memory, {_MASKING}, str backend, "
    f"{_SAVED}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _check_lengths(memory_lengths: Tensor | None, source: int) -> None:
    """Refuse a length outside 0..S. Lengths on a GPU are not read back to check them."""
    if memory_lengths is None or memory_lengths.device.type != "cpu" or not len(memory_lengths):
        return
    low, high = (int(bound) for bound in memory_lengths.aminmax())
    if low < 0 or high > source:
        bad = low if low < 0 else high
        raise ValueError(
            f"memory_lengths must lie in 0..{source} (the source length of memory), got {bad}"
        )


def _dot_forward(
    query: Tensor,
    memory: Tensor,
    scale: float,
    memory_lengths: Tensor | None,
    memory_mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_scale: float,
    return_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_lengths(memory_lengths, memory.shape[1])
    chosen = backends.select(memory.device.type, memory.dtype, "dot", backend)
    masking = Masking(memory_lengths, memory_mask, keep_mask, keep_scale)
    return chosen.dot_forward(query, memory, scale, masking, return_weights)


def _dot_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    memory: Tensor,
    scale: float,
    memory_lengths: Tensor | None,
    memory_mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_scale: float,
    backend: str,
    *saved: Tensor,
) -> tuple[Tensor, ...]:
    chosen = backends.select(memory.device.type, memory.dtype, "dot", backend)
    masking = Masking(memory_lengths, memory_mask, keep_mask, keep_scale)
    return chosen.dot_backward(grad_context, grad_weights, query, memory, scale, masking, saved)


def _concat_forward(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    memory_lengths: Tensor | None,
    memory_mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_scale: float,
    return_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_lengths(memory_lengths, memory.shape[1])
    chosen = backends.select(memory.device.type, memory.dtype, "concat", backend)
    masking = Masking(memory_lengths, memory_mask, keep_mask, keep_scale)
    inputs = (query_proj, memory_proj, memory_exp, v, memory)
    return chosen.concat_forward(*inputs, masking, return_weights)


def _concat_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    memory_lengths: Tensor | None,
    memory_mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_scale: float,
    backend: str,
    *saved: Tensor,
) -> tuple[Tensor, ...]:
    chosen = backends.select(memory.device.type, memory.dtype, "concat", backend)
    masking = Masking(memory_lengths, memory_mask, keep_mask, keep_scale)
    inputs = (query_proj, memory_proj, memory_exp, v, memory)
    return chosen.concat_backward(grad_context, grad_weights, *inputs, masking, saved)


def _fake_outputs(query: Tensor, memory: Tensor, return_weights: bool) -> tuple[Tensor, ...]:
    batch, queries, _ = query.shape
    _, source, width = memory.shape
    weights = memory.new_empty((batch, queries, source) if return_weights else (0,))
    statistics = reference.arithmetic_dtype(memory.dtype)
    return (
        memory.new_empty((batch, queries, width)),
        weights,
        memory.new_empty((batch, queries), dtype=statistics),
    )


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


def _dot_fake(query: Tensor, memory: Tensor, scale: float, *common: Any) -> tuple[Tensor, ...]:
    return _fake_outputs(query, memory, common[4])


def _dot_backward_fake(
    grad_context: Any, grad_weights: Any, query: Tensor, memory: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _empty(query), _empty(memory)


def _concat_fake(
    query_proj: Tensor, memory_proj: Any, memory_exp: Any, v: Any, memory: Tensor, *common: Any
) -> tuple[Tensor, ...]:
    return _fake_outputs(query_proj, memory, common[4])


def _concat_backward_fake(
    grad_context: Any,
    grad_weights: Any,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Any,
    v: Tensor,
    memory: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _empty(query_proj), _empty(memory_proj), _empty(v), _empty(memory)


for _name, _implementation, _fake in (
    ("dot_attention", _dot_forward, _dot_fake),
    ("dot_attention_backward", _dot_backward, _dot_backward_fake),
    ("concat_attention", _concat_forward, _concat_fake),
    ("concat_attention_backward", _concat_backward, _concat_backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_attn::{_name}", _fake, lib=_library)

_DOT = torch.ops.fused_attn.dot_attention.default
_DOT_BACKWARD = torch.ops.fused_attn.dot_attention_backward.default
_CONCAT = torch.ops.fused_attn.concat_attention.default
_CONCAT_BACKWARD = torch.ops.fused_attn.concat_attention_backward.default


class _DotAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, memory: Tensor, scale: float, *common: Any) -> Any:
        outputs = _DOT(query, memory, scale, *common)
        ctx.save_for_backward(query, memory, *common[:3], *outputs)
        ctx.scalars = (scale, common[3], common[5])
        ctx.mark_non_differentiable(outputs[2])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_context: Any, grad_weights: Any, _: Any) -> Any:
        query, memory, lengths, mask, keep, *saved = ctx.saved_tensors
        scale, keep_scale, backend = ctx.scalars
        grad_weights = _asked_for(grad_weights)
        masking = Masking(lengths, mask, keep, keep_scale)
        if torch.is_grad_enabled():  # create_graph=True: the reference knows second derivatives
            result = reference.dot_attention(query, memory, scale, masking)
            grads = _graph_gradients(result, (query, memory), grad_context, grad_weights)
        else:
            inputs = (query, memory, scale, *masking)
            grads = _DOT_BACKWARD(grad_context, grad_weights, *inputs, backend, *saved)
        return *grads, *(None,) * 7


class _ConcatAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_proj: Tensor,
        memory_proj: Tensor,
        memory_exp: Tensor | None,
        v: Tensor,
        memory: Tensor,
        *common: Any,
    ) -> Any:
        inputs = (query_proj, memory_proj, memory_exp, v, memory)
        outputs = _CONCAT(*inputs, *common)
        ctx.save_for_backward(*inputs, *common[:3], *outputs)
        ctx.scalars = (common[3], common[5])
        ctx.mark_non_differentiable(outputs[2])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_context: Any, grad_weights: Any, _: Any) -> Any:
        query_proj, memory_proj, memory_exp, v, memory, *rest = ctx.saved_tensors
        keep_scale, backend = ctx.scalars
        grad_weights = _asked_for(grad_weights)
        lengths, mask, keep, *saved = rest
        masking = Masking(lengths, mask, keep, keep_scale)
        if torch.is_grad_enabled():
            inputs = (query_proj, memory_proj, v, memory)
            result = reference.concat_attention(*inputs, masking)
            grads = _graph_gradients(result, inputs, grad_context, grad_weights)
        else:
            operands = (query_proj, memory_proj, memory_exp, v, memory, *masking)
            grads = _CONCAT_BACKWARD(grad_context, grad_weights, *operands, backend, *saved)
        grad_query_proj, grad_memory_proj, grad_v, grad_memory = grads
        return grad_query_proj, grad_memory_proj, None, grad_v, grad_memory, *(None,) * 6


def _asked_for(grad_weights: Tensor | None) -> Tensor | None:
    """None for the empty gradient that AOTAutograd makes up for weights which were not returned."""
    return None if grad_weights is None or grad_weights.dim() == 1 else grad_weights


def _graph_gradients(
    result: reference.Attention,
    inputs: tuple[Tensor, ...],
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
) -> list[Tensor | None]:
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(reference.gradients(result, wanted, grad_context, grad_weights, True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


def dot_attention(
    query: Tensor,
    memory: Tensor,
    scale: float,
    memory_lengths: Tensor | None,
    memory_mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_scale: float,
    return_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dot attention on checked arguments: (context, weights or an empty tensor, log-sum-exp)."""
    common = (memory_lengths, memory_mask, keep_mask, keep_scale, return_weights, backend)
    if torch.is_grad_enabled() and (query.requires_grad or memory.requires_grad):
        return _DotAttention.apply(query, memory, scale, *common)
    return _DOT(query, memory, scale, *common)


def concat_attention(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    memory_lengths: Tensor | None,
    memory_mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_scale: float,
    return_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Concat attention on checked projections: (context, weights or an empty tensor, log-sum-exp).

    ``memory_exp`` (B, S, A) may hold `exponentials` of ``memory_proj``; it carries no gradient.
    """
    inputs = (query_proj, memory_proj, memory_exp, v, memory)
    common = (memory_lengths, memory_mask, keep_mask, keep_scale, return_weights, backend)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _ConcatAttention.apply(*inputs, *common)
    return _CONCAT(*inputs, *common)
