"""Ragged memories: packed sequences and jagged nested tensors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from targets import Target, every_target
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from fused_attn import (
    LuongAttention,
    backends,
    concat_attention,
    dot_attention,
    dot_scores,
    general_attention,
    ragged,
    reference,
    testing,
)
from fused_attn.prepared import exponentials

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
    """Each sequence separately, at its own length, without padding."""
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
    with pytest.raises(ValueError, match="memory_lengths must be None if memory is a"):
        dot_attention(torch.ones(B, E).double(), memory, memory_lengths=torch.tensor(LENGTHS))


def test_other_nested_tensors_are_refused() -> None:
    with pytest.warns(UserWarning, match="prototype"):
        memory = torch.nested.nested_tensor(rows())
    with pytest.raises(TypeError, match=re.escape("memory must have the jagged layout")):
        dot_attention(torch.ones(B, E).double(), memory)


# Sequences one after another, with offsets, as the operators take them.
COUNTS = [3, 0, 37, 1, 12]


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def pad(values: Tensor, fill: float) -> Tensor:
    padded = values.new_full((len(COUNTS), max(COUNTS), values.shape[1]), fill)
    for b, part in enumerate(values.split(COUNTS)):
        padded[b, : len(part)] = part
    return padded


def unpad(padded: Tensor) -> Tensor:
    return torch.cat([padded[b, :count] for b, count in enumerate(COUNTS)])


def both_forms(score: str, dtype: torch.dtype, queries: int, width: int, backend: str) -> Any:
    """Results and gradients of the operator, for ragged and for padded rows."""
    count, longest = sum(COUNTS), max(COUNTS)
    query = draw(len(COUNTS), queries, width, seed=1, dtype=dtype)
    values = draw(count, width + 4, seed=2, dtype=dtype)[:, :width]  # strided
    inputs: dict[str, tuple[Any, ...]] = {"ragged": (values,), "padded": (pad(values, torch.nan),)}
    others: tuple[Any, ...] = ()
    if score == "concat":
        proj, v = draw(count, width, seed=3, dtype=dtype), draw(width, seed=4, dtype=dtype)
        for form, each in (("ragged", proj), ("padded", pad(proj, torch.nan))):
            exp = exponentials(each) if queries == 1 else None
            inputs[form] = (each, exp, v, *inputs[form])
    scale = () if score == "concat" else (0.3,)
    others = (*scale, None, 1.0, backend, None, 0.0, False)
    forward = getattr(torch.ops.fused_attn, f"{score}_attention")
    backward = getattr(torch.ops.fused_attn, f"{score}_attention_backward")
    found = {}
    for form, operands in inputs.items():
        is_ragged = form == "ragged"
        lengths = offsets_of(COUNTS) if is_ragged else torch.tensor(COUNTS)
        rest = (*others, longest) if is_ragged else others
        with testing.poisoned_empty():
            saved = forward(query, *operands, lengths, None, True, True, *rest)
            seeds = [draw(*each.shape, seed=5, dtype=dtype) for each in saved[:2]]
            wanted = [True] * (3 if score == "dot" else 5)
            grads = backward(*seeds, None, query, *operands, *saved, wanted, lengths, None, *rest)
        grads = [g for g in grads if g is not None]
        if not is_ragged:
            grads = [g if i == 0 or g.dim() != 3 else unpad(g) for i, g in enumerate(grads)]
        found[form] = [*saved, *grads]
    return found["ragged"], found["padded"]


@every_target
@pytest.mark.parametrize("queries", [1, 5, 70])
@pytest.mark.parametrize("width", [7, 64])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("score", ["dot", "concat"])
def test_rows_where_they_lie(
    score: str, dtype: torch.dtype, width: int, queries: int, target: Target
) -> None:
    """Ragged rows give the same bits as padded rows, which are tested elsewhere."""
    if target.device != "cpu":
        pytest.skip("a jagged memory on a GPU is padded before the operator")
    if queries == 70 and (score == "concat" or dtype != torch.float32):
        target.needs_speed()
    with target.active():
        got, expected = both_forms(score, dtype, queries, width, target.backend)
    assert len(got) == (5 if score == "dot" else 7)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_nothing_is_padded(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward and backward of a CPU layer with a learned scale and an output layer."""
    if backends.unavailable_reasons("cpu"):
        pytest.skip("the native module is not there")
    torch.manual_seed(0)
    options: dict[str, Any] = {"output_dim": 6, "scale": "learned", "dtype": torch.float64}
    layer = LuongAttention(E if score == "dot" else D, E, score, **options)
    query = torch.randn(B, T, layer.query_dim).double()
    parts = rows()
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    expected = layer(query, padded, torch.tensor(LENGTHS))
    wanted = torch.autograd.grad(expected[0].square().sum(), list(layer.parameters()))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("padded")

    memory = jagged(parts)
    monkeypatch.setattr(reference, "pad_rows", refuse)
    monkeypatch.setattr(type(memory), "to_padded_tensor", refuse)
    got = layer(query, memory)
    torch.testing.assert_close(got, expected)
    grads = torch.autograd.grad(got[0].square().sum(), list(layer.parameters()))
    torch.testing.assert_close(grads, wanted)
    step, weights = layer(query[:, 0], memory, return_weights=False)
    assert weights is None
    torch.testing.assert_close(step, layer(query[:, :1], padded, torch.tensor(LENGTHS))[0][:, 0])


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_derivatives(score: str) -> None:
    values = torch.cat(rows()).requires_grad_()
    query = draw(B, T, E, seed=7, dtype=torch.float64).requires_grad_()
    weight, v = rows(2)[1][:6].clone().requires_grad_(), rows(3)[0][0, :6]

    def attend(query: Tensor, values: Tensor, weight: Tensor) -> Any:
        memory = torch.nested.nested_tensor_from_jagged(values, offsets_of(LENGTHS))
        if score == "dot":
            return dot_attention(query, memory, return_weights=True)
        if score == "general":
            square = weight.T @ weight / E
            return general_attention(query, memory, square, return_weights=True)
        return concat_attention(query, memory, weight, weight, v, return_weights=True)

    assert torch.autograd.gradcheck(attend, (query, values, weight))


@pytest.mark.parametrize("score", ["dot", "concat"])
def test_second_derivatives(score: str) -> None:
    """With respect to the rows: torch's nested tensors have no second derivatives."""
    values = torch.cat(rows()).requires_grad_()
    query = draw(B, T, E, seed=7, dtype=torch.float64).requires_grad_()
    proj = draw(sum(LENGTHS), E, seed=8, dtype=torch.float64).requires_grad_()
    v = draw(E, seed=9, dtype=torch.float64).requires_grad_()

    def dot(query: Tensor, values: Tensor) -> Any:
        return ragged.attend_dot(query, ragged.Rows(values, offsets, S), 0.5, True, "auto")

    def concat(query: Tensor, proj: Tensor, v: Tensor, values: Tensor) -> Any:
        return ragged.attend_concat(query, proj, v, ragged.Rows(values, offsets, S), True, "auto")

    offsets = offsets_of(LENGTHS)
    call, inputs = (dot, (query, values)) if score == "dot" else (concat, (query, proj, v, values))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_autocast_of_rows(score: str) -> None:
    torch.manual_seed(0)
    layer = LuongAttention(E, score=score)
    query, parts = torch.randn(B, T, E), [part.float() for part in rows()]
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    with torch.autocast("cpu"):
        got, expected = layer(query, jagged(parts)), layer(query, padded, torch.tensor(LENGTHS))
    assert got[0].dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)


def test_a_tensor_with_holes() -> None:
    """Its rows are not contiguous, so it is padded."""
    values, offsets = torch.cat(rows()), offsets_of(LENGTHS)
    lengths = torch.tensor([2, 4, 1])
    memory = torch.nested.nested_tensor_from_jagged(values, offsets, lengths)
    query = torch.ones(B, T, E).double()
    got, _ = dot_attention(query, memory)
    for b, (start, length) in enumerate(zip(offsets, lengths, strict=False)):
        alone, _ = dot_attention(query[b : b + 1], values[None, start : start + length])
        torch.testing.assert_close(got[b : b + 1], alone)


@pytest.mark.parametrize("missing", ["class", "part"])
def test_a_torch_without_what_is_not_public(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the memory is padded."""
    memory, query = jagged(rows()), torch.ones(B, T, E).double()
    expected = dot_attention(query, memory, return_weights=True)
    if missing == "class":
        monkeypatch.setattr(ragged, "NestedTensor", ())
    else:
        monkeypatch.setattr(ragged, "_PARTS", ("_no_such_part",))
    assert ragged.rows_of(memory) is None
    torch.testing.assert_close(dot_attention(query, memory, return_weights=True), expected)


def test_no_rows_at_all() -> None:
    memory = jagged([torch.zeros(0, E).double()] * B)
    context, weights = dot_attention(torch.ones(B, T, E).double(), memory, return_weights=True)
    assert context.shape == (B, T, E) and not context.any() and weights.shape == (B, T, 0)


@pytest.mark.parametrize("score", ["dot", "concat"])
def test_the_operator_is_well_registered(score: str) -> None:
    query, values = torch.randn(B, T, E), torch.randn(sum(LENGTHS), E)
    inputs = (values,) if score == "dot" else (values * 0.5, None, torch.randn(E), values)
    options = (*(() if score == "concat" else (1.0,)), None, 1.0, "auto", None, 0.0, False, S)
    arguments = (query, *inputs, offsets_of(LENGTHS), None, True, True, *options)
    torch.library.opcheck(getattr(torch.ops.fused_attn, f"{score}_attention").default, arguments)


@pytest.mark.parametrize(
    ("offsets", "longest"),
    [([0, 3, 10, 11], S), ([1, 3, 10, 12], S), ([0, 10, 3, 12], S), ([0, 3, 10, 12], S - 1)],
    ids=["short", "late", "falling", "longer"],
)
def test_bad_offsets(offsets: list[int], longest: int) -> None:
    """Offsets that would read out of bounds are refused before anything is read."""
    if backends.unavailable_reasons("cpu"):
        pytest.skip("the native module is not there")
    options = (None, False, False, 1.0, None, 1.0, "cpu", None, 0.0, False, longest)
    operands = (torch.ones(B, T, E), torch.ones(12, E), torch.tensor(offsets))
    with pytest.raises(ValueError, match=re.escape("offsets must rise from 0 to the 12 rows")):
        torch.ops.fused_attn.dot_attention(*operands, *options)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (torch.ones(B + 1, T, E).double(), "query must have shape (3, T, 8) or (3, 8)"),
        (torch.ones(B, T, E + 1).double(), "query must have shape (3, T, 8) or (3, 8)"),
    ],
    ids=["batch", "width"],
)
def test_a_query_that_does_not_fit(query: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dot_attention(query, jagged(rows()))
    layer = LuongAttention(E, score="dot", dtype=torch.float64)
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(query, jagged(rows()))
