"""Inputs computed from one another: a projection of the memory, a query from it, one tensor twice.

The gradient of each operator input must treat the other inputs as constant, with a graph for second
derivatives (`create_graph=True`) and without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import (
    LocalWindow,
    LuongAttention,
    concat_attention,
    concat_scores,
    dot_attention,
    dot_scores,
    general_attention,
    ragged,
)

B, S, E = 2, 4, 3
Made = Callable[[Tensor, Tensor], Tensor]


def rows_of(x: Tensor) -> ragged.Rows:
    """Sequences of S - 1 and S + 1 rows with offsets, as in a nested tensor. (torch's nested
    tensors themselves have no second derivatives.)"""
    return ragged.Rows(x.reshape(-1, E), torch.tensor([0, S - 1, 2 * S]), S + 1)


def dot_of_rows(x: Tensor, w: Tensor) -> Tensor:
    return ragged.attend_dot(x[:, :2] @ w, rows_of(x), 1.0, False, "auto")[0]


def concat_of_rows(x: Tensor, w: Tensor) -> Tensor:
    rows = rows_of(x)
    return ragged.attend_concat(x[:, :2], rows.values @ w, w[0], rows, False, "auto")[0]


def centered(query: Tensor) -> LocalWindow:
    return LocalWindow(S * torch.sigmoid(query.sum(dim=-1)), 1.6, gaussian=True)


# By name: functions of a memory x (B, S, E) and a matrix w (E, E) that use x more than once.
CALLS: dict[str, Made] = {
    "dot, the same twice": lambda x, w: dot_attention(*[x @ w] * 2)[0],
    "dot, a query of the memory": lambda x, w: dot_attention(x.mean(dim=1) @ w, x)[0],
    "dot, weights": lambda x, w: dot_attention(x @ w, x, return_weights=True)[1],
    "dot, centers of the query": lambda x, w: dot_attention(x @ w, x, window=centered(x @ w))[0],
    "dot, rows of sequences": dot_of_rows,
    "general": lambda x, w: general_attention(x, x, w)[0],
    "concat": lambda x, w: concat_attention(x, x, w, w, w[0])[0],
    "concat, weights": lambda x, w: concat_attention(x, x, w, w, w[0], return_weights=True)[1],
    "concat, centers": lambda x, w: concat_attention(x, x, w, w, w[0], window=centered(x))[0],
    "concat, rows of sequences": concat_of_rows,
    "dot scores": lambda x, w: dot_scores(x @ w, x)[0],
    "concat scores": lambda x, w: concat_scores(x, x, w, w, w[0])[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_graph_changes_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    x, w = (torch.randn(*shape).double().requires_grad_() for shape in ((B, S, E), (E, E)))
    check(lambda: CALLS[name](x, w), x, w)


def check(call: Callable[[], Tensor], *leaves: Tensor) -> None:
    """Compare gradients with and without a graph, and second ones with finite differences."""
    seed = torch.randn_like(call())
    first = torch.autograd.grad(call(), leaves, seed)
    with_graph = torch.autograd.grad(call(), leaves, seed, create_graph=True)
    torch.testing.assert_close(with_graph, first)
    assert torch.autograd.gradcheck(lambda *_: call(), leaves)
    assert torch.autograd.gradgradcheck(lambda *_: call(), leaves, fast_mode=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "dot": {},
    "general": {"score": "general", "local": "predictive", "window": 1.5},
    "concat": {"score": "concat", "attn_dim": 2, "output_dim": 2},
    "location": {"score": "location", "max_source": S},
}


@pytest.mark.parametrize("score", OPTIONS)
@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_layer(score: str, is_prepared: bool) -> None:
    torch.manual_seed(0)
    layer = LuongAttention(E, E, **({"score": score} | OPTIONS[score]), dtype=torch.float64)
    x = torch.randn(B, S, E, dtype=torch.float64, requires_grad=True)

    def call() -> Tensor:
        memory = layer.prepare_memory(x) if is_prepared else x
        return layer(x[:, :2], memory)[0]

    check(call, x, *layer.parameters())
