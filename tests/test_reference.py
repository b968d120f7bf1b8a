"""The reference itself: against plain loops, hand-computed numbers, and finite differences."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fused_attn import functional, reference
from fused_attn.reference import Masking

Rows = list[list[float]]


def dot(left: list[float], right: list[float]) -> float:
    return sum(x * y for x, y in zip(left, right, strict=True))


def softmax(scores: list[float]) -> list[float]:
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [e / sum(exponentials) for e in exponentials]


def attend_by_loops(
    scores: Rows, memory: Rows, counts: list[list[bool]], keep: Rows | None
) -> tuple[Rows, Rows]:
    """Context and weights of one batch row, in Python floats. ``keep`` are factors of weights."""
    contexts, alignments = [], []
    for t, row in enumerate(scores):
        allowed = [s for s in range(len(memory)) if counts[t][s]]
        weights = [0.0] * len(memory)
        found = softmax([row[s] for s in allowed]) if allowed else []
        for s, weight in zip(allowed, found, strict=True):
            weights[s] = weight
        context = [0.0] * len(memory[0])
        for s in allowed:
            for d, value in enumerate(memory[s]):
                context[d] += weights[s] * (keep[t][s] if keep else 1.0) * value
        contexts.append(context)
        alignments.append(weights)
    return contexts, alignments


def draw(rng: random.Random, *shape: int) -> Tensor:
    size = math.prod(shape)
    return torch.tensor([rng.gauss(0, 1) for _ in range(size)], dtype=torch.float64).view(shape)


B, T, S, E, A = 3, 4, 5, 6, 7


def draw_masking(rng: random.Random, kind: str) -> Masking:
    lengths = torch.tensor([S, 0, 3]) if "lengths" in kind else None
    rows = T if "cube" in kind else 1
    mask = draw(rng, B, rows, S) > -0.5 if "row" in kind or "cube" in kind else None
    if mask is not None:
        mask[2, 0] = False  # a fully masked query
    keep = draw(rng, B, T, S) > 0 if "keep" in kind else None
    return Masking(lengths, mask, keep, 2.0 if keep is not None else 1.0)


def counts_by_loops(masking: Masking, b: int) -> list[list[bool]]:
    counts = [[True] * S for _ in range(T)]
    for t in range(T):
        for s in range(S):
            if masking.memory_lengths is not None and s >= int(masking.memory_lengths[b]):
                counts[t][s] = False
            mask = masking.memory_mask
            if mask is not None and not bool(mask[b, t if mask.shape[1] == T else 0, s]):
                counts[t][s] = False
    return counts


def counted_pairs(masking: Masking) -> list[tuple[int, int, int]]:
    """The (b, t, s) whose scores are defined: positions that do not count are not read."""
    counts = [counts_by_loops(masking, b) for b in range(B)]
    everything = itertools.product(range(B), range(T), range(S))
    return [(b, t, s) for b, t, s in everything if counts[b][t][s]]


KINDS = ["all", "lengths", "row", "cube", "lengths_cube", "keep", "lengths_cube_keep"]


def check_by_loops(result: reference.Attention, memory: Tensor, masking: Masking) -> None:
    """Check everything that follows from ``result.scores``, which has been checked."""
    for b in range(B):
        keep = None
        if masking.keep_mask is not None:
            keep = (masking.keep_mask[b] * masking.keep_scale).tolist()
        counts = counts_by_loops(masking, b)
        expected = attend_by_loops(result.scores[b].tolist(), memory[b].tolist(), counts, keep)
        for got, rows in zip((result.context[b], result.weights[b]), expected, strict=True):
            torch.testing.assert_close(got, torch.tensor(rows, dtype=torch.float64))
        for t in range(T):
            seen = [float(result.scores[b, t, s]) for s in range(S) if counts[t][s]]
            total = math.log(sum(map(math.exp, seen))) if seen else -math.inf
            assert float(result.logsumexp[b, t]) == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_dot_against_loops(kind: str) -> None:
    rng = random.Random(kind)
    query, memory = draw(rng, B, T, E), draw(rng, B, S, E)
    masking = draw_masking(rng, kind)
    result = reference.dot_attention(query, memory, 0.5, masking)
    for b, t, s in counted_pairs(masking):
        expected = 0.5 * dot(query[b, t].tolist(), memory[b, s].tolist())
        assert float(result.scores[b, t, s]) == pytest.approx(expected, abs=1e-12)
    check_by_loops(result, memory, masking)


@pytest.mark.parametrize("kind", KINDS)
def test_concat_against_loops(kind: str) -> None:
    rng = random.Random(kind)
    query_proj, memory_proj, v = draw(rng, B, T, A), draw(rng, B, S, A), draw(rng, A)
    memory, masking = draw(rng, B, S, E), draw_masking(rng, kind)
    result = reference.concat_attention(query_proj, memory_proj, v, memory, masking)
    for b, t, s in counted_pairs(masking):
        terms = zip(query_proj[b, t].tolist(), memory_proj[b, s].tolist(), strict=True)
        expected = dot(v.tolist(), [math.tanh(q + m) for q, m in terms])
        assert float(result.scores[b, t, s]) == pytest.approx(expected, abs=1e-12)
    check_by_loops(result, memory, masking)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        pytest.param(None, -13.0, id="dot"),
        pytest.param([[1.0, 0.0], [0.0, 4.0]], -58.0, id="general_diagonal"),
        pytest.param([[1.0, 7.0], [-8.0, 4.0]], -141.0, id="general_full"),
    ],
)
def test_worked_scores(weight: Rows | None, expected: float) -> None:
    """h_t = [1, 3], h_s = [2, -5]: 2 - 15; 2 - 60; and [1 - 24, 7 + 12] . [2, -5] = -46 - 95."""
    query, memory = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, -5.0]]])
    scored = query if weight is None else query @ torch.tensor(weight)
    assert float(reference.dot_attention(scored, memory).scores) == expected


def test_worked_general_through_the_public_function() -> None:
    """weight is W_a and not its transpose: the scores of the two rows differ by 141."""
    query = torch.tensor([[[1.0, 3.0]]])
    memory = torch.tensor([[[2.0, -5.0], [0.0, 0.0]]])
    weight = torch.tensor([[1.0, 7.0], [-8.0, 4.0]])
    _, weights = functional.general_attention(
        query, memory, weight, scale=1 / 141, return_weights=True, backend="eager"
    )
    expected = softmax([-1.0, 0.0])
    assert weights[0, 0].tolist() == pytest.approx(expected, rel=1e-6)


def test_worked_softmax() -> None:
    """Scores 7, 1, -1, -2, from a query of 1 and a memory of these numbers."""
    scores = [7.0, 1.0, -1.0, -2.0]
    memory = torch.tensor(scores, dtype=torch.float64).view(1, 4, 1)
    result = reference.dot_attention(torch.ones(1, 1, 1, dtype=torch.float64), memory)
    exponentials = [math.exp(score) for score in scores]
    expected = [e / sum(exponentials) for e in exponentials]
    assert result.weights[0, 0].tolist() == pytest.approx(expected, rel=1e-14)
    assert expected[0] == pytest.approx(0.99707, abs=5e-6)
    assert float(result.context) == pytest.approx(dot(expected, scores), rel=1e-14)


def test_worked_two_by_two() -> None:
    """Memory rows [1, 0] and [0, 1], query [ln 3, 0]: weights 3/4 and 1/4, context the same."""
    memory = torch.eye(2, dtype=torch.float64)[None]
    query = torch.tensor([[[math.log(3), 0.0]]], dtype=torch.float64, requires_grad=True)
    result = reference.dot_attention(query, memory)
    assert result.weights.flatten().tolist() == pytest.approx([0.75, 0.25])
    assert result.context.flatten().tolist() == pytest.approx([0.75, 0.25])
    # d c_0 / d q_0 = w_0 (1 - w_0) and d c_0 / d q_1 = -w_0 w_1.
    (grad,) = torch.autograd.grad(result.context[0, 0, 0], query)
    assert grad.flatten().tolist() == pytest.approx([3 / 16, -3 / 16])


def test_worked_concat() -> None:
    """v = [2, -1], projections that add to [atanh(1/2), 0] and [0, atanh(1/2)]: scores 1, -1/2."""
    half = math.atanh(0.5)
    query_proj = torch.tensor([[[half / 2, half / 2]]], dtype=torch.float64)
    memory_proj = torch.tensor([[[half / 2, -half / 2], [-half / 2, half / 2]]]).double()
    v = torch.tensor([2.0, -1.0], dtype=torch.float64)
    memory = torch.eye(2, dtype=torch.float64)[None]
    result = reference.concat_attention(query_proj, memory_proj, v, memory)
    assert result.scores.flatten().tolist() == pytest.approx([1.0, -0.5], abs=1e-7)
    assert result.weights.flatten().tolist() == pytest.approx(softmax([1.0, -0.5]), abs=1e-7)


DERIVATIVES = ["all", "lengths", "lengths_cube", "lengths_cube_keep"]


@pytest.mark.parametrize("kind", DERIVATIVES)
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_first_and_second_derivatives(score: str, kind: str) -> None:
    """Of context and weights, against finite differences, with fully masked rows."""
    rng = random.Random(kind)
    masking = draw_masking(rng, kind)
    shapes = {"dot": [(B, T, 2), (B, S, 2)], "concat": [(B, T, 2), (B, S, 2), (2,), (B, S, 2)]}
    inputs = [draw(rng, *shape).requires_grad_() for shape in shapes[score]]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        if score == "dot":
            result = reference.dot_attention(*tensors, 0.5, masking)
        else:
            result = reference.concat_attention(*tensors, masking)
        return result.context, result.weights

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@given(seed=st.integers(0, 10**6), size=st.floats(0.1, 30.0))
def test_weights_sum_to_one(seed: int, size: float) -> None:
    rng = random.Random(seed)
    query, memory = size * draw(rng, 2, 3, 4), draw(rng, 2, 5, 4)
    weights = reference.dot_attention(query, memory).weights
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, dtype=torch.float64))


@given(seed=st.integers(0, 10**6), order=st.permutations(range(5)))
def test_permuting_the_memory_permutes_the_weights(seed: int, order: list[int]) -> None:
    rng = random.Random(seed)
    query, memory = draw(rng, 2, 3, 4), draw(rng, 2, 5, 4)
    lengths_mask = draw(rng, 2, 1, 5) > -0.5
    masking = Masking(memory_mask=lengths_mask)
    permuted = Masking(memory_mask=lengths_mask[..., order])
    result = reference.dot_attention(query, memory, 1.0, masking)
    moved = reference.dot_attention(query, memory[:, order], 1.0, permuted)
    torch.testing.assert_close(moved.weights, result.weights[..., order])
    torch.testing.assert_close(moved.context, result.context)


@given(seed=st.integers(0, 10**6), shift=st.floats(-100.0, 100.0))
def test_the_same_number_on_every_score_changes_nothing(seed: int, shift: float) -> None:
    rng = random.Random(seed)
    scores, memory = draw(rng, 2, 3, 5), draw(rng, 2, 5, 4)
    counts = draw(rng, 2, 3, 5) > -1
    result = reference.attend(scores, memory, counts, Masking())
    moved = reference.attend(scores + shift, memory, counts, Masking())
    torch.testing.assert_close(moved.weights, result.weights)
    torch.testing.assert_close(moved.context, result.context)


@given(seed=st.integers(0, 10**6))
def test_a_memory_of_equal_rows_is_returned(seed: int) -> None:
    """For any weights, because they sum to 1."""
    rng = random.Random(seed)
    row = draw(rng, 2, 1, 4)
    result = reference.dot_attention(draw(rng, 2, 3, 4), row.expand(2, 5, 4))
    torch.testing.assert_close(result.context, row.expand(2, 3, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_padding_is_not_read(score: str, value: float) -> None:
    rng = random.Random(0)
    masking = draw_masking(rng, "lengths_row")
    operands = [draw(rng, B, T, E), draw(rng, B, S, E)]
    operands += [draw(rng, E), draw(rng, B, S, E)] if score == "concat" else []
    call = reference.dot_attention if score == "dot" else reference.concat_attention
    rest = (1.0, masking) if score == "dot" else (masking,)
    found = []
    for fill in (0.0, value):
        padding = ~reference.counted_positions(operands[1], masking).any(dim=1)[..., None]
        leaves = [t.masked_fill(padding, fill) if t.shape == (B, S, E) else t for t in operands]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        result = call(*leaves, *rest)
        grads = torch.autograd.grad(result.context.sum() + result.weights.sum(), leaves)
        found.append([result.context, result.weights, *grads])
    for got, expected in zip(*found, strict=True):
        assert expected.isfinite().all()
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_arithmetic_is_never_narrower_than_float32(
    dtype: torch.dtype, expected: torch.dtype
) -> None:
    assert reference.arithmetic_dtype(dtype) == expected
    result = reference.dot_attention(torch.ones(1, 2, 3).to(dtype), torch.ones(1, 4, 3).to(dtype))
    assert {result.context.dtype, result.weights.dtype, result.logsumexp.dtype} == {expected}
