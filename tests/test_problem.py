"""FLOP and byte counts, against small products that are counted explicitly."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fused_attn.choices import SCORES
from fused_attn.problem import AttentionProblem

# B, T, S, E, A are primes, so that a missing or doubled factor is detected.
SIZES = (2, 3, 5, 7, 11)
PAIRS = 2 * 3 * 5


def problem(score: str, **options: object) -> AttentionProblem:
    batch, queries, source, memory_dim, attn_dim = SIZES
    width = attn_dim if score == "concat" else memory_dim
    return AttentionProblem(score, batch, queries, source, memory_dim, width, **options)


def test_scores_are_the_three_of_the_paper() -> None:
    assert SCORES == ("dot", "general", "concat")


@pytest.mark.parametrize("score", SCORES)
def test_pairs(score: str) -> None:
    assert problem(score).pairs == PAIRS


@pytest.mark.parametrize(
    ("score", "expected"), [("dot", 0), ("general", 0), ("concat", PAIRS * 11)]
)
def test_only_concat_evaluates_tanh(score: str, expected: int) -> None:
    assert problem(score).concat_elements == expected


@pytest.mark.parametrize(
    ("score", "backward", "products"),
    [
        ("dot", False, 2),  # scores, weighted sum
        ("general", False, 2),
        ("concat", False, 1),  # weighted sum
        ("dot", True, 5),  # scores again, dP, dQ, and both halves of dMemory
        ("general", True, 5),
        ("concat", True, 2),  # dP, and the memory's own half of dMemory
    ],
)
def test_flops(score: str, backward: bool, products: int) -> None:
    assert problem(score).flops(backward) == products * 2 * PAIRS * 7


MEMORY, CONTEXT, PROJECTED_MEMORY = 2 * 5 * 7, 2 * 3 * 7, 2 * 5 * 11
QUERY = {"dot": 2 * 3 * 7, "concat": 2 * 3 * 11}
STATISTICS = 2 * 3


@pytest.mark.parametrize("weights", [False, True], ids=["no_weights", "weights"])
@pytest.mark.parametrize(
    ("dtype", "size", "statistic"),
    [(torch.float32, 4, 4), (torch.bfloat16, 2, 4), (torch.float64, 8, 8)],
    ids=["float32", "bfloat16", "float64"],
)
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_bytes_of_the_forward(
    score: str, dtype: torch.dtype, size: int, statistic: int, weights: bool
) -> None:
    read = MEMORY + QUERY[score] + (PROJECTED_MEMORY if score == "concat" else 0)
    written = CONTEXT + (PAIRS if weights else 0)
    expected = size * (read + written) + statistic * STATISTICS
    assert problem(score, dtype=dtype, return_weights=weights).bytes() == expected


@pytest.mark.parametrize("score", ["dot", "concat"])
def test_bytes_of_the_backward(score: str) -> None:
    """Reads the inputs, the context and its gradient, and writes a gradient of each input."""
    inputs = MEMORY + QUERY[score] + (PROJECTED_MEMORY if score == "concat" else 0)
    assert problem(score).bytes(backward=True) == 4 * (2 * inputs + 2 * CONTEXT + STATISTICS)


def test_it_is_a_value() -> None:
    """It is hashable, because caches use it as a key."""
    assert problem("dot") == problem("dot")
    assert len({problem("dot"), problem("dot"), problem("concat")}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem("dot").batch = 3
