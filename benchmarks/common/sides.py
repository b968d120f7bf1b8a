"""The sides that several benchmarks compare: ours, eager, and torch's attentions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.common.calls import Attend, Results
from benchmarks.common.problems import Row
from fused_attn import functional, testing
from fused_attn.testing import Inputs, Tensors

EAGER = "eager"  # the side that every ratio is taken to


def fused(row: Row, inputs: Inputs, backend: str = "cpu") -> Attend:
    """A backend of ours, through the public functions."""
    masking, weights = inputs.masking, row.weights
    rest: dict[str, Any] = {
        "memory_lengths": masking.memory_lengths, "window": masking.window,
        "return_weights": weights, "backend": backend,
    }  # fmt: skip
    if row.score == "dot":
        return lambda t: functional.dot_attention(t["query"], t["memory"], **rest)
    if row.score == "general":
        return lambda t: functional.general_attention(t["query"], t["memory"], t["weight"], **rest)
    if row.score == "concat":
        return lambda t: functional.concat_attention(
            t["query"], t["memory"], t["query_weight"], t["memory_weight"], t["v"], **rest
        )
    return lambda t: functional.attend_concat(
        t["query_proj"], t["memory_proj"], t.get("memory_exp"), t["v"], t["memory"],
        masking, weights, backend,
    )  # fmt: skip


def eager(row: Row, inputs: Inputs) -> Attend:
    """What people write: bmm, or tanh of the sums times v; then masked_fill, softmax, bmm."""
    return without_weights(eager_context(row, inputs))


def eager_context(row: Row, inputs: Inputs) -> Callable[[Tensors], Tensor]:
    """`eager`, as a function that returns the context alone."""
    hidden = ~testing.counted(inputs)
    lowest = torch.finfo(row.dtype).min

    def chain(scores: Tensor, memory: Tensor) -> Tensor:
        weights = torch.softmax(scores.masked_fill(hidden, lowest), dim=-1)
        return torch.bmm(weights, memory)

    def dot(query: Tensor, memory: Tensor) -> Tensor:
        return chain(torch.bmm(query, memory.transpose(1, 2)), memory)

    def concat(query: Tensor, keys: Tensor, v: Tensor, memory: Tensor) -> Tensor:
        return chain(torch.tanh(query[:, :, None] + keys[:, None]) @ v, memory)

    if row.score == "dot":
        return lambda t: dot(t["query"], t["memory"])
    if row.score == "general":
        return lambda t: dot(t["query"] @ t["weight"], t["memory"])
    if row.score == "concat":
        return lambda t: concat(
            linear(t["query"], t["query_weight"]),
            linear(t["memory"], t["memory_weight"]),
            t["v"],
            t["memory"],
        )
    return lambda t: concat(t["query_proj"], t["memory_proj"], t["v"], t["memory"])


def without_weights(function: Callable[[Tensors], Tensor]) -> Attend:
    """A function that returns the context alone, as a side."""
    return lambda tensors: (function(tensors), None)


def query_of(row: Row, tensors: Tensors) -> Tensor:
    """The query that a product with the memory scores: for general, projected."""
    query = tensors["query"]
    return query @ tensors["weight"] if row.score == "general" else query


def one_head(row: Row, function: Callable[..., Tensor], **options: Any) -> Attend:
    """An attention of torch, called with one head, whose keys and values are the memory."""

    def attend(tensors: Tensors) -> Results:
        query, memory = query_of(row, tensors)[:, None], tensors["memory"][:, None]
        return function(query, memory, memory, scale=1.0, **options)[:, 0], None

    return attend


def sdpa(row: Row, counts: Tensor | None) -> Attend:
    """torch's SDPA. ``counts``, bool (B, 1 or T, S): the positions that count; None for all."""
    mask = None if counts is None else counts[:, None]
    return one_head(row, torch.nn.functional.scaled_dot_product_attention, attn_mask=mask)
