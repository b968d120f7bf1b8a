"""All kinds of derivatives, and torch.func transforms, which run through the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_attn import LocalWindow, LuongAttention, concat_attention, dot_attention
from fused_attn.scores import concat_scores

B, T, S, E = 2, 3, 5, 4
SCORES = ("dot", "general", "concat", "location")


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def make(score: str, **options: Any) -> LuongAttention:
    torch.manual_seed(0)
    options |= {"max_source": 9} if score == "location" else {}
    return LuongAttention(E, score=score, dtype=torch.float64, **options)


MASKS: dict[str, dict[str, Tensor]] = {
    "whole": {},
    "lengths": {"memory_lengths": torch.tensor([5, 3])},
    "empty": {"memory_lengths": torch.tensor([0, 4])},
    "cube": {"memory_mask": draw(B, T, S, seed=9) > -0.5},
}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "state": {"output_dim": 3},
    "local": {"local": "predictive", "window": 2.3},
    "sparse": {"normalizer": "sparsemax", "scale": 0.6},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("score", SCORES)
def test_first_and_second_derivatives(score: str, kind: str, masks: str) -> None:
    layer = make(score, **LAYERS[kind])
    query, memory = draw(B, T, E).requires_grad_(), draw(B, S, E, seed=1).requires_grad_()

    def call(query: Tensor, memory: Tensor) -> tuple[Tensor, Tensor | None]:
        return layer(query, memory, **MASKS[masks])

    assert torch.autograd.gradcheck(call, (query, memory), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (query, memory))


@pytest.mark.parametrize("score", ["general", "concat"])
def test_second_derivatives_of_the_parameters(score: str) -> None:
    layer = make(score)
    query, memory = draw(B, 1, E), draw(B, S, E, seed=1)
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(*values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, state, (query, memory))[0]

    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


def functions(v: Tensor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    eye, lengths = torch.eye(E).double(), torch.tensor([5, 3])
    window = LocalWindow(torch.full((B, T), 2.0).double(), 1.5, True)
    common = {"memory_lengths": lengths}
    return {
        "dot": lambda q, m: dot_attention(q, m, scale=0.5, **common)[0],
        "concat": lambda q, m: concat_attention(q, m, eye, eye, v, **common)[0],
        "local": lambda q, m: dot_attention(q, m, window=window, **common)[0],
        "scores": lambda q, m: concat_scores(q, m, eye, eye, v)[0],
    }


@pytest.mark.parametrize("name", ["dot", "concat", "local", "scores"])
def test_functorch_agrees_with_autograd(name: str) -> None:
    call = functions(draw(E, seed=5))[name]
    query, memory = draw(B, T, E), draw(B, S, E, seed=1)
    leaves = [query.clone().requires_grad_(), memory.clone().requires_grad_()]
    result = call(*leaves)
    seed = torch.randn_like(result)
    expected = torch.autograd.grad(result, leaves, seed)

    def loss(query: Tensor, memory: Tensor) -> Tensor:
        return (call(query, memory) * seed).sum()

    got = torch.func.grad(loss, argnums=(0, 1))(query, memory)
    torch.testing.assert_close(got, expected)
    tangents = (draw(B, T, E, seed=2), draw(B, S, E, seed=3))
    value, slope = torch.func.jvp(loss, (query, memory), tangents)
    torch.testing.assert_close(value, (result * seed).sum())
    along = sum((g * u).sum() for g, u in zip(expected, tangents, strict=True))
    torch.testing.assert_close(slope, along)
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(x, u) for x, u in zip((query, memory), tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(loss(*dual)).tangent, along)
    jacobian = torch.func.jacrev(call)(query, memory)
    torch.testing.assert_close(
        (jacobian * seed.reshape(*seed.shape, 1, 1, 1)).sum((0, 1, 2)), got[0]
    )
    hessian = torch.func.hessian(loss)(query, memory)
    again = torch.autograd.functional.hessian(lambda q: loss(q, memory), query)
    torch.testing.assert_close(hessian, again)


@pytest.mark.parametrize("name", ["dot", "concat", "local", "scores"])
def test_vmap_over_calls(name: str) -> None:
    call = functions(draw(E, seed=5))[name]
    queries, memory = draw(4, B, T, E), draw(B, S, E, seed=1)
    got = torch.func.vmap(call, in_dims=(0, None))(queries, memory)
    torch.testing.assert_close(got, torch.stack([call(query, memory) for query in queries]))


@pytest.mark.parametrize("score", SCORES)
def test_vmap_over_an_ensemble_of_layers(score: str) -> None:
    layers = [make(score, output_dim=3) for _ in range(3)]
    for layer in layers:
        layer.reset_parameters()
    parameters, buffers = torch.func.stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    query, memory, lengths = draw(B, T, E), draw(B, S, E, seed=1), torch.tensor([5, 2])

    def call(parameters: Any, buffers: Any) -> Tensor:
        state = (parameters, buffers)
        return torch.func.functional_call(base, state, (query, memory, lengths))[0]

    got = torch.func.vmap(call)(parameters, buffers)
    torch.testing.assert_close(got, torch.stack([x(query, memory, lengths)[0] for x in layers]))


def test_half_precision_keeps_its_dtype_under_a_transform() -> None:
    query, memory = draw(2, B, T, E).bfloat16(), draw(B, S, E, seed=1).bfloat16()
    got = torch.func.vmap(lambda q: dot_attention(q, memory)[0])(query)
    assert got.dtype == torch.bfloat16
    expected = torch.stack([dot_attention(q, memory)[0] for q in query])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-2)
