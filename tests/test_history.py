"""Layers with alignment history: coverage, the coverage loss, and location-aware concat."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import LuongAttention, coverage_loss

B, T, S, D, E, A = 3, 4, 9, 5, 8, 7
LENGTHS = torch.tensor([S, 0, 6])


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def make(**options: Any) -> LuongAttention:
    torch.manual_seed(0)
    return LuongAttention(D, E, "concat", attn_dim=A, dtype=torch.float64, **options)


def by_formula(
    layer: LuongAttention,
    query: Tensor,
    memory: Tensor,
    coverage: Tensor | None,
    previous: Tensor | None,
    keep: Tensor,
) -> tuple[Tensor, Tensor]:
    """v . tanh(W_q h_t + W_m h_s + w_c c_s + U f_s), in (B, T, S, A) with a loop for f."""
    hidden = layer.query_proj(query)[:, :, None] + layer.memory_proj(memory)[:, None]
    if coverage is not None:
        hidden = hidden + coverage[..., None] * layer.history.coverage_proj.weight[:, 0]
    if previous is not None:
        kernel = layer.history.conv.weight[:, 0]  # (channels, width)
        half = kernel.shape[1] // 2
        features = torch.zeros(B, T, S, kernel.shape[0], dtype=torch.float64)
        for s in range(S):
            for i in range(kernel.shape[1]):
                if 0 <= s + i - half < S:
                    features[:, :, s] += previous[:, :, s + i - half, None] * kernel[:, i]
        hidden = hidden + features @ layer.history.conv_proj.weight.T
    scores = (torch.tanh(hidden) @ layer.v).masked_fill(~keep, -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return weights @ memory, weights


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("mask", ["none", "row", "cube"])
@pytest.mark.parametrize("kind", ["coverage", "conv", "both"])
def test_against_the_formula(kind: str, mask: str, prepared: bool) -> None:
    """For T histories at once, and for each step alone, with NaN in the padding of all inputs."""
    has_coverage, has_conv = kind != "conv", kind != "coverage"
    layer = make(coverage=has_coverage, conv_channels=3 if has_conv else 0, conv_width=5)
    query, memory = draw(B, T, D), draw(B, S, E, seed=1)
    coverage = draw(B, T, S, seed=2).abs() if has_coverage else None
    previous = draw(B, T, S, seed=3).softmax(-1) if has_conv else None
    keep = (torch.arange(S) < LENGTHS[:, None])[:, None].expand(B, T, S)
    given = None
    if mask != "none":
        given = draw(B, T if mask == "cube" else 1, S, seed=4) > -1
        keep = keep & given
    seen = keep.any(dim=1)

    def clean(history: Tensor | None) -> Tensor | None:
        return None if history is None else history.masked_fill(~seen[:, None], 0.0)

    def spoil(history: Tensor | None) -> Tensor | None:
        return None if history is None else history.masked_fill(~seen[:, None], torch.nan)

    expected = by_formula(layer, query, memory, clean(coverage), clean(previous), keep)
    spoiled = memory.masked_fill(~seen[..., None], torch.nan)
    masks = (LENGTHS, given)
    memories = (layer.prepare_memory(spoiled, *masks),) if prepared else (spoiled, *masks)
    histories = {"coverage": spoil(coverage), "previous_weights": spoil(previous)}
    torch.testing.assert_close(layer(query, *memories, **histories), expected)
    if mask == "cube":
        return
    for t in range(T):
        step = {k: None if x is None else x[:, t] for k, x in histories.items()}
        wanted = tuple(result[:, t] for result in expected)
        torch.testing.assert_close(layer(query[:, t], *memories, **step), wanted)


def test_gradients_reach_everything() -> None:
    layer = make(coverage=True, conv_channels=2, conv_width=3, bias=True)
    query, memory = draw(B, T, D).requires_grad_(), draw(B, S, E, seed=1).requires_grad_()
    histories = (draw(B, T, S, seed=2).requires_grad_(), draw(B, T, S, seed=3).requires_grad_())
    keep = torch.ones(B, T, S, dtype=torch.bool)
    leaves = [query, memory, *histories, *layer.parameters()]

    def grads(results: tuple[Tensor, Tensor | None]) -> list[Tensor]:
        context, weights = results
        loss = context.square().sum() + weights.square().sum()
        return list(torch.autograd.grad(loss, leaves))

    names = ("coverage", "previous_weights")
    got = grads(layer(query, memory, **dict(zip(names, histories, strict=True))))
    expected = grads(by_formula(layer, query, memory, *histories, keep))
    for gradient, wanted in zip(got, expected, strict=True):
        assert wanted.any()
        torch.testing.assert_close(gradient, wanted)


def test_no_history_is_the_plain_layer() -> None:
    """Before the first step there is no term to add."""
    layer, plain = make(coverage=True, conv_channels=2), make()
    names = ("query_proj.weight", "memory_proj.weight", "v")
    plain.load_state_dict({name: layer.state_dict()[name] for name in names})
    query, memory = draw(B, D), draw(B, S, E, seed=1)
    torch.testing.assert_close(layer(query, memory), plain(query, memory))


def test_a_decoder_that_covers() -> None:
    """A decoder loop: the weights of a step are passed to the next."""
    layer = make(coverage=True)
    prepared = layer.prepare_memory(draw(B, S, E), LENGTHS)
    seen, steps = torch.zeros(B, S).double(), []
    for t in range(T):
        _, weights = layer(draw(B, D, seed=t), prepared, coverage=seen)
        seen = seen + weights
        steps.append(weights)
    weights = torch.stack(steps, dim=1)
    expected = torch.zeros(B, T).double()
    for t in range(T):
        before = weights[:, :t].sum(dim=1)
        expected[:, t] = torch.minimum(weights[:, t], before).sum(-1)
    torch.testing.assert_close(coverage_loss(weights), expected)
    continued = coverage_loss(weights[:, 2:], weights[:, :2].sum(dim=1))
    torch.testing.assert_close(continued, expected[:, 2:])


def test_coverage_loss_by_hand() -> None:
    weights = torch.tensor([[[0.5, 0.5, 0.0], [0.25, 0.0, 0.75], [1.0, 0.0, 0.0]]])
    # Step 2: min(.25, .5). Step 3: min(1, .75).
    torch.testing.assert_close(coverage_loss(weights), torch.tensor([[0.0, 0.25, 0.75]]))
    with pytest.raises(ValueError, match=r"weights must have shape \(B, T, S\), got \(3, 3\)"):
        coverage_loss(weights[0])
    with pytest.raises(ValueError, match=r"coverage must have shape \(B, S\) = \(1, 3\), got"):
        coverage_loss(weights, torch.zeros(3))


BAD: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({}, {"coverage": torch.zeros(B, T, S)}, ValueError, "unless the layer was created with"),
    (
        {"conv_channels": 2},
        {"coverage": torch.zeros(B, T, S)},
        ValueError,
        "coverage must be None unless the layer was created with coverage=True",
    ),
    (
        {"coverage": True},
        {"previous_weights": torch.zeros(B, T, S)},
        ValueError,
        "previous_weights must be None unless the layer was created with conv_channels",
    ),
    (
        {"coverage": True},
        {"coverage": torch.zeros(B, S)},
        ValueError,
        r"coverage must have shape \(3, 4, 9\), got \(3, 9\)",
    ),
    ({"coverage": True}, {"coverage": [0.0]}, TypeError, "coverage must be a floating-point Ten"),
]


@pytest.mark.parametrize(("options", "history", "error", "message"), BAD)
def test_bad_history(
    options: dict[str, Any], history: dict[str, Any], error: type[Exception], message: str
) -> None:
    layer = make(**options)
    with pytest.raises(error, match=message):
        layer(draw(B, T, D), draw(B, S, E), **history)
