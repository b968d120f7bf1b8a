"""Kernels of the native decoder that are not products, one by one, on every instruction set.

Results are compared with float64: they may have at most twice the error of torch in float32, and a
rounding. Operands lie in larger tensors of NaN, which must neither be read nor written.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fenced import blank, fenced, untouched
from torch import Tensor, nn

from fused_attn import backends

native: Any = pytest.importorskip("fused_attn._C", exc_type=ImportError)
pytestmark = pytest.mark.skipif(
    bool(backends.unavailable_reasons("cpu")), reason="the cpu backend is not usable here"
)
kernels: Any = native.decoder_checks

INF, NAN = float("inf"), float("nan")
EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny
WIDTHS = (0, 1, 7, 17, 37, 64)
EXTREMES = (INF, -INF, NAN, 0.0, -0.0, 1e4, -1e4, 1e-40, -1e-40, 86.0, -86.0, 3e38, -3e38)


@pytest.fixture(autouse=True, params=native.cpu_isas_supported())
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    before = native.cpu_isa()
    native.set_cpu_isa(request.param)
    yield
    native.set_cpu_isa(before)


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def agree(got: Tensor, exact: Tensor, eager: Tensor, scale: Tensor | float) -> None:
    """Assert the error budget: `scale` is the size of the terms, each with a rounding."""
    assert untouched(got) and exact.dtype == torch.float64
    assert torch.equal(got.isfinite(), exact.isfinite())
    assert torch.equal(got.isnan(), exact.isnan())
    good = exact.isfinite()
    assert torch.equal(got[~good & ~got.isnan()], exact.float()[~good & ~got.isnan()])
    if got.numel():
        budget = 2 * (eager - exact)[good].abs().max() if good.any() else 0.0
        allowed = budget + 4 * EPS * torch.as_tensor(scale) + 2 * TINY
        assert bool(((got - exact).abs() <= allowed)[good].all())


def ulps(got: Tensor, exact: Tensor) -> float:
    """Return the largest error in units in the last place of the exact float64 values."""
    exponent = exact.abs().clamp(min=TINY).log2().floor()
    errors = (got.double() - exact).abs() / 2.0 ** (exponent - 23)
    return max(errors.flatten().tolist(), default=0.0)


def by_torch(cell: nn.LSTMCell | nn.GRUCell, rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Return the states of a cell whose gates are given for each row: as biases, h last.

    The weights are zeros, and the biases of the input and of the state are the gates.
    """
    states: list[Tensor] = []
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.zero_()
        for from_input, from_state, state in rows:
            cell.bias_ih.copy_(from_input)
            cell.bias_hh.copy_(from_state)
            zero = state.new_zeros(1, cell.hidden_size)
            x = state.new_zeros(1, 1)
            out = (
                cell(x, (zero, state[None]))
                if isinstance(cell, nn.LSTMCell)
                else cell(x, state[None])
            )
            states.append(torch.cat(out) if isinstance(out, tuple) else out)
    return states


def lstm_by_torch(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    cell = nn.LSTMCell(1, c.shape[1]).to(c.dtype)
    none = torch.zeros_like(gates)
    states = by_torch(cell, list(zip(gates, none, c, strict=True)))
    found = torch.stack([c.new_zeros(2, c.shape[1]), *states])[1:]
    return found[:, 0], found[:, 1]


def gru_by_torch(from_input: Tensor, from_state: Tensor, h: Tensor) -> Tensor:
    cell = nn.GRUCell(1, h.shape[1]).to(h.dtype)
    states = by_torch(cell, list(zip(from_input, from_state, h, strict=True)))
    return torch.cat([h[:0], *states])


def test_tanh_to_three_units_in_the_last_place() -> None:
    x = torch.cat(
        [torch.linspace(-12, 12, 200_003), torch.logspace(-44, 2, 50_000), torch.tensor([0.0])]
    )
    out = torch.empty_like(x)
    kernels.tanh(x, out)
    assert ulps(out, x.double().tanh()) <= 3
    assert bool((out.abs() <= 1).all()) and bool((out[x.abs() >= 9.1].abs() == 1).all())
    mirrored = torch.empty_like(x)
    kernels.tanh(-x, mirrored)
    assert torch.equal(mirrored, -out)


def test_sigmoid_to_three_units_in_the_last_place() -> None:
    """With n = 0 and h = 1 a GRU returns its update gate."""
    x = torch.cat([torch.linspace(-86.9, 90, 200_003), torch.tensor([INF, 1e4])])[None]
    zero, h = torch.zeros_like(x), torch.ones_like(x)
    gates = torch.cat([zero, x, zero], dim=1)
    kernels.gru(gates, torch.zeros_like(gates), h)
    assert ulps(h, x.double().sigmoid()) <= 3
    for low in (-INF, -1e4, -200.0):
        gates[:, x.shape[1] : 2 * x.shape[1]] = low
        h = torch.ones_like(x)
        kernels.gru(gates, torch.zeros_like(gates), h)
        assert not h.any()


def test_tanh_of_extremes() -> None:
    x, out = fenced(torch.tensor(EXTREMES)), blank(len(EXTREMES))
    kernels.tanh(x, out)
    agree(out, x.double().tanh(), x.tanh(), EPS)
    assert torch.equal(out.signbit()[~out.isnan()], x.signbit()[~out.isnan()])


@pytest.mark.parametrize("n", WIDTHS)
def test_tanh_and_add_of_rows_of_any_size(n: int, draw: torch.Generator) -> None:
    x, y = (fenced(torch.randn(n, generator=draw)) for _ in range(2))
    out = blank(n)
    kernels.add(x, y, out)
    assert torch.equal(out, x + y) and untouched(out)
    kernels.add(out, y, out)
    assert torch.equal(out, x + y + y) and untouched(out)
    out = blank(n)
    kernels.tanh(x, out)
    assert untouched(out) and ulps(out, x.double().tanh()) <= 3
    kernels.tanh(x, x)
    assert torch.equal(x, out) and untouched(x)


def test_the_place_of_an_element_does_not_change_its_bits(draw: torch.Generator) -> None:
    x = 3 * torch.randn(133, generator=draw)
    whole = torch.empty_like(x)
    kernels.tanh(x, whole)
    for first in range(1, 33):
        out = torch.empty_like(x[first:])
        kernels.tanh(x[first:], out)
        assert torch.equal(out, whole[first:])

    for value in torch.randn(40, 5, generator=draw):  # 37 cells of the same unit
        columns = value[:, None].expand(5, 37)
        c, h = columns[4:].clone(), torch.empty(1, 37)
        kernels.lstm(columns[:4].reshape(1, -1).clone(), c, h)
        assert len(c.unique()) == len(h.unique()) == 1
        h = columns[4:].clone()
        kernels.gru(
            columns[:3].reshape(1, -1).clone(), columns[1:4].reshape(1, -1).clone() * 0.7, h
        )
        assert len(h.unique()) == 1


@pytest.mark.parametrize("hidden", WIDTHS[1:])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_lstm(rows: int, hidden: int, draw: torch.Generator) -> None:
    values = 3 * torch.randn(rows, 4 * hidden, generator=draw)
    before = torch.randn(rows, hidden, generator=draw)
    gates, c, h = fenced(values), fenced(before), blank(rows, hidden)
    exact, eager = lstm_by_torch(values.double(), before.double()), lstm_by_torch(values, before)
    kernels.lstm(gates, c, h)
    agree(h, exact[0], eager[0], 1.0)
    agree(c, exact[1], eager[1], before.abs() + 1)
    assert untouched(gates)
    for row in range(rows):  # the bits of a row are its own
        alone = before[row : row + 1].clone(), torch.empty(1, hidden)
        kernels.lstm(values[row : row + 1].clone(), *alone)
        assert torch.equal(alone[0][0], c[row]) and torch.equal(alone[1][0], h[row])


def test_lstm_of_extremes() -> None:
    grid = torch.tensor(list(itertools.product(EXTREMES, repeat=3)))
    ordinary = torch.full((len(grid),), 0.3)
    for order in itertools.permutations(range(5), 3):  # three of i, f, g, o and c are extreme
        columns = [ordinary] * 5
        for column, place in enumerate(order):
            columns[place] = grid[:, column]
        i, f, g, o, before = (column.double() for column in columns)
        state = f.sigmoid() * before + i.sigmoid() * g.tanh()
        gates = torch.cat(columns[:4])[None].clone()
        c, h = fenced(columns[4][None]), blank(1, len(grid))
        kernels.lstm(gates, c, h)
        agree(c, state[None], state[None].float(), state.abs().nan_to_num(0, 0, 0) + 1)
        result = (o.sigmoid() * state.tanh())[None]
        agree(h, result, result.float(), 1.0)


@pytest.mark.parametrize("hidden", WIDTHS[1:])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_gru(rows: int, hidden: int, draw: torch.Generator) -> None:
    x, y = (3 * torch.randn(rows, 3 * hidden, generator=draw) for _ in range(2))
    before = torch.randn(rows, hidden, generator=draw)
    h = fenced(before)
    kernels.gru(fenced(x), fenced(y), h)
    exact = gru_by_torch(x.double(), y.double(), before.double())
    agree(h, exact, gru_by_torch(x, y, before), before.abs() + 1)
    for row in range(rows):
        alone = before[row : row + 1].clone()
        kernels.gru(x[row : row + 1].clone(), y[row : row + 1].clone(), alone)
        assert torch.equal(alone[0], h[row])


@pytest.mark.parametrize("n", [0, 1, 3, 7, 17, 37])
def test_dot_scores(n: int, draw: torch.Generator) -> None:
    for width, queries in itertools.product(WIDTHS, (0, 1, 2, 3, 4, 5, 6, 10, 11)):
        keys = fenced(torch.randn(n, width, generator=draw))
        bias = fenced(torch.randn(n, generator=draw))
        query = fenced(torch.randn(queries, width, generator=draw))
        for added in (None, bias):
            scores = blank(queries, n)
            kernels.dot_scores(query, keys, added, scores)
            more = 0.0 if added is None else bias
            exact = query.double() @ keys.double().T + more
            agree(scores, exact, query @ keys.T + more, query.abs() @ keys.abs().T + abs(more))


def test_a_score_does_not_depend_on_the_other_scores(draw: torch.Generator) -> None:
    query, keys = torch.randn(11, 77, generator=draw), torch.randn(37, 77, generator=draw)
    whole = torch.empty(11, 37)
    kernels.dot_scores(query, keys, None, whole)
    for queries, first, last in itertools.product((1, 2, 3, 5, 8), (0, 1, 5), (6, 15, 36, 37)):
        scores = torch.empty(queries, last - first)
        kernels.dot_scores(query[:queries], keys[first:last], None, scores)
        assert torch.equal(scores, whole[:queries, first:last])


@pytest.mark.parametrize("width", WIDTHS)
def test_concat_scores(width: int, draw: torch.Generator) -> None:
    for scale in (1e-4, 1.0, 30.0):
        check_concat_scores(17, width, scale, draw)


def check_concat_scores(n: int, width: int, scale: float, draw: torch.Generator) -> None:
    query, v, direction = (fenced(torch.randn(width, generator=draw)) for _ in range(3))
    keys = fenced(scale * torch.randn(n, width, generator=draw))
    query *= scale
    direction *= scale
    coverage = fenced(torch.rand(n, generator=draw))
    for covered in (False, True):
        more = coverage[:, None] * direction if covered else torch.zeros(n, width)
        scores, alone = blank(n), torch.empty(1)
        given = (coverage, direction) if covered else (None, None)
        kernels.concat_scores(query, keys, v, *given, scores)
        given = (coverage[5:6], direction) if covered else (None, None)
        kernels.concat_scores(query, keys[5:6], v, *given, alone)
        assert torch.equal(alone, scores[5:6])  # bits of its own
        inside = query.double() + keys.double()
        if covered:
            inside = inside + coverage.double()[:, None] * direction.double()
        exact = inside.tanh() @ v.double()
        # A rounding of the argument changes tanh by at most that.
        size = (query.abs() + keys.abs() + more.abs()).clamp(max=1) @ v.abs()
        agree(scores, exact, (query + keys + more).tanh() @ v, size)


@pytest.mark.parametrize("n", [0, 1, 7, 17, 37, 200])
def test_softmax(n: int, draw: torch.Generator) -> None:
    for scale in (1.0, 40.0):
        values = scale * torch.randn(n, generator=draw)
        values[3:5] = -INF
        scores = fenced(values)
        kernels.softmax(scores)
        agree(scores, values.double().softmax(0), values.softmax(0), 1.0)
        assert not scores[3:5].any()
    scores = fenced(torch.full((n,), -INF))
    kernels.softmax(scores)
    assert not scores.any() and untouched(scores)
    for place in range(n):
        for rest in (-INF, 0.0, INF):
            scores = fenced(torch.full((n,), rest))
            scores[place] = NAN
            kernels.softmax(scores)
            assert bool(scores.isnan().all())


@pytest.mark.parametrize("n", [0, 1, 7, 17, 37])
def test_bell(n: int, draw: torch.Generator) -> None:
    values = torch.rand(n, generator=draw)
    for first, center, rate in ((0.0, 3.3, 0.5), (40.0, 41.25, 0.2), (0.0, 900.0, 1.0)):
        weights = fenced(values)
        kernels.bell(weights, first, center, rate)
        results = []
        for dtype in (torch.float64, torch.float32):
            position = torch.arange(n, dtype=dtype) + first
            rounded = torch.tensor(rate, dtype=torch.float32).to(dtype)
            middle = torch.tensor(center, dtype=torch.float32).to(dtype)
            results.append(values.to(dtype) * (-(((position - middle) * rounded) ** 2) / 2).exp())
        agree(weights, *results, scale=values)
    for bad in ((0.0, NAN, 1.0), (NAN, 0.0, 1.0), (0.0, 0.0, NAN)):
        weights = fenced(values)
        kernels.bell(weights, *bad)
        assert bool(weights.isnan().all())


@pytest.mark.parametrize("n", [0, 1, 7, 17, 37])
def test_weighted_sum(n: int, draw: torch.Generator) -> None:
    for width, queries in itertools.product((*WIDTHS, 200), (0, 1, 2, 3, 5, 6, 10, 11)):
        values = fenced(torch.randn(n, width, generator=draw))
        weights = fenced(torch.rand(queries, n, generator=draw))
        start = torch.randn(queries, width, generator=draw)
        for add in (False, True):
            out = fenced(start) if add else blank(queries, width)
            kernels.weighted_sum(weights, values, add, out)
            more = start if add else torch.zeros_like(start)
            exact = more.double() + weights.double() @ values.double()
            agree(out, exact, more + weights @ values, more.abs() + weights @ values.abs())


@pytest.mark.parametrize("n", [63, 64, 65, 3000])
def test_many_positions(n: int, draw: torch.Generator) -> None:
    width = 37
    query, keys = torch.randn(3, width, generator=draw), torch.randn(n, width, generator=draw)
    scores, out = blank(3, n), blank(3, width)
    kernels.dot_scores(query, keys, None, scores)
    agree(scores, query.double() @ keys.double().T, query @ keys.T, query.abs() @ keys.abs().T)
    weights = torch.rand(3, n, generator=draw)
    kernels.weighted_sum(weights, keys, False, out)
    size = (weights @ keys.abs()) / 16  # roundings of a sum are not all of one sign
    agree(out, weights.double() @ keys.double(), weights @ keys, size)
    alone = torch.empty(1, width)
    kernels.weighted_sum(weights[:1], keys, False, alone)
    assert torch.equal(alone[0], out[0])


@pytest.mark.parametrize("n", [1, 7, 17, 37, 1023, 1025, 50_000])
def test_log_sum_exp(n: int, draw: torch.Generator) -> None:
    for scale, shift in ((1.0, 0.0), (30.0, 0.0), (1e-3, 1e4), (5.0, -1e4)):
        x = fenced(scale * torch.randn(n, generator=draw) + shift)
        exact = float(x.double().logsumexp(0))
        assert abs(kernels.log_sum_exp(x) - exact) <= EPS * max(abs(exact), 1.0)
    x[n // 2] = 50.0
    x[n // 3] = -INF
    exact = float(x.double().logsumexp(0))
    assert abs(kernels.log_sum_exp(x) - exact) <= EPS * max(abs(exact), 1.0) or exact == -INF


def test_log_sum_exp_of_extremes() -> None:
    for row in itertools.product((INF, -INF, NAN, 2.0), repeat=3):
        x = fenced(torch.tensor(row * 6))
        got = torch.tensor(kernels.log_sum_exp(x))
        if any(value != value for value in row) or 2.0 not in row:
            assert bool(got.isnan())
        else:
            exact = x.double().logsumexp(0)
            assert got == exact or abs(got - exact) <= 4 * EPS


def rows_of_logits(n: int, draw: torch.Generator) -> Iterator[Tensor]:
    x = torch.randn(n, generator=draw)
    yield x
    yield (3 * x).round()  # many are equal, and zeros have both signs
    yield x.sort().values
    yield x.sort(descending=True).values
    yield torch.zeros(n)
    yield torch.full((n,), -INF)
    for value in (NAN, INF, -INF):
        y = x.clone()
        y[torch.rand(n, generator=draw) < 0.3] = value
        yield y
    yield torch.full((n,), NAN)


@pytest.mark.parametrize("n", [1, 2, 7, 17, 37, 42, 500, 8000])
def test_the_largest(n: int, draw: torch.Generator) -> None:
    for values in rows_of_logits(n, draw):
        x = fenced(values)
        order = values.sort(descending=True, stable=True).indices.tolist()
        assert kernels.argmax(x) == order[0]
        for count in {0, 1, 2, 5, 20, 63, 64, 65, 100, n - 1, n, n + 1, 2 * n}:
            if count > 100 and n > 500 and count < n:
                continue  # as good as n
            found, places = kernels.top(x, count)
            assert found == min(count, n)
            assert places == order[:found] + [-1] * (count + 4 - found)
