"""Graphs recorded before a transform or hook applies: batched gradients, tangents, saved-tensor
hooks. Also operators that a transform calls by name.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.testing._internal.two_tensor import TwoTensor

from fused_attn import concat_attention, dot_attention


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


QUERY, MEMORY = draw(2, 3, 4).requires_grad_(), draw(2, 5, 4, seed=1).requires_grad_()
OTHERS = {
    "query_weight": draw(6, 4, seed=2),
    "memory_weight": draw(6, 4, seed=3),
    "v": draw(6, seed=4),
}
SEEDS = draw(3, 2, 3, 4, seed=5)


def attend(score: str, query: Tensor, memory: Tensor) -> Tensor:
    if score == "dot":
        return dot_attention(query, memory)[0]
    return concat_attention(query, memory, **OTHERS)[0]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_gradients_in_batches(score: str, create_graph: bool) -> None:
    context = attend(score, QUERY, MEMORY)
    inputs, options = (QUERY, MEMORY), {"retain_graph": True, "create_graph": create_graph}
    got = torch.autograd.grad(context, inputs, SEEDS, is_grads_batched=True, **options)
    each = [torch.autograd.grad(context, inputs, seed, **options) for seed in SEEDS]
    for batch, single in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(batch, torch.stack(single))

    def pull(seed: Tensor) -> Any:
        return torch.autograd.grad(context, inputs, seed, **options)

    torch.testing.assert_close(torch.func.vmap(pull)(SEEDS), got)


@pytest.mark.parametrize("score", ["dot", "concat"])
def test_derivatives_in_batches_and_forward_over_reverse(score: str) -> None:
    def call(query: Tensor, memory: Tensor) -> Tensor:
        return attend(score, query, memory)

    checks = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(call, (QUERY, MEMORY), check_forward_ad=True, **checks)
    assert torch.autograd.gradgradcheck(call, (QUERY, MEMORY), check_fwd_over_rev=True, **checks)


def test_a_tangent_of_the_gradient_that_comes_back() -> None:
    context = attend("dot", QUERY, MEMORY)
    with forward_ad.dual_level():
        seed = forward_ad.make_dual(SEEDS[0], 2 * SEEDS[0])
        (grad,) = torch.autograd.grad(context, QUERY, seed)
        primal, tangent = forward_ad.unpack_dual(grad)
        torch.testing.assert_close(tangent, 2 * primal)


@pytest.mark.parametrize("name", ["dot_attention", "concat_attention", "concat_scores"])
def test_vmap_over_an_operator(name: str) -> None:
    """Over the first argument and over v, with and without a gradient."""
    operator = getattr(torch.ops.fused_attn, name)
    queries = torch.stack([QUERY.detach(), QUERY.detach() + 1])
    keys, vs = draw(2, 5, 4, seed=6), draw(2, 4, seed=7)

    def call(query: Tensor, v: Tensor) -> Tensor:
        if name == "dot_attention":
            return operator(query, MEMORY.detach())[0] * v.sum()
        if name == "concat_scores":
            return operator(query, keys, None, v)
        return operator(query, keys, None, v, MEMORY.detach())[0]

    for leaf in (queries, queries.clone().requires_grad_()):
        got = torch.func.vmap(call)(leaf, vs)
        expected = torch.stack([call(*each) for each in zip(leaf, vs, strict=True)])
        torch.testing.assert_close(got, expected)
        if leaf.requires_grad:
            grads = [torch.autograd.grad(x.square().sum(), leaf)[0] for x in (got, expected)]
            torch.testing.assert_close(*grads)


def _two(tensor: Tensor) -> Tensor:
    return TwoTensor(tensor, tensor) if tensor.is_floating_point() else tensor


UNPACKED = {
    "negated": (lambda x: x.neg() if x.is_floating_point() else x, torch._neg_view),
    "subclass": (lambda x: x, _two),
}


@pytest.mark.parametrize("kind", UNPACKED)
def test_saved_tensors_may_come_back_as_something_else(kind: str) -> None:
    """A view with the negative bit, or a subclass without storage."""
    pack, unpack = UNPACKED[kind]
    lengths = torch.tensor([5, 3])
    plain = dot_attention(QUERY, MEMORY, memory_lengths=lengths)[0]
    (expected,) = torch.autograd.grad(plain, QUERY, SEEDS[0])
    with saved_tensors_hooks(pack, lambda x: unpack(x) if x.is_floating_point() else x):
        context = dot_attention(QUERY, MEMORY, memory_lengths=lengths)[0]
    (got,) = torch.autograd.grad(context, QUERY, SEEDS[0])
    torch.testing.assert_close(got.a if isinstance(got, TwoTensor) else got, expected)


@pytest.mark.parametrize("masks", ["lengths", "shared", "cube"])
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_the_entropy_of_the_weights_has_a_gradient(score: str, masks: str) -> None:
    """The entropy's gradient is infinite at masked weights of 0, and must reach no input."""
    counts = torch.ones(2, 3, 5, dtype=torch.bool)
    counts[0, :, 3:] = False
    given = {
        "lengths": {"memory_lengths": torch.tensor([3, 5])},
        "shared": {"memory_mask": counts[:, 0]},
        "cube": {"memory_mask": counts},
    }[masks]
    others = {} if score == "dot" else OTHERS
    function = dot_attention if score == "dot" else concat_attention
    _, weights = function(QUERY, MEMORY, **others, **given, return_weights=True)
    got = torch.autograd.grad(torch.special.entr(weights).sum(), (QUERY, MEMORY))
    if score == "dot":
        scores = QUERY @ MEMORY.mT
    else:
        query, keys = QUERY @ OTHERS["query_weight"].T, MEMORY @ OTHERS["memory_weight"].T
        scores = torch.tanh(query[:, :, None] + keys[:, None]) @ OTHERS["v"]
    logs = scores.masked_fill(~counts, -torch.inf).log_softmax(dim=-1)
    entropy = -(logs.exp() * logs.masked_fill(~counts, 0.0)).sum()
    torch.testing.assert_close(got, torch.autograd.grad(entropy, (QUERY, MEMORY)))
