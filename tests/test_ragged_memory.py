"""Memory of rows of different lengths: packed sequences and jagged nested tensors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from fused_attn import LuongAttention, concat_attention, dot_attention, dot_scores

B, T, D, E = 3, 4, 5, 8
LENGTHS = [3, 7, 2]  # not sorted
S = max(LENGTHS)


def rows(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, E, generator=generator, dtype=torch.float64) for n in LENGTHS]


def packed(parts: list[Tensor]) -> Any:
    return pack_sequence(parts, enforce_sorted=False)


def jagged(parts: list[Tensor]) -> Any:
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def by_row(call: Any, query: Tensor, parts: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Every row alone, at its own length: nothing is padded."""
    return [call(query[b : b + 1], part[None]) for b, part in enumerate(parts)]


FORMS = {"packed": packed, "jagged": jagged}
every_form = pytest.mark.parametrize("form", FORMS)


@every_form
@pytest.mark.parametrize("score", ["dot", "general", "concat"])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_layer(score: str, prepared: bool, form: str) -> None:
    torch.manual_seed(0)
    layer = LuongAttention(E if score == "dot" else D, E, score, dtype=torch.float64)
    parts = [part.requires_grad_() for part in rows()]
    query = torch.randn(B, T, layer.query_dim).double()
    memory = FORMS[form](parts)
    given = layer.prepare_memory(memory) if prepared else memory
    context, weights = layer(query, given)
    assert context.shape == (B, T, E) and weights.shape == (B, T, S)
    expected = by_row(layer, query, parts)
    for b, (alone, seen) in enumerate(expected):
        torch.testing.assert_close(context[b], alone[0])
        torch.testing.assert_close(weights[b, :, : LENGTHS[b]], seen[0])
        assert not weights[b, :, LENGTHS[b] :].any()
    got = torch.autograd.grad(context.square().sum(), parts, retain_graph=True)
    wanted = torch.autograd.grad(sum(alone.square().sum() for alone, _ in expected), parts)
    torch.testing.assert_close(got, wanted)


@every_form
def test_the_functions(form: str) -> None:
    parts, query = rows(), rows(1)[1][:T].expand(B, T, E)
    w, v = rows(2)[1][:6], rows(3)[0][0, :6]
    for call in (
        lambda q, m: dot_attention(q, m, return_weights=True),
        lambda q, m: concat_attention(q, m, w, w, v, return_weights=True),
        lambda q, m: dot_scores(q, m)[::-1],
    ):
        got = call(query, FORMS[form](parts))
        for b, alone in enumerate(by_row(call, query, parts)):
            torch.testing.assert_close(got[0][b], alone[0][0])
            torch.testing.assert_close(got[1][b, :, : LENGTHS[b]], alone[1][0])


def test_what_a_recurrent_encoder_returns() -> None:
    torch.manual_seed(0)
    encoder = nn.LSTM(6, 4, bidirectional=True, batch_first=True)
    source = torch.randn(B, S, 6)
    states, _ = encoder(pack_padded_sequence(source, torch.tensor(LENGTHS), True, False))
    layer = LuongAttention(D, E, output_dim=3)
    query = torch.randn(B, D)
    got, _ = layer(query, states)
    for b, length in enumerate(LENGTHS):
        alone, _ = encoder(source[b : b + 1, :length])
        torch.testing.assert_close(got[b : b + 1], layer(query[b : b + 1], alone)[0])


@every_form
def test_lengths_of_its_own(form: str) -> None:
    memory = FORMS[form](rows())
    with pytest.raises(ValueError, match="memory_lengths must be None with a"):
        dot_attention(torch.ones(B, E).double(), memory, memory_lengths=torch.tensor(LENGTHS))


def test_other_nested_tensors_are_refused() -> None:
    with pytest.warns(UserWarning, match="prototype"):
        memory = torch.nested.nested_tensor(rows())
    with pytest.raises(TypeError, match=re.escape("memory must have the jagged layout")):
        dot_attention(torch.ones(B, E).double(), memory)
