"""Local attention against the paper's definition in plain loops, and the layer's options for it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import LocalWindow, LuongAttention, concat_attention, dot_attention, reference
from fused_attn.reference import Masking

B, T, S, D, E = 3, 5, 12, 6, 8
LENGTHS = torch.tensor([S, 0, 7])


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def by_loops(
    scores: Tensor, memory: Tensor, centers: Tensor, half_width: float, sigma: float | None
) -> tuple[Tensor, Tensor]:
    """Context and weights, position by position in Python floats (section 3.2)."""
    context, weights = torch.zeros(B, T, E).double(), torch.zeros(B, T, S).double()
    for b in range(B):
        for t in range(T):
            center = float(centers[b, t])
            inside = [s for s in range(int(LENGTHS[b])) if abs(s - center) <= half_width]
            exps = {s: math.exp(float(scores[b, t, s])) for s in inside}
            for s in inside:
                weight = exps[s] / sum(exps.values())
                if sigma is not None:
                    weight *= math.exp(-((s - center) ** 2) / (2 * sigma**2))
                weights[b, t, s] = weight
                context[b, t] += weight * memory[b, s]
    return context, weights


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("gaussian", [False, True])
def test_functions_against_loops(gaussian: bool, backend: str) -> None:
    query, memory = draw(B, T, E), draw(B, S, E, seed=1)
    centers = 5 + 4 * draw(B, T, seed=2)
    window = LocalWindow(centers, 3.0, gaussian)
    rest = {"memory_lengths": LENGTHS, "window": window, "return_weights": True}
    rest["backend"] = backend
    expected = by_loops(query @ memory.mT, memory, centers, 3.0, 1.5 if gaussian else None)
    torch.testing.assert_close(dot_attention(query, memory, **rest), expected)
    weights = (draw(4, E, seed=3), draw(4, E, seed=4), draw(4, seed=5))
    scores = torch.tanh((query @ weights[0].T)[:, :, None] + (memory @ weights[1].T)[:, None])
    expected = by_loops(scores @ weights[2], memory, centers, 3.0, 1.5 if gaussian else None)
    torch.testing.assert_close(concat_attention(query, memory, *weights, **rest), expected)


@pytest.mark.parametrize("score", ["dot", "concat"])
def test_derivatives_of_the_definition(score: str) -> None:
    """First and second derivatives, including those of centers, against finite differences."""
    memory, centers = draw(2, 6, 3).requires_grad_(), (2.5 + 0.7 * draw(2, 4)).requires_grad_()
    query, v = draw(2, 4, 3, seed=1).requires_grad_(), draw(3, seed=2).requires_grad_()
    masking = Masking(torch.tensor([6, 4]))

    def call(query: Tensor, memory: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        whole = masking._replace(window=LocalWindow(centers, 2.3, True))
        if score == "dot":
            return reference.dot_attention(query, memory, 0.5, whole)[:2]
        return reference.concat_attention(query, memory, v, memory, whole)[:2]

    assert torch.autograd.gradcheck(call, (query, memory, centers))
    assert torch.autograd.gradgradcheck(call, (query, memory, centers))


@pytest.mark.parametrize("score", ["dot", "concat"])
def test_second_derivatives_of_the_operator(score: str) -> None:
    memory, centers = draw(1, 5, 4).requires_grad_(), (2.5 + 0.5 * draw(1, 2)).requires_grad_()
    query, v = draw(1, 2, 4, seed=1).requires_grad_(), draw(4, seed=2).requires_grad_()
    eye = torch.eye(4).double()

    def call(query: Tensor, memory: Tensor, centers: Tensor) -> Tensor:
        window = LocalWindow(centers, 2.2, True)
        if score == "dot":
            return dot_attention(query, memory, window=window)[0]
        return concat_attention(query, memory, eye, eye, v, window=window)[0]

    assert torch.autograd.gradcheck(call, (query, memory, centers))
    assert torch.autograd.gradgradcheck(call, (query, memory, centers))


def test_predictive_is_the_paper() -> None:
    """p_t = S sigmoid(v_p^T tanh(W_p h_t)) with the S of each row; weights times the Gaussian."""
    torch.manual_seed(0)
    layer = LuongAttention(D, E, local="predictive", window=4, dtype=torch.float64)
    query, memory = draw(B, T, D), draw(B, S, E, seed=1)
    w_p, v_p = layer.position.proj.weight, layer.position.v
    hidden = torch.tanh(torch.einsum("ij,btj->bti", w_p, query))
    centers = (LENGTHS[:, None] * torch.sigmoid((hidden * v_p).sum(-1))).detach()
    weight = layer.query_proj.weight.detach()
    scores = torch.einsum("btd,ed,bse->bts", query, weight, memory)
    expected = by_loops(scores, memory, centers, 4.0, 2.0)
    torch.testing.assert_close(layer(query, memory, LENGTHS), expected)
    context, _ = layer(query, memory, LENGTHS)
    context.square().sum().backward()
    assert layer.position.v.grad.any() and layer.position.proj.weight.grad.any()


@pytest.mark.parametrize("prepared", [False, True])
def test_monotonic_is_the_paper(prepared: bool) -> None:
    layer = LuongAttention(E, score="dot", local="monotonic", window=2, dtype=torch.float64)
    query, memory = draw(B, T, E), draw(B, S, E, seed=1)
    centers = torch.arange(T).double().expand(B, T)
    expected = by_loops(query @ memory.mT, memory, centers, 2.0, None)
    given = (layer.prepare_memory(memory, LENGTHS),) if prepared else (memory, LENGTHS)
    torch.testing.assert_close(layer(query, *given), expected)
    for t in range(T):  # decoder steps, given by positions
        step = tuple(result[:, t] for result in expected)
        torch.testing.assert_close(layer(query[:, t], *given, positions=t), step)
        where = torch.full((B,), t)
        torch.testing.assert_close(layer(query[:, t], *given, positions=where), step)


def test_beams_stand_at_the_same_step() -> None:
    layer = LuongAttention(E, score="dot", local="monotonic", window=2)
    beams, memory = torch.randn(B, 4, E), torch.randn(B, S, E)
    context, _ = layer(beams, memory, positions=3)
    for k in range(4):
        torch.testing.assert_close(context[:, k], layer(beams[:, k], memory, positions=3)[0])


def test_positions_stay_whole_under_autocast() -> None:
    """bfloat16 cannot represent 257: positions must not be cast like the states."""
    layer = LuongAttention(E, score="dot", local="monotonic", window=0.5)
    memory = torch.eye(400)[None, :, :E] + torch.randn(1, 400, E)
    with torch.autocast("cpu", torch.bfloat16):
        context, weights = layer(torch.randn(1, E), memory, positions=257)
    assert context.dtype == torch.bfloat16
    assert weights.nonzero()[:, 1].tolist() == [257]


BAD_CALLS: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"local": "monotonic"}, {"two": True}, ValueError, "positions must be the decoder step"),
    ({}, {"positions": 1}, ValueError, "unless local='monotonic', got them with local=None"),
    ({"local": "predictive"}, {"positions": 1}, ValueError, "got them with local='predictive'"),
    ({"local": "monotonic"}, {"positions": 1.5}, TypeError, "positions must be an int or a Tensor"),
    (
        {"local": "monotonic"},
        {"positions": torch.ones(2)},
        ValueError,
        r"positions must broadcast to \(3, 5\), got \(2,\)",
    ),
]


@pytest.mark.parametrize(("options", "call", "error", "message"), BAD_CALLS)
def test_bad_positions(
    options: dict[str, Any], call: dict[str, Any], error: type[Exception], message: str
) -> None:
    layer = LuongAttention(D, E, **options)
    query = torch.randn(B, D) if call.pop("two", False) else torch.randn(B, T, D)
    with pytest.raises(error, match=message):
        layer(query, torch.randn(B, S, E), **call)


WINDOWS = [
    (LocalWindow(torch.zeros(B, T), 1.0)._replace(centers=3), TypeError, "window.centers must be"),
    (LocalWindow(torch.zeros(B, T).long(), 1.0), TypeError, "floating-point Tensor, got int64"),
    (LocalWindow(torch.zeros(B), 1.0), ValueError, r"window.centers must have shape \(3, 5\)"),
    (LocalWindow(torch.zeros(B, T, device="meta"), 1.0), ValueError, "window.centers must be on"),
    (LocalWindow(torch.zeros(B, T), "2"), TypeError, "window.half_width must be a number"),
    (LocalWindow(torch.zeros(B, T), -1.0), ValueError, "half_width must be finite and at least 0"),
    (LocalWindow(torch.zeros(B, T), math.nan), ValueError, "half_width must be finite"),
    (LocalWindow(torch.zeros(B, T), 0.0, True), ValueError, "half_width must be finite and posit"),
]


@pytest.mark.parametrize(("window", "error", "message"), WINDOWS)
def test_bad_window(window: LocalWindow, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dot_attention(torch.randn(B, T, E), torch.randn(B, S, E), window=window)
