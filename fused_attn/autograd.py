"""The operators under autograd: what is saved, and which gradients come back.

One plain `autograd.Function` per operator. Saved for backward are the inputs, the context, the
log-sum-exp, and the weights if they were returned; without those the scores are computed again.
Second derivatives come from the reference. So does everything under a transform of torch.func, in
forward mode and in an export to ONNX: what these need is a composition of ATen operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_attn import ops, reference
from fused_attn.reference import Masking, Outputs

assert ops  # it defines the operators
DOT = torch.ops.fused_attn.dot_attention.default
DOT_BACKWARD = torch.ops.fused_attn.dot_attention_backward.default
CONCAT = torch.ops.fused_attn.concat_attention.default
CONCAT_BACKWARD = torch.ops.fused_attn.concat_attention_backward.default
_SCORES = torch.ops.fused_attn.concat_scores.default
_SCORES_BACKWARD = torch.ops.fused_attn.concat_scores_backward.default

# Whether a transform of torch.func (vmap, grad, jvp) is under way: the top of its stack, or None.
_transform: Any = torch._C._functorch.peek_interpreter_stack


def composes() -> bool:
    """Whether the call has to be made of ATen operators. Takes 0.25 us."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    return _transform() is not None or forward_ad._current_level >= 0


def _composed(
    result: reference.Attention, dtype: torch.dtype, return_weights: bool
) -> tuple[Tensor, Tensor | None]:
    return result.context.to(dtype), result.weights.to(dtype) if return_weights else None


Window = tuple[Tensor, float, bool] | None


def _options(
    keep_mask: Tensor | None, keep_scale: float, window: Window, backend: str
) -> tuple[Any, ...]:
    """The last arguments of an operator, none of them where all are the schema's defaults.

    Argument by argument the dispatcher takes 0.1 us, even for a default that is spelled out.
    """
    if window is not None:
        return (keep_mask, keep_scale, backend, *window)
    return () if keep_mask is None and backend == "auto" else (keep_mask, keep_scale, backend)


def _window(centers: Tensor | None, shape: tuple[float, bool]) -> Window:
    return None if centers is None else (centers, *shape)


class _DotAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        memory: Tensor,
        centers: Tensor | None,
        scale: float,
        lengths: Tensor | None,
        mask: Tensor | None,
        keep: Tensor | None,
        keep_scale: float,
        shape: tuple[float, bool],
        return_weights: bool,
        backend: str,
    ) -> Any:
        options = _options(keep, keep_scale, _window(centers, shape), backend)
        outputs = DOT(query, memory, lengths, mask, return_weights, True, scale, *options)
        ctx.scalars = (scale, keep_scale, shape, backend)
        return keep_for_backward(ctx, (query, memory, centers, lengths, mask, keep), outputs)

    @staticmethod
    def backward(ctx: Any, grad_context: Any, grad_weights: Any = None) -> Any:
        query, memory, centers, lengths, mask, keep, *saved = ctx.saved_tensors
        scale, keep_scale, shape, backend = ctx.scalars
        window = _window(centers, shape)
        grads: Any
        if torch.is_grad_enabled():  # create_graph=True: the reference knows second derivatives
            masking = reference.as_masking((lengths, mask, keep, keep_scale, window))
            result = reference.dot_attention(query, memory, scale, masking)
            grads = graph_gradients(result, (query, memory, centers), grad_context, grad_weights)
        else:
            inputs = (query, memory, *saved, lengths, mask, scale)
            options = _options(keep, keep_scale, window, backend)
            grads = DOT_BACKWARD(grad_context, grad_weights, *inputs, *options)
        return *grads, *(None,) * 8


class _ConcatAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_proj: Tensor,
        memory_proj: Tensor,
        memory_exp: Tensor | None,
        v: Tensor,
        memory: Tensor,
        centers: Tensor | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        keep: Tensor | None,
        keep_scale: float,
        shape: tuple[float, bool],
        return_weights: bool,
        backend: str,
    ) -> Any:
        inputs = (query_proj, memory_proj, memory_exp, v, memory, lengths, mask)
        options = _options(keep, keep_scale, _window(centers, shape), backend)
        outputs = CONCAT(*inputs, return_weights, True, *options)
        ctx.scalars = (keep_scale, shape, backend)
        return keep_for_backward(ctx, (*inputs, centers, keep), outputs)

    @staticmethod
    def backward(ctx: Any, grad_context: Any, grad_weights: Any = None) -> Any:
        query_proj, memory_proj, memory_exp, v, memory, *rest = ctx.saved_tensors
        keep_scale, shape, backend = ctx.scalars
        lengths, mask, centers, keep, *saved = rest
        window = _window(centers, shape)
        grads: Any
        if torch.is_grad_enabled():
            inputs = (query_proj, memory_proj, v, memory, centers)
            masking = reference.as_masking((lengths, mask, keep, keep_scale, window))
            result = reference.concat_attention(*inputs[:4], masking)
            grads = graph_gradients(result, inputs, grad_context, grad_weights)
        else:
            operands = (query_proj, memory_proj, memory_exp, v, memory, *saved, lengths, mask)
            options = _options(keep, keep_scale, window, backend)
            grads = CONCAT_BACKWARD(grad_context, grad_weights, *operands, *options)
        grad_query_proj, grad_memory_proj, *grads = grads
        return grad_query_proj, grad_memory_proj, None, *grads, *(None,) * 7


def keep_for_backward(ctx: Any, inputs: tuple[Tensor | None, ...], outputs: Outputs) -> Any:
    """Save what the backward needs, and return what is differentiable of ``outputs``."""
    ctx.save_for_backward(*inputs, *outputs)
    context, weights, _ = outputs
    if weights is None:
        return context
    ctx.set_materialize_grads(False)  # one of the two may get no gradient
    return context, weights


def graph_gradients(
    result: reference.Attention,
    inputs: tuple[Tensor | None, ...],
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
) -> list[Tensor | None]:
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    found = iter(reference.gradients(result, wanted, grad_context, grad_weights, True))
    return [
        next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs
    ]


def dot_attention(
    query: Tensor,
    memory: Tensor,
    scale: float,
    memory_lengths: Tensor | None,
    memory_mask: Tensor | None,
    keep_mask: Tensor | None,
    keep_scale: float,
    window: Window,
    return_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Dot attention on checked arguments: (context, weights or None)."""
    if composes():
        fields = (memory_lengths, memory_mask, keep_mask, keep_scale, window)
        whole = reference.dot_attention(query, memory, scale, reference.as_masking(fields))
        return _composed(whole, memory.dtype, return_weights)
    if torch.is_grad_enabled() and (
        query.requires_grad or memory.requires_grad or (window and window[0].requires_grad)
    ):
        centers, *shape = window or (None, 0.0, False)
        masking = (memory_lengths, memory_mask, keep_mask, keep_scale, tuple(shape))
        inputs = (query, memory, centers, scale)
        result = _DotAttention.apply(*inputs, *masking, return_weights, backend)
        return result if return_weights else (result, None)
    options: tuple[Any, ...] = _options(keep_mask, keep_scale, window, backend)
    if options or scale != 1.0:
        options = (scale, *options)
    elif memory_lengths is None and memory_mask is None and not return_weights:
        return DOT(query, memory)[0], None
    wanted = (return_weights, False)
    context, weights, _ = DOT(query, memory, memory_lengths, memory_mask, *wanted, *options)
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
    window: Window,
    return_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Concat attention on checked projections: (context, weights or None).

    ``memory_exp`` (B, S, A) may hold `exponentials` of ``memory_proj``; it carries no gradient.
    """
    if composes():
        fields = (memory_lengths, memory_mask, keep_mask, keep_scale, window)
        operands = (query_proj, memory_proj, v, memory)
        whole = reference.concat_attention(*operands, reference.as_masking(fields))
        return _composed(whole, memory.dtype, return_weights)
    inputs = (query_proj, memory_proj, memory_exp, v, memory)
    centers, *shape = window or (None, 0.0, False)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (*inputs, centers)
    ):
        masking = (memory_lengths, memory_mask, keep_mask, keep_scale, tuple(shape))
        result = _ConcatAttention.apply(*inputs, centers, *masking, return_weights, backend)
        return result if return_weights else (result, None)
    options = _options(keep_mask, keep_scale, window, backend)
    wanted = (return_weights, False)
    context, weights, _ = CONCAT(*inputs, memory_lengths, memory_mask, *wanted, *options)
    return context, weights


class _ConcatScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_proj: Tensor,
        memory_proj: Tensor,
        memory_exp: Tensor | None,
        v: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        backend: str,
    ) -> Tensor:
        inputs = (query_proj, memory_proj, memory_exp, v, lengths, mask)
        ctx.save_for_backward(*inputs)
        ctx.backend = backend
        return _SCORES(*inputs, backend)

    @staticmethod
    def backward(ctx: Any, grad_scores: Tensor) -> Any:
        query_proj, memory_proj, memory_exp, v, lengths, mask = ctx.saved_tensors
        grads: Any
        if torch.is_grad_enabled():
            inputs = (query_proj, memory_proj, v)
            scores, counts = reference.counted_concat_scores(*inputs, Masking(lengths, mask))
            wanted = [tensor for tensor in inputs if tensor.requires_grad]
            seed = grad_scores.masked_fill(~counts, 0.0)
            found = iter(torch.autograd.grad(scores, wanted, seed, create_graph=True))
            grads = [next(found) if tensor.requires_grad else None for tensor in inputs]
        else:
            operands = (query_proj, memory_proj, memory_exp, v, lengths, mask)
            grads = _SCORES_BACKWARD(grad_scores, *operands, ctx.backend)
        return grads[0], grads[1], None, grads[2], None, None, None


def concat_scores(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory_lengths: Tensor | None,
    memory_mask: Tensor | None,
    backend: str,
) -> Tensor:
    """Concat scores of checked projections: (B, T, S) in the dtype of the arithmetic.

    -inf where a position does not count.
    """
    if composes():
        masking = Masking(memory_lengths, memory_mask)
        return reference.counted_concat_scores(query_proj, memory_proj, v, masking)[0]
    inputs = (query_proj, memory_proj, memory_exp, v, memory_lengths, memory_mask)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:4]):
        return _ConcatScores.apply(*inputs, backend)
    return _SCORES(*inputs, backend)
