"""Scores before the softmax, sparsemax, the location score, and normalised concat scores."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from targets import Target, every_target
from torch import Tensor

import fused_attn
from fused_attn import LuongAttention, autograd, backends, composed, testing
from fused_attn.prepared import exponentials
from fused_attn.problem import AttentionProblem
from fused_attn.testing import DTYPES, Case

B, T, S, D, E, A = 3, 5, 11, 6, 8, 7
LENGTHS = torch.tensor([S, 0, 6])


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def refuses_scores(target: Target, dtype: torch.dtype) -> bool:
    problem = AttentionProblem("scores", 1, 1, 1, 1, 1, dtype, target.device, backward=True)
    return bool(backends.load(target.backend).not_supported_reasons(problem))


SIZES = [(3, 5, 9, 16), (1, 1, 37, 7), (2, 17, 60, 37), (1, 3, 1500, 64), (2, 70, 33, 48)]


@every_target
@pytest.mark.parametrize("mask", ["none", "row", "cube"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_concat_scores(
    dtype: torch.dtype, size: tuple[int, ...], mask: str, target: Target
) -> None:
    """Scores and gradients against the formula in float64, with NaN in the padding."""
    if refuses_scores(target, dtype):
        pytest.skip(f"the {target.backend} backend does not compute concat scores in this dtype")
    batch, queries, source, width = size
    case = Case("projected", dtype, batch, queries, source, attn_dim=width, mask=mask)
    inputs = target.inputs(case)
    masking = testing._cubed(inputs.masking)
    counts = testing.counted(inputs).expand(batch, -1, -1)
    names = ("query_proj", "memory_proj", "v")
    spoiled = testing.spoil_padding(inputs, torch.nan).tensors
    leaves = [spoiled[name].detach().requires_grad_() for name in names]
    with target.active(), testing.poisoned_empty():
        operands = (*leaves[:2], None, leaves[2], *masking[:2])
        got = autograd.concat_scores(*operands, target.backend)
        seed = torch.randn(got.shape, dtype=torch.float64, device=target.device)
        grads = torch.autograd.grad(got, leaves, seed.to(got.dtype))
    counts = counts.expand(got.shape)
    assert torch.equal(got.isneginf(), ~counts)
    exact = [inputs.tensors[name].double().requires_grad_() for name in names]
    wanted = torch.tanh(exact[0][:, :, None] + exact[1][:, None]) @ exact[2]
    expected = torch.autograd.grad(wanted, exact, seed.masked_fill(~counts, 0))
    pairs = [(got.masked_fill(~counts, 0), wanted.masked_fill(~counts, 0))]
    for result, right in (*pairs, *zip(grads, expected, strict=True)):
        limit = 2 * testing.FLOORS[dtype] * float(right.detach().abs().max())
        assert float((result.double() - right).detach().abs().max()) <= limit


@every_target
def test_concat_scores_from_prepared_exponentials(target: Target) -> None:
    if refuses_scores(target, torch.float32):
        pytest.skip(f"the {target.backend} backend does not compute concat scores")
    case = Case("projected", source=40, attn_dim=64)
    tensors = target.inputs(case).tensors
    proj = tensors["memory_proj"]
    rest = (tensors["v"], None, None, target.backend)
    with target.active():
        got = autograd.concat_scores(tensors["query_proj"], proj, exponentials(proj), *rest)
        expected = autograd.concat_scores(tensors["query_proj"], proj, None, *rest)
    torch.testing.assert_close(got, expected)


def test_second_derivatives_of_concat_scores() -> None:
    operands = [draw(1, 2, 3), draw(1, 4, 3, seed=1), draw(3, seed=2)]
    leaves = [tensor.requires_grad_() for tensor in operands]
    lengths = torch.tensor([3])

    def call(query: Tensor, memory: Tensor, v: Tensor) -> Tensor:
        return autograd.concat_scores(query, memory, None, v, lengths, None, "auto")[..., :3]

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
@pytest.mark.parametrize("two", [False, True], ids=["", "step"])
def test_public_functions(score: str, two: bool) -> None:
    """Scores equal the formula, and exp(scores - logsumexp) equals the weights."""
    width = E if score == "dot" else D
    query, memory = draw(B, T, width), draw(B, S, E, seed=1)
    parameters: tuple[Tensor, ...]
    if score == "dot":
        parameters, expected = (), 0.5 * torch.einsum("btd,bsd->bts", query, memory)
    elif score == "general":
        parameters = (draw(D, E, seed=2),)
        expected = 0.5 * torch.einsum("btd,de,bse->bts", query, *parameters, memory)
    else:
        parameters = (draw(A, D, seed=2), draw(A, E, seed=3), draw(A, seed=4), draw(A, seed=5))
        w_q, w_m, v, bias = parameters
        expected = torch.tanh((query @ w_q.T)[:, :, None] + (memory @ w_m.T)[:, None] + bias) @ v
    scale = {} if score == "concat" else {"scale": 0.5}
    outside = torch.arange(S) >= LENGTHS[:, None, None]
    expected = expected.masked_fill(outside, -torch.inf)
    logs = torch.logsumexp(expected, dim=-1)
    if two:
        query, expected, logs = query[:, 0], expected[:, 0], logs[:, 0]
    call = (query, memory.masked_fill(outside.mT, torch.nan), *parameters)
    rest = {**scale, "memory_lengths": LENGTHS}
    scores, logsumexp = getattr(fused_attn, f"{score}_scores")(*call, **rest)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(logsumexp, logs)
    attention = getattr(fused_attn, f"{score}_attention")
    _, weights = attention(*call, **rest, return_weights=True)
    torch.testing.assert_close((scores - logsumexp[..., None]).exp().nan_to_num(0.0), weights)


@pytest.mark.parametrize("score", ["dot", "general", "concat", "location"])
@pytest.mark.parametrize("prepared", [False, True])
def test_scores_of_a_layer(score: str, prepared: bool) -> None:
    torch.manual_seed(0)
    options = {"max_source": 20} if score == "location" else {}
    layer = LuongAttention(E, score=score, scale=0.7, dtype=torch.float64, **options)
    query, memory = draw(B, T, E), draw(B, S, E, seed=1)
    given = (layer.prepare_memory(memory, LENGTHS),) if prepared else (memory, LENGTHS)
    scores, logs = layer.scores(query, *given)
    _, weights = layer(query, *given)
    torch.testing.assert_close((scores - logs[..., None]).exp().nan_to_num(0.0), weights)
    step, log = layer.scores(query[:, 2], *given)
    torch.testing.assert_close((step, log), (scores[:, 2], logs[:, 2]))
    assert logs[1].isneginf().all()


def test_scores_inside_a_window_only() -> None:
    layer = LuongAttention(E, score="concat", local="monotonic", window=1, dtype=torch.float64)
    scores, _ = layer.scores(draw(B, T, E), draw(B, S, E, seed=1))
    near = (torch.arange(S) - torch.arange(T)[:, None]).abs() <= 1
    assert torch.equal(scores.isfinite(), near.expand(B, T, S))


@pytest.mark.parametrize("bias", [False, True])
def test_location_score_is_the_paper(bias: bool) -> None:
    """softmax(W_a h_t), with the first S outputs of W_a (eq. 8 and below)."""
    torch.manual_seed(0)
    options = {"max_source": 20, "bias": bias, "scale": 0.5, "output_dim": 4}
    layer = LuongAttention(D, E, "location", **options, dtype=torch.float64)
    query, memory = draw(B, T, D), draw(B, S, E, seed=1)
    raw = 0.5 * (query @ layer.query_proj.weight.T)[..., :S]
    if bias:
        raw = raw + 0.5 * layer.query_proj.bias[:S]
    outside = torch.arange(S) >= LENGTHS[:, None, None]
    weights = torch.softmax(raw.masked_fill(outside, -torch.inf), -1).nan_to_num(0.0)
    state = torch.tanh(torch.cat((weights @ memory, query), -1) @ layer.output_proj.weight.T)
    spoiled = memory.masked_fill(outside.mT, torch.nan)
    torch.testing.assert_close(layer(query, spoiled, LENGTHS), (state, weights))
    with pytest.raises(ValueError, match=re.escape("S <= max_source = 20, got S=21")):
        layer(query, draw(B, 21, E))


def simplex_projection(row: list[float]) -> list[float]:
    """The nearest point in the simplex, by trying all supports (Martins & Astudillo, eq. 1)."""
    best, found = float("inf"), [0.0] * len(row)
    for size in range(1, len(row) + 1):
        for support in itertools.combinations(range(len(row)), size):
            threshold = (sum(row[i] for i in support) - 1) / size
            point = [row[i] - threshold if i in support else 0.0 for i in range(len(row))]
            distance = sum((p - z) ** 2 for p, z in zip(point, row, strict=True))
            if min(point) >= 0 and distance < best:
                best, found = distance, point
    return found


def test_sparsemax_is_the_projection() -> None:
    scores = 1.5 * draw(40, 6)
    scores[0], scores[1] = 0.0, torch.tensor([1e6, 1e6 - 0.5, 0, -1e6, 3, 1e6 - 2]).double()
    scores[2, :3] = 2.0  # ties
    expected = torch.tensor(
        [simplex_projection(row) for row in scores.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(composed.sparsemax(scores), expected, rtol=1e-9, atol=1e-9)


def test_sparsemax_of_what_counts() -> None:
    scores, counts = draw(4, 6), draw(4, 6, seed=1) > -0.5
    counts[2] = False
    got = composed.sparsemax(scores.masked_fill(~counts, torch.nan), counts)
    for row, seen, result in zip(scores, counts, got, strict=True):
        assert not result[~seen].any()
        if seen.any():
            expected = torch.tensor(simplex_projection(row[seen].tolist()), dtype=torch.float64)
            torch.testing.assert_close(result[seen], expected)
    assert composed.sparsemax(scores[0].index_fill(0, torch.tensor(1), torch.nan)).isnan().all()


def test_derivatives_of_sparsemax() -> None:
    scores, counts = draw(5, 7).requires_grad_(), draw(5, 7, seed=1) > -0.7
    counts[1] = False
    assert torch.autograd.gradcheck(lambda z: composed.sparsemax(2 * z, counts), scores)
    assert torch.autograd.gradgradcheck(lambda z: composed.sparsemax(z, counts) ** 2, scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_a_layer_with_sparsemax(score: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LuongAttention(E, score=score, normalizer="sparsemax", scale=3.0, dtype=dtype)
    query, memory = draw(B, T, E).to(dtype), draw(B, S, E, seed=1).to(dtype)
    context, weights = layer(query, memory, LENGTHS)
    assert context.dtype == weights.dtype == dtype
    scores, _ = layer.scores(query, memory, LENGTHS)
    rows = [simplex_projection(row) for row in scores[2, :, :6].tolist()]
    expected = torch.zeros(T, S)
    expected[:, :6] = torch.tensor(rows)
    tolerance = {"rtol": 0, "atol": 2 * testing.FLOORS[dtype]}
    torch.testing.assert_close(weights[2].float(), expected, **tolerance)
    torch.testing.assert_close(context[2].float(), expected @ memory[2].float(), **tolerance)
    assert not weights[1].any() and not context[1].any()
    assert (weights == 0).sum() > (scores.isneginf()).sum()


def test_composed_weights_know_dropout_and_windows() -> None:
    torch.manual_seed(0)
    options = {"normalizer": "sparsemax", "local": "predictive", "window": 4, "dropout": 0.5}
    layer = LuongAttention(E, score="dot", **options, dtype=torch.float64)
    query, memory = draw(B, T, E), draw(B, S, E, seed=1)
    context, weights = layer.eval()(query, memory)
    torch.testing.assert_close(context, weights @ memory)
    centers = layer.position(query, None, S)
    distance = torch.arange(S) - centers[..., None]
    expected = composed.sparsemax(query @ memory.mT, distance.abs() <= 4)
    torch.testing.assert_close(weights, expected * torch.exp(-(distance**2) / 8))
    dropped, before = layer.train()(query, memory)
    torch.testing.assert_close(before, weights)  # returned weights are those before dropout
    assert not torch.allclose(dropped, context)


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_a_learned_scale(score: str) -> None:
    torch.manual_seed(0)
    layer = LuongAttention(E, score=score, scale="learned", dtype=torch.float64)
    assert layer.scale.shape == () and layer.scale.item() == 1.0
    fixed = LuongAttention(E, score=score, scale=1.7, dtype=torch.float64)
    state = {name: t for name, t in layer.state_dict().items() if name != "scale"}
    fixed.load_state_dict(state)
    with torch.no_grad():
        layer.scale.fill_(1.7)
    query, memory = draw(B, T, E), draw(B, S, E, seed=1)
    torch.testing.assert_close(layer(query, memory), fixed(query, memory))

    def loss(scale: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"scale": scale}, (query, memory))[0]

    assert torch.autograd.gradcheck(loss, torch.tensor(1.3).double().requires_grad_())


def test_a_normalised_vector() -> None:
    """g v / |v| (Salimans & Kingma), with the bias inside the tanh."""
    torch.manual_seed(0)
    options = {"attn_dim": A, "weight_norm": True, "bias": True, "scale": 2.0}
    layer = LuongAttention(D, E, "concat", **options, dtype=torch.float64)
    assert layer.g.item() == pytest.approx(A**-0.5)
    query, memory = draw(B, T, D), draw(B, S, E, seed=1)
    v = layer.g * layer.v / layer.v.square().sum().sqrt()
    hidden = layer.query_proj(query)[:, :, None] + (memory @ layer.memory_proj.weight.T)[:, None]
    weights = torch.softmax(2.0 * torch.tanh(hidden) @ v, -1)
    torch.testing.assert_close(layer(query, memory), (weights @ memory, weights))
    layer(query, memory)[0].square().sum().backward()
    assert float(layer.g.grad) != 0
    # The result does not depend on |v|: the gradient is orthogonal to v.
    assert abs((layer.v.grad @ layer.v).item()) < 1e-12


@pytest.mark.parametrize("masked", [False, True])
def test_normalised_projections(masked: bool) -> None:
    """Both projections are normalised separately before the tanh, then get gains and a bias."""
    torch.manual_seed(0)
    options = {"attn_dim": A, "layer_norm": True, "bias": True, "output_dim": 3}
    layer = LuongAttention(D, E, "concat", **options, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1, 1)
    query, memory = draw(B, T, D), draw(B, S, E, seed=1)
    lengths = torch.tensor([S, 0, 4][:B]) if masked else torch.full((B,), S)

    def normed(x: Tensor, part: torch.nn.Module) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = (
            part.norm.weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        )
        return scaled if part.norm.bias is None else scaled + part.norm.bias

    on_query = query @ layer.query_proj.weight.T + layer.query_proj.bias
    hidden = normed(on_query, layer.query_proj)[:, :, None]
    hidden = hidden + normed(memory @ layer.memory_proj.weight.T, layer.memory_proj)[:, None]
    counts = (torch.arange(S) < lengths[:, None])[:, None]
    scores = (torch.tanh(hidden) @ layer.v).masked_fill(~counts, -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    state = torch.tanh(torch.cat((weights @ memory, query), -1) @ layer.output_proj.weight.T)
    spoiled = memory.masked_fill(~counts.mT, torch.nan)
    torch.testing.assert_close(layer(query, spoiled, lengths), (state, weights))
    prepared = layer.prepare_memory(spoiled, lengths)
    torch.testing.assert_close(layer(query, prepared), (state, weights))
    layer(query, spoiled, lengths)[0].sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
