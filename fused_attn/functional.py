"""Luong attention as functions.

Scores, masking, softmax and weighted sum run in one pass over the memory, forward and backward, in
the chosen backend. Luong, Pham & Manning 2015, "Effective Approaches to Attention-based Neural
Machine Translation", section 3.1.

Shapes: B batch, T queries, S source positions, D query width, E memory width, A width of the concat
score.

Arguments of all functions
    memory: (B, S, E), or sequences of different lengths as a `PackedSequence` or a nested tensor
        with jagged layout. Those carry their own lengths, and S is the longest of them.
    memory_lengths: integers (B,) in 0..S. Positions from a row's length on are masked.
    memory_mask: bool (B, S), (B, 1, S) or (B, T, S). **True = attend**, as in
        `scaled_dot_product_attention`; `nn.MultiheadAttention` means the opposite. If lengths are
        given too, a position must be allowed by both.
    window: a `LocalWindow`, for local attention (section 3.2). Positions outside a query's window
        are masked and are not read: the cost depends on the window, not on S.
    dropout_p: probability in 0..1 of dropping a weight from the weighted sum.
    return_weights: also return the alignment weights, as they are before dropout.
    backend: "auto" chooses one that supports the call. "cpu", "cuda", "triton" or "eager" demands
        that backend, which must then support the call.

Rules for all backends
    Masked positions have no effect on any result or gradient, whatever they hold, and the gradient
    of their memory is 0. A query whose positions are all masked gives context 0, weights 0 and zero
    gradients. Softmax and sums are computed in float32 for float32, bfloat16 and float16 inputs,
    and in float64 for float64. The same input gives bitwise identical results, in the forward and
    in the backward pass.

Raises
    TypeError: an argument has the wrong type or dtype.
    ValueError: an argument has the wrong rank, shape, device or value, or no backend supports the
        call. The message names the argument, what was expected and what was given.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from fused_attn import autograd, ragged
from fused_attn.checks import (
    autocast,
    check_backend,
    check_concat,
    check_masking,
    check_memory,
    check_parameter,
    check_query,
    check_scale,
    is_plain,
    is_usual,
    padded,
)
from fused_attn.reference import LocalWindow, MaskingFields, zero_uncounted_rows


def dot_attention(
    query: Tensor,
    memory: Tensor,
    *,
    scale: float | Tensor = 1.0,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    window: LocalWindow | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attend with the score ``scale * h_t . h_s`` (Luong et al. 2015, eq. 8, dot).

    query: (B, T, E), or (B, E) for one step.
    memory: (B, S, E), the encoder states, used as keys and as values.
    scale: a number, or a tensor of one element, which may require a gradient.

    Returns the context (B, T, E) and the weights (B, T, S) or None; (B, E) and (B, S) for a 2-D
    query. See the module docstring for the other arguments, the rules and the errors.
    """
    check_backend(backend)
    check_scale(scale)
    masking: MaskingFields
    if (
        is_usual(query, memory, memory_lengths, memory_mask, window, dropout_p)
        and query.shape[-1] == memory.shape[2]
    ):
        masking = (memory_lengths, memory_mask, None, 1.0, None)
    else:
        rows = ragged.rows_of(memory, memory_lengths, memory_mask, window, dropout_p or None)
        if rows is not None:
            query, rows = _checked(query, rows, "memory", rows.values.shape[1])
            return ragged.attend_dot(query, rows, scale, return_weights, backend)
        memory, memory_lengths = padded(memory, memory_lengths)
        query, memory = autocast(query, memory)
        check_memory(memory)
        check_query(query, memory, "memory", memory.shape[2])
        masking = check_masking(query, memory, memory_lengths, memory_mask, window, dropout_p)
    return attend_dot(query, memory, scale, masking, return_weights, backend)


def general_attention(
    query: Tensor,
    memory: Tensor,
    weight: Tensor,
    *,
    scale: float | Tensor = 1.0,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    window: LocalWindow | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attend with the score ``scale * h_t^T W_a h_s`` (Luong et al. 2015, eq. 8, general).

    query: (B, T, D), or (B, D) for one step.
    memory: (B, S, E), the encoder states, used as keys and as values.
    weight: (D, E), the paper's W_a. It is applied to the T queries, not to the S memory rows.
    scale: a number, or a tensor of one element, which may require a gradient.

    Returns context and weights as `dot_attention` does. See the module docstring for the other
    arguments, the rules and the errors.
    """
    check_backend(backend)
    check_scale(scale)
    masking: MaskingFields
    if (
        is_usual(query, memory, memory_lengths, memory_mask, window, dropout_p)
        and is_plain(weight, memory.dtype, 2)
        and weight.shape == (query.shape[-1], memory.shape[2])
    ):
        masking = (memory_lengths, memory_mask, None, 1.0, None)
    else:
        rows = ragged.rows_of(memory, memory_lengths, memory_mask, window, dropout_p or None)
        if rows is not None:
            weight, values = autocast(weight, rows.values)
            check_parameter("weight", weight, values, (None, values.shape[1]), "(D, E)")
            query, rows = _checked(query, rows, "weight", weight.shape[0])
            return ragged.attend_dot(query @ weight, rows, scale, return_weights, backend)
        memory, memory_lengths = padded(memory, memory_lengths)
        query, memory, weight = autocast(query, memory, weight)
        check_memory(memory)
        check_parameter("weight", weight, memory, (None, memory.shape[2]), "(D, E)")
        check_query(query, memory, "weight", weight.shape[0])
        masking = check_masking(query, memory, memory_lengths, memory_mask, window, dropout_p)
    return attend_dot(query @ weight, memory, scale, masking, return_weights, backend)


def concat_attention(
    query: Tensor,
    memory: Tensor,
    query_weight: Tensor,
    memory_weight: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    memory_lengths: Tensor | None = None,
    memory_mask: Tensor | None = None,
    window: LocalWindow | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attend with ``v^T tanh(W_q h_t + W_m h_s + b)`` (Luong et al. 2015, eq. 8, concat).

    query: (B, T, D), or (B, D) for one step.
    memory: (B, S, E), the encoder states.
    query_weight, memory_weight: W_q (A, D) and W_m (A, E); concatenated they are the paper's W_a.
    v: (A,), the paper's v_a.
    bias: (A,), as in Bahdanau's additive attention; None for the paper's form.

    No tensor of shape (B, T, S, A) is materialised, except in the eager backend. Returns context
    and weights as `dot_attention` does. See the module docstring for the other arguments, the rules
    and the errors.
    """
    check_backend(backend)
    masking: MaskingFields
    if (
        is_usual(query, memory, memory_lengths, memory_mask, window, dropout_p)
        and is_plain(v, memory.dtype, 1)
        and is_plain(query_weight, memory.dtype, 2)
        and is_plain(memory_weight, memory.dtype, 2)
        and v.shape[0] > 0
        and query_weight.shape == (v.shape[0], query.shape[-1])
        and memory_weight.shape == (v.shape[0], memory.shape[2])
        and (bias is None or (is_plain(bias, memory.dtype, 1) and bias.shape == v.shape))
    ):
        masking = (memory_lengths, memory_mask, None, 1.0, None)
    else:
        rows = ragged.rows_of(memory, memory_lengths, memory_mask, window, dropout_p or None)
        parameters = autocast(query_weight, memory_weight, v, bias)
        if rows is not None:
            query, values = autocast(query, rows.values)
            rows = rows._replace(values=values)
            check_concat(query, rows.stand_in(), *parameters)
            query_weight, memory_weight, v, bias = parameters
            projections = (linear(query, query_weight, bias), linear(values, memory_weight))
            return ragged.attend_concat(*projections, v, rows, return_weights, backend)
        memory, memory_lengths = padded(memory, memory_lengths)
        query, memory = autocast(query, memory)
        query_weight, memory_weight, v, bias = parameters
        check_concat(query, memory, query_weight, memory_weight, v, bias)
        masking = check_masking(query, memory, memory_lengths, memory_mask, window, dropout_p)
    query_proj = linear(query, query_weight, bias)
    memory_proj = linear(zero_uncounted_rows(memory, masking), memory_weight)
    return attend_concat(query_proj, memory_proj, None, v, memory, masking, return_weights, backend)


def _checked(
    query: Tensor, rows: ragged.Rows, partner: str, width: int
) -> tuple[Tensor, ragged.Rows]:
    """Return the query and the rows, checked and cast to the autocast dtype."""
    query, values = autocast(query, rows.values)
    rows = rows._replace(values=values)
    check_memory(rows.stand_in())
    check_query(query, rows.stand_in(), partner, width)
    return query, rows


def attend_dot(
    query: Tensor,
    memory: Tensor,
    scale: float | Tensor,
    masking: MaskingFields,
    return_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Run the dot operator on checked arguments; query (B, T, E) or (B, E)."""
    # The type is tested first because isinstance(..., Tensor) takes 0.3 us for a number.
    if type(scale) is not float and isinstance(scale, Tensor):
        # A learned scale is multiplied into the query, which is small, and gets its gradient there.
        query, scale = query * scale.reshape(()).to(query.dtype), 1.0
    rest = (float(scale), masking, return_weights, backend)
    if query.dim() == 3:
        return autograd.dot_attention(query, memory, *rest)
    return one_step(*autograd.dot_attention(query.unsqueeze(1), memory, *rest))


def attend_concat(
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Tensor | None,
    v: Tensor,
    memory: Tensor,
    masking: MaskingFields,
    return_weights: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Run the concat operator on checked arguments; query_proj (B, T, A) or (B, A)."""
    rest = (memory_proj, memory_exp, v, memory, masking, return_weights, backend)
    if query_proj.dim() == 3:
        return autograd.concat_attention(query_proj, *rest)
    return one_step(*autograd.concat_attention(query_proj.unsqueeze(1), *rest))


def one_step(context: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The results of a query (B, D), from those of a query (B, 1, D)."""
    return context.squeeze(1), None if weights is None else weights.squeeze(1)
