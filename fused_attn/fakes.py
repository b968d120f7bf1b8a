"""Shapes and dtypes of the operators' results, and how many operations they take: no values.

There is one fake for each operator, with its arguments. Every backend returns these shapes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fused_attn import reference
from fused_attn.problem import AttentionProblem
from fused_attn.reference import Outputs


def _outputs(
    query: Tensor,
    memory: Tensor,
    return_weights: bool,
    return_logsumexp: bool,
    max_source: int | None,
) -> Outputs:
    batch, queries, _ = query.shape
    source, width = memory.shape[1] if max_source is None else max_source, memory.shape[-1]
    statistics = reference.arithmetic_dtype(memory.dtype)
    return (
        memory.new_empty((batch, queries, width)),
        memory.new_empty((batch, queries, source)) if return_weights else None,
        memory.new_empty((batch, queries), dtype=statistics) if return_logsumexp else None,
    )


def _gradients(wanted: list[bool], *inputs: Tensor | None) -> reference.Gradients:
    """Contiguous gradients of the wanted inputs, None for the others."""
    return tuple(
        tensor.new_empty(tensor.shape) if tensor is not None and is_wanted else None
        for tensor, is_wanted in zip(inputs, wanted, strict=True)
    )


def dot_attention(
    query: Tensor,
    memory: Tensor,
    memory_lengths: Any = None,
    memory_mask: Any = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
    scale: float = 1.0,
    keep_mask: Any = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
    centers: Any = None,
    half_width: float = 0.0,
    gaussian: bool = False,
    max_source: int | None = None,
) -> Outputs:
    return _outputs(query, memory, return_weights, return_logsumexp, max_source)


def dot_attention_backward(
    grad_context: Any,
    grad_weights: Any,
    grad_logsumexp: Any,
    query: Tensor,
    memory: Tensor,
    context: Any,
    weights: Any,
    logsumexp: Any,
    wanted: list[bool],
    memory_lengths: Any = None,
    memory_mask: Any = None,
    scale: float = 1.0,
    keep_mask: Any = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
    centers: Tensor | None = None,
    half_width: float = 0.0,
    gaussian: bool = False,
    max_source: int | None = None,
) -> reference.Gradients:
    return _gradients(wanted, query, memory, centers if gaussian else None)


def concat_attention(
    query_proj: Tensor,
    memory_proj: Any,
    memory_exp: Any,
    v: Any,
    memory: Tensor,
    memory_lengths: Any = None,
    memory_mask: Any = None,
    return_weights: bool = False,
    return_logsumexp: bool = False,
    keep_mask: Any = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
    centers: Any = None,
    half_width: float = 0.0,
    gaussian: bool = False,
    max_source: int | None = None,
) -> Outputs:
    return _outputs(query_proj, memory, return_weights, return_logsumexp, max_source)


def concat_attention_backward(
    grad_context: Any,
    grad_weights: Any,
    grad_logsumexp: Any,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Any,
    v: Tensor,
    memory: Tensor,
    context: Any,
    weights: Any,
    logsumexp: Any,
    wanted: list[bool],
    memory_lengths: Any = None,
    memory_mask: Any = None,
    keep_mask: Any = None,
    keep_scale: float = 1.0,
    backend: str = "auto",
    centers: Tensor | None = None,
    half_width: float = 0.0,
    gaussian: bool = False,
    max_source: int | None = None,
) -> reference.Gradients:
    inputs = (query_proj, memory_proj, v, memory)
    return _gradients(wanted, *inputs, centers if gaussian else None)


def concat_scores(query_proj: Tensor, memory_proj: Tensor, *rest: Any) -> Tensor:
    shape = (*query_proj.shape[:2], memory_proj.shape[1])
    return query_proj.new_empty(shape, dtype=reference.arithmetic_dtype(query_proj.dtype))


def concat_scores_backward(
    grad_scores: Any,
    query_proj: Tensor,
    memory_proj: Tensor,
    memory_exp: Any,
    v: Tensor,
    wanted: list[bool],
    *rest: Any,
) -> reference.Gradients:
    return _gradients(wanted, query_proj, memory_proj, v)


def register_flops(name: str, operator: Any) -> None:
    """Register the operation count of an operator of that name with `torch.utils.flop_counter`."""
    if name.startswith("concat_scores"):
        return  # no product of matrices
    score, backward = name.split("_")[0], name.endswith("_backward")
    operands = [argument.name for argument in operator.default._schema.arguments]

    def count(*shapes: Any, out_shape: Any = None, **rest: Any) -> int:
        given = dict(zip(operands, shapes, strict=False)) | rest
        batch, queries, width = given["query" if score == "dot" else "query_proj"]
        *rows, memory_dim = given["memory"]
        source = given["max_source"] if len(rows) == 1 else rows[1]
        problem = AttentionProblem(score, batch, queries, source, memory_dim, width)
        return problem.flops(backward, given.get("wanted"))

    register_flop_formula(operator)(count)
