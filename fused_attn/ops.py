"""The operators: schema, fake, implementation and autograd, and nothing else.

`torch.library` define/impl/register_fake with one plain `autograd.Function` per operator: the
cheapest registration that torch.compile, torch.export and FakeTensor understand. A backend is
chosen inside the implementation, so a compiler never traces that choice.

Saved for backward are the inputs, the context, the log-sum-exp, and the weights if they were
returned; without those the scores are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_attn import backends, reference
from fused_attn.reference import Masking, Outputs

# Defaults let a call leave out its last arguments (see `_options`).
_POSITIONS = "Tensor? memory_lengths=None, Tensor? memory_mask=None"
_WANTED = "bool return_weights=False, bool return_logsumexp=False"
_KEEP = "Tensor? keep_mask=None, float keep_scale=1.0"
_BACKEND = 'str backend="auto"'
_OUTPUTS = "(Tensor context, Tensor weights, Tensor logsumexp)"
_SAVED = "Tensor context, Tensor? weights, Tensor logsumexp"
_CONCAT_INPUTS = (
    "Tensor query_proj, Tensor memory_proj, Tensor? memory_exp, Tensor v, Tensor memory"
)

# Of the results of a forward operator, those not asked for are None, as in aten's operators with an
# output mask: a tensor takes 1 us to make, and a decoding step needs the context only.
_library = torch.library.Library("fused_attn", "DEF")
_library.define(
    f"dot_attention(Tensor query, Tensor memory, {_POSITIONS}, {_WANTED}, "
    f"float scale=1.0, {_KEEP}, {_BACKEND}) -> {_OUTPUTS}"
)
_library.define(
    "dot_attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, "
    f"Tensor memory, {_SAVED}, {_POSITIONS}, float scale=1.0, {_KEEP}, {_BACKEND}) "
    "-> (Tensor, Tensor)"
)
_library.define(
    f"concat_attention({_CONCAT_INPUTS}, {_POSITIONS}, {_WANTED}, {_KEEP}, {_BACKEND}) "
    f"-> {_OUTPUTS}"
)
_library.define(
    "concat_attention_backward(Tensor? grad_context, Tensor? grad_weights, "
    f"{_CONCAT_INPUTS}, {_SAVED}, {_POSITIONS}, {_KEEP}, {_BACKEND}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _select(
    query: Tensor,
    memory: Tensor,
    score: str,
    backend: str,
    backward: bool = False,
    prepared: bool = False,
) -> backends.Backend:
    if memory.is_cpu:  # the sizes and the device's name would take 0.6 us, and decide nothing
        return backends.select("cpu", memory.dtype, score, backend)
    sizes = (query.shape[1], memory.shape[2], query.shape[2])
    kind = (memory.device.type, memory.dtype, score, backend)
    return backends.select(*kind, sizes, backward, prepared)


def _dot_forward(
    query: Tensor,
    memory: Tensor,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
    scale: float = 1.0,
    keep_mask: Tensor | None = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
) -> Outputs:
    chosen = _select(query, memory, "dot", backend)
    masking = (memory_lengths, memory_mask, keep_mask, keep_scale)
    return chosen.dot_forward(query, memory, scale, masking, return_weights, return_logsumexp)


def _dot_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    memory: Tensor,
    context: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_mask: Tensor | None = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    chosen = _select(query, memory, "dot", backend, backward=True)
    masking = (memory_lengths, memory_mask, keep_mask, keep_scale)
    saved = (context, weights, logsumexp)
    return chosen.dot_backward(grad_context, grad_weights, query, memory, scale, masking, saved)


def _concat_forward(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
    keep_mask: Tensor | None = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
) -> Outputs:
    prepared = memory_exp is not None
    chosen = _select(query_proj, memory, "concat", backend, prepared=prepared)
    masking = (memory_lengths, memory_mask, keep_mask, keep_scale)
    inputs = (query_proj, memory_proj, memory_exp, v, memory)
    return chosen.concat_forward(*inputs, masking, return_weights, return_logsumexp)


def _concat_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    context: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    keep_mask: Tensor | None = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    prepared = memory_exp is not None
    chosen = _select(query_proj, memory, "concat", backend, backward=True, prepared=prepared)
    masking = (memory_lengths, memory_mask, keep_mask, keep_scale)
    inputs = (query_proj, memory_proj, memory_exp, v, memory)
    saved = (context, weights, logsumexp)
    return chosen.concat_backward(grad_context, grad_weights, *inputs, masking, saved)


def _fake_outputs(
    query: Tensor, memory: Tensor, return_weights: bool, return_logsumexp: bool
) -> Outputs:
    batch, queries, _ = query.shape
    _, source, width = memory.shape
    statistics = reference.arithmetic_dtype(memory.dtype)
    return (
        memory.new_empty((batch, queries, width)),
        memory.new_empty((batch, queries, source)) if return_weights else None,
        memory.new_empty((batch, queries), dtype=statistics) if return_logsumexp else None,
    )


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


def _dot_fake(
    query: Tensor,
    memory: Tensor,
    memory_lengths: Any = None,
    memory_mask: Any = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
    *rest: Any,
) -> Outputs:
    return _fake_outputs(query, memory, return_weights, return_logsumexp)


def _dot_backward_fake(
    grad_context: Any, grad_weights: Any, query: Tensor, memory: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _empty(query), _empty(memory)


def _concat_fake(
    query_proj: Tensor,
    memory_proj: Any,
    memory_exp: Any,
    v: Any,
    memory: Tensor,
    memory_lengths: Any = None,
    memory_mask: Any = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
    *rest: Any,
) -> Outputs:
    return _fake_outputs(query_proj, memory, return_weights, return_logsumexp)


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


def _options(keep_mask: Tensor | None, keep_scale: float, backend: str) -> tuple[Any, ...]:
    """The last arguments of an operator, none of them where all are the schema's defaults.

    Argument by argument the dispatcher takes 0.1 us, even for a default that is spelled out.
    """
    return () if keep_mask is None and backend == "auto" else (keep_mask, keep_scale, backend)


class _DotAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        memory: Tensor,
        scale: float,
        lengths: Tensor | None,
        mask: Tensor | None,
        keep: Tensor | None,
        keep_scale: float,
        return_weights: bool,
        backend: str,
    ) -> Any:
        options = _options(keep, keep_scale, backend)
        outputs = _DOT(query, memory, lengths, mask, return_weights, True, scale, *options)
        ctx.scalars = (scale, keep_scale, backend)
        return _keep(ctx, (query, memory, lengths, mask, keep), outputs)

    @staticmethod
    def backward(ctx: Any, grad_context: Any, grad_weights: Any = None) -> Any:
        query, memory, lengths, mask, keep, *saved = ctx.saved_tensors
        scale, keep_scale, backend = ctx.scalars
        if torch.is_grad_enabled():  # create_graph=True: the reference knows second derivatives
            masking = Masking(lengths, mask, keep, keep_scale)
            result = reference.dot_attention(query, memory, scale, masking)
            grads = _graph_gradients(result, (query, memory), grad_context, grad_weights)
        else:
            inputs = (query, memory, *saved, lengths, mask, scale)
            options = _options(keep, keep_scale, backend)
            grads = _DOT_BACKWARD(grad_context, grad_weights, *inputs, *options)
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
        lengths: Tensor | None,
        mask: Tensor | None,
        keep: Tensor | None,
        keep_scale: float,
        return_weights: bool,
        backend: str,
    ) -> Any:
        inputs = (query_proj, memory_proj, memory_exp, v, memory, lengths, mask)
        options = _options(keep, keep_scale, backend)
        outputs = _CONCAT(*inputs, return_weights, True, *options)
        ctx.scalars = (keep_scale, backend)
        return _keep(ctx, (*inputs, keep), outputs)

    @staticmethod
    def backward(ctx: Any, grad_context: Any, grad_weights: Any = None) -> Any:
        query_proj, memory_proj, memory_exp, v, memory, *rest = ctx.saved_tensors
        keep_scale, backend = ctx.scalars
        lengths, mask, keep, *saved = rest
        if torch.is_grad_enabled():
            inputs = (query_proj, memory_proj, v, memory)
            masking = Masking(lengths, mask, keep, keep_scale)
            result = reference.concat_attention(*inputs, masking)
            grads = _graph_gradients(result, inputs, grad_context, grad_weights)
        else:
            operands = (query_proj, memory_proj, memory_exp, v, memory, *saved, lengths, mask)
            options = _options(keep, keep_scale, backend)
            grads = _CONCAT_BACKWARD(grad_context, grad_weights, *operands, *options)
        grad_query_proj, grad_memory_proj, grad_v, grad_memory = grads
        return grad_query_proj, grad_memory_proj, None, grad_v, grad_memory, *(None,) * 6


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], outputs: Outputs) -> Any:
    """Save what the backward needs, and return what is differentiable of ``outputs``."""
    ctx.save_for_backward(*inputs, *outputs)
    context, weights, _ = outputs
    if weights is None:
        return context
    ctx.set_materialize_grads(False)  # one of the two may get no gradient
    return context, weights


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
) -> tuple[Tensor, Tensor | None]:
    """Dot attention on checked arguments: (context, weights or None)."""
    if torch.is_grad_enabled() and (query.requires_grad or memory.requires_grad):
        masking = (memory_lengths, memory_mask, keep_mask, keep_scale)
        result = _DotAttention.apply(query, memory, scale, *masking, return_weights, backend)
        return result if return_weights else (result, None)
    options: tuple[Any, ...] = _options(keep_mask, keep_scale, backend)
    if options or scale != 1.0:
        options = (scale, *options)
    elif memory_lengths is None and memory_mask is None and not return_weights:
        return _DOT(query, memory)[0], None
    wanted = (return_weights, False)
    context, weights, _ = _DOT(query, memory, memory_lengths, memory_mask, *wanted, *options)
    return context, weights


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
) -> tuple[Tensor, Tensor | None]:
    """Concat attention on checked projections: (context, weights or None).

    ``memory_exp`` (B, S, A) may hold `exponentials` of ``memory_proj``; it carries no gradient.
    """
    inputs = (query_proj, memory_proj, memory_exp, v, memory)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        masking = (memory_lengths, memory_mask, keep_mask, keep_scale)
        result = _ConcatAttention.apply(*inputs, *masking, return_weights, backend)
        return result if return_weights else (result, None)
    options = _options(keep_mask, keep_scale, backend)
    wanted = (return_weights, False)
    context, weights, _ = _CONCAT(*inputs, memory_lengths, memory_mask, *wanted, *options)
    return context, weights
